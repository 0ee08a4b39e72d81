"""Arithmetic counted on graphs agrees with the formulas and excludes what a graph skips."""

import onnx
import pytest
from onnx import TensorProto, helper

from export.graphs.builder import Placed
from export.graphs.vae_decoder import vae_decoder
from export.graphs.vae_encoder import vae_encoder
from validate.bench.graph_flops import GraphFlops, graph_flops
from wan22.bundle import open_bundle
from wan22.costs import dit_flops, text_encoder_flops, vae_flops
from wan22.shapes import shape_of
from wan22.specs import T2V_A14B, TEXT_TOKENS, TI2V_5B

FRAMES, HEIGHT, WIDTH, TOKENS = 5, 30, 52, 39
TOKENS_OF_VIDEO = FRAMES * HEIGHT * WIDTH // 4
KEPT = TOKENS + 1  # rows of text: the prompt's, and one for the padding
SIZES = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "rows": 15, "columns": 26, "tokens": TOKENS}


def count(folder, kept, kind="engines"):
    bundle = open_bundle(folder, kind)
    return {
        component.name: graph_flops(
            bundle.folder / component.graph.path, {t.name: shape_of(t, SIZES) for t in component.inputs}, kept
        )
        for component in bundle.manifest.components
    }, bundle.manifest.spec


@pytest.fixture(scope="module")
def counted(tiny_engines):
    return count(tiny_engines, KEPT)


def unneeded(dit, rows):
    """The arithmetic that k and v of the padding would take."""
    return dit.layers * (TEXT_TOKENS - rows) * 4 * dit.width**2


def test_the_transformer_is_its_formula_without_the_padding_that_a_cpu_leaves_out(tiny_engines):
    rows = TEXT_TOKENS // 2  # too many for the short way
    flops, spec = count(tiny_engines, rows)
    formula = dit_flops(spec.dit, TOKENS_OF_VIDEO)
    attention = formula.self_attention + formula.cross_attention * rows / TEXT_TOKENS
    for expert in spec.experts:
        assert flops[expert].attention == pytest.approx(attention, rel=5e-3)  # q and k have a channel for the padding
        linears = formula.linears - unneeded(spec.dit, rows)
        assert 1 < flops[expert].with_weights / linears < 1.05  # the formula has no embeddings


def test_with_a_short_prompt_the_linear_behind_cross_attention_has_as_many_rows_as_text_and_heads(counted):
    flops, spec = counted
    formula, dit = dit_flops(spec.dit, TOKENS_OF_VIDEO), spec.dit
    scores, mixed = KEPT * dit.width, dit.heads * KEPT * dit.width  # multiplications a token and layer
    attention = formula.self_attention + 2 * TOKENS_OF_VIDEO * dit.layers * (scores + mixed)
    spared = 2 * TOKENS_OF_VIDEO * dit.layers * dit.width**2
    for expert in spec.experts:
        assert flops[expert].attention == pytest.approx(attention)
        linears = formula.linears - unneeded(dit, KEPT) - spared
        assert 1 < flops[expert].with_weights / linears < 1.05  # with embeddings, and the text times that linear


def test_the_text_encoder_is_its_formula(counted):
    flops, spec = counted
    assert flops["text_encoder"].total == text_encoder_flops(spec.text_encoder, TOKENS)


@pytest.mark.parametrize("spec", [T2V_A14B, TI2V_5B], ids=lambda spec: spec.name)
@pytest.mark.parametrize(("half", "make"), [("vae_decoder", vae_decoder), ("vae_encoder", vae_encoder)])
def test_a_vae_of_real_size_is_its_formula(tmp_path, spec, half, make):
    first, both = (vae_flops(spec.vae, half, (HEIGHT, WIDTH), frames) for frames in (1, 2))
    for is_first, formula in ((True, first), (False, both - first)):
        graph = make(spec.vae, first=is_first)
        path = tmp_path / "graph.onnx"
        graph.bind(dict.fromkeys(graph.weights, Placed("weights.bin", 0, 0)), tmp_path)
        graph.save(path)
        assert graph_flops(path, {t.name: shape_of(t, SIZES) for t in graph.edges()[0]}).total == formula


def test_a_cpu_leaves_out_five_ninths_of_the_convolutions_of_doubled_pixels(counted, tiny_bundle):
    (fitted, spec), (plain, _) = counted, count(tiny_bundle, None, "graphs")
    stages = zip(spec.vae.decoder_widths[1:4], (2, 4, 4), (2, 4, 8), strict=True)
    doubled = [9 * c * c * frames * HEIGHT * WIDTH * scale**2 for c, frames, scale in stages]
    assert plain["vae_decoder_next"].total - fitted["vae_decoder_next"].total == sum(doubled) * 5 / 9


def graph_of(path, *nodes, weights=()):
    """A graph from ``x`` [2, rows, 8] to ``y``; weights are (name, dims)."""
    tensors = [helper.make_tensor(name, TensorProto.FLOAT, dims, bytes(4 * 8 * 8), raw=True) for name, dims in weights]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, "rows", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph(list(nodes), "graph", [x], [y], tensors))
    onnx.save(model, path)
    return path


def test_products_with_weights_and_of_activations_are_distinguished(tmp_path):
    path = graph_of(
        tmp_path / "graph.onnx",
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["h"]),
        helper.make_node("Transpose", ["h"], ["columns"], perm=[0, 2, 1]),
        helper.make_node("FusedMatMul", ["h", "columns"], ["y"], domain="com.microsoft", alpha=0.5),
        weights=[("w", [8, 8])],
    )
    assert graph_flops(path, {"x": (2, 5, 8)}) == GraphFlops(2 * 2 * 5 * 8 * 8, 2 * 2 * 5 * 5 * 8)


def test_a_graph_with_an_operator_that_cannot_be_counted_has_no_count(tmp_path):
    path = graph_of(
        tmp_path / "graph.onnx",
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("QMoE", ["h"], ["y"], domain="com.microsoft"),
        weights=[("w", [8, 8])],
    )
    assert graph_flops(path, {"x": (2, 5, 8)}) is None


def test_a_size_that_depends_on_values_must_be_given(tmp_path):
    path = graph_of(
        tmp_path / "graph.onnx",
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("NonZero", ["rows"], ["places"]),
        helper.make_node("Cast", ["places"], ["found"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["found"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["turned", "found"], ["y"]),
        weights=[],
    )
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("flat", TensorProto.INT64, [2], [-1, 8]))
    onnx.save(model, path)
    assert graph_flops(path, {"x": (2, 5, 8)}) is None
    assert graph_flops(path, {"x": (2, 5, 8)}, 7) == GraphFlops(0, 2 * 7 * 2 * 7)


def test_control_flow_that_no_engine_of_ours_has_is_not_counted(tmp_path):
    body = helper.make_graph(
        [helper.make_node("MatMul", ["row", "w"], ["out"])],
        "body",
        [helper.make_tensor_value_info("row", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    path = graph_of(
        tmp_path / "graph.onnx",
        helper.make_node("Neg", ["x"], ["rows"]),
        helper.make_node("Scan", ["rows"], ["y"], body=body, num_scan_inputs=1),
        weights=[("w", [8, 8])],
    )
    assert graph_flops(path, {"x": (2, 5, 8)}) is None
