"""Weights as inputs: the same velocity from the same weights, one graph for both experts, one file for each."""

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from engines.gpu.external_weights import (
    attention_scales_of,
    check_alike,
    check_layout,
    externalise,
    layout,
    write_weights,
)
from engines.gpu.tensorrt_backend import EngineOptions, build_engine
from engines.inspect.log import read_log
from engines.inspect.report import FusionReport
from engines.profiles import profiles_for
from engines.targets import TARGETS
from export.checkpoint.schema import dit_tensors
from export.graphs.builder import BFLOAT16, FLOAT
from export.graphs.dit import dit_graph
from export.graphs.linear import FLOAT8, Fp8
from export.graphs.weights_file import declare_weights, placements
from export.graphs.weights_file import write_weights as write_bundle_weights
from export.quantise.fp8_weights import Fp8Weights
from tests.engines.conftest import FP8_OF, bound
from tests.engines.inspect.test_log import KERNELS
from tests.export.conftest import made_up
from tests.export.graphs.test_dit import inputs_for, relative_l2
from wan22.errors import UserError
from wan22.external_layout import read_layout, write_layout
from wan22.specs import SPECS, Precision

SPEC = SPECS["t2v-a14b-tiny"].dit
LINEARS = frozenset({"self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.kv", "cross_attn.o", "ffn.0", "ffn.2"})


def exported(folder, fp8, seed=0):
    """A transformer in float32, with FP8 matrices if requested."""
    folder.mkdir(exist_ok=True)
    made = made_up(dit_tensors(SPEC), seed)
    g = dit_graph(SPEC, FLOAT, None, fp8)
    quantised = [key for key, value in g.weights.items() if value.dtype == FLOAT8]
    read, chance = Fp8Weights(made.__getitem__, SPEC, quantised), np.random.default_rng(seed)

    def pieces(key):
        """A tensor. Rows of codes that a checkpoint scaled one by one have random scales, all of them powers of two."""
        if fp8 and fp8.by_column and key.endswith("weight_scale"):
            return [np.exp2(np.round(np.log2(read(key)))).astype(np.float32)]
        if key.endswith("column_scale"):
            return [np.exp2(chance.integers(0, 4, g.weights[key].shape.numpy())).astype(np.float32)]
        return [read(key)]

    write_bundle_weights(folder / "w.safetensors", declare_weights([g]), pieces)
    g.bind(placements("w.safetensors", declare_weights([g])), folder)
    g.save(folder / "dit.onnx")
    return folder / "dit.onnx"


def fed(weights, file):
    """The weights of a component's file as inputs for ONNX Runtime."""
    data, values = file.read_bytes(), {}
    for place, weight in zip(layout(weights)[0], weights, strict=True):
        dtype = ir.DataType[weight.dtype]
        array = np.frombuffer(data, dtype.numpy(), count=int(np.prod(weight.shape)), offset=place.offset)
        if dtype == FLOAT8:
            raw = array.view(np.uint8).reshape(weight.shape)
            values[weight.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, int(dtype))
        else:
            values[weight.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array.reshape(weight.shape))
    return values


def session(path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed constants are summed in another order
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def velocity(path, weights=(), file=None):
    given = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in inputs_for(SPEC, 3, 8, 8, [900.0]).items()}
    given |= fed(weights, file) if file else {}
    return session(path).run_with_ort_values(["velocity"], given)[0].numpy()


@pytest.mark.parametrize(
    ("fp8", "limit"),
    [
        (None, 1e-6),
        (Fp8(), 0.01),
        (Fp8(True, True), 0.02),
        (Fp8(by_column=LINEARS), 1e-6),
    ],  # swapping two multiplications rounds some activations to the next FP8 number, but not by powers of two
    ids=["fp32", "fp8", "fp8-attn", "fp8, a scale per row"],
)
def test_the_velocity_is_that_of_the_graph_with_its_weights_inside(tmp_path, fp8, limit):
    path = exported(tmp_path / "b", fp8)
    model, weights = externalise(path)
    ir.save(model, tmp_path / "external.onnx")
    write_weights(tmp_path / "b", weights, tmp_path / "dit.weights")
    found = velocity(tmp_path / "external.onnx", weights, tmp_path / "dit.weights")
    assert relative_l2(found, velocity(path)) < limit


def test_matrices_keep_their_stored_layout_and_qkv_is_one(tmp_path):
    _, weights = externalise(exported(tmp_path / "b", None))
    shapes = {weight.name: weight.shape for weight in weights}
    assert shapes["blocks.0.self_attn.qkv.weight"] == (3 * SPEC.width, SPEC.width)
    assert shapes["blocks.0.self_attn.qkv.bias"] == (3 * SPEC.width,)
    assert shapes["blocks.0.ffn.0.weight"] == (SPEC.ffn_width, SPEC.width)
    assert not any(".self_attn.q.weight" in name for name in shapes)


def test_a_matrix_in_the_file_has_the_stored_bytes(tmp_path):
    _, weights = externalise(exported(tmp_path / "b", None))
    write_weights(tmp_path / "b", weights, tmp_path / "dit.weights")
    places = {place.name: place for place in layout(weights)[0]}
    place, stored = places["blocks.0.ffn.0.weight"], made_up(dit_tensors(SPEC), 0)["blocks.0.ffn.0.weight"]
    data = (tmp_path / "dit.weights").read_bytes()[place.offset : place.offset + place.size_bytes]
    assert data == stored.tobytes()
    assert place.shape == stored.shape


def test_engines_of_releases_that_turned_matrices_take_no_new_weights(tmp_path):
    _, weights = externalise(exported(tmp_path / "b", None))
    places = [{"name": p.name, "offset": p.offset, "size_bytes": p.size_bytes} for p in layout(weights)[0]]
    (tmp_path / "old.json").write_text(json.dumps(places))
    assert len(read_layout(tmp_path / "old.json")) == len(weights)  # the engine itself still runs
    with pytest.raises(UserError, match=r"a layout other than .*build again"):
        check_layout(tmp_path / "old.json", weights)


def test_both_experts_have_one_graph_and_files_of_one_layout(tmp_path):
    (high, of_high), (low, of_low) = (externalise(exported(tmp_path / n, Fp8(), n == "low")) for n in ("high", "low"))
    ir.save(high, tmp_path / "high.onnx")
    ir.save(low, tmp_path / "low.onnx")
    assert (tmp_path / "high.onnx").read_bytes() == (tmp_path / "low.onnx").read_bytes()
    check_alike({"high_noise": of_high, "low_noise": of_low})
    files = [write_weights(tmp_path / n, w, tmp_path / f"{n}.w") for n, w in (("high", of_high), ("low", of_low))]
    assert files[0].size_bytes == files[1].size_bytes == layout(of_high)[1]
    assert files[0].sha256 != files[1].sha256
    write_layout(tmp_path / "layout.json", layout(of_high)[0])
    assert {place["offset"] % 256 for place in json.loads((tmp_path / "layout.json").read_text())} == {0}


def test_experts_of_two_precisions_cannot_share_an_engine(tmp_path):
    (_, high), (_, low) = (externalise(exported(tmp_path / n, fp8)) for n, fp8 in (("high", Fp8()), ("low", None)))
    with pytest.raises(UserError, match=r"of low_noise .* of high_noise"):
        check_alike({"high_noise": high, "low_noise": low})


def test_static_scales_are_refused(tmp_path):
    g = dit_graph(SPEC, FLOAT, None, Fp8(static=frozenset({"blocks.0.ffn.0"})))
    g.bind(placements("w.safetensors", declare_weights([g])), tmp_path)
    g.save(tmp_path / "dit.onnx")
    with pytest.raises(UserError, match=r"static FP8 scale blocks\.0\.ffn\.0\.input_scale"):
        externalise(tmp_path / "dit.onnx")


def test_scales_of_fp8_attention_are_constants_large_enough_for_both_experts(tmp_path):
    paths = [exported(tmp_path / n, Fp8(True, True), seed) for seed, n in enumerate(("high", "low"))]
    scales, own = attention_scales_of(paths), [attention_scales_of([path]) for path in paths]
    assert len(scales) == 4 * SPEC.layers
    assert scales == {name: max(of_expert[name] for of_expert in own) for name in scales}
    assert own[0] != own[1]
    (high, of_high), (low, of_low) = (externalise(path, scales) for path in paths)
    ir.save(high, tmp_path / "high.onnx")
    ir.save(low, tmp_path / "low.onnx")
    assert (tmp_path / "high.onnx").read_bytes() == (tmp_path / "low.onnx").read_bytes()
    assert not any("q_scale" in weight.name or "k_scale" in weight.name for weight in (*of_high, *of_low))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8, Precision.FP8_ATTN])
def test_the_compiler_makes_few_more_kernels_of_it_and_the_same_fp8(tmp_path, precision):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    g = dit_graph(replace(SPEC, layers=3), BFLOAT16, None, FP8_OF[precision])
    bound(g, tmp_path)
    g.save(tmp_path / "embedded.onnx")
    model, _ = externalise(tmp_path / "embedded.onnx")
    ir.save(model, tmp_path / "external.onnx")
    profiles = profiles_for(SPECS["t2v-a14b-tiny"], "256x160", "5..17")
    options = EngineOptions(TARGETS["rtx4090"], profiles, g.edges()[0])
    embedded, external = (
        FusionReport("dit", options.target, read_log(built.log), precision)
        for style in ("embedded", "external")
        for built in [build_engine(tmp_path / f"{style}.onnx", tmp_path / f"{style}.engine", options)]
    )
    assert external.problems == []
    assert external.by_dtype("gemm").get("fp8", 0) >= embedded.by_dtype("gemm").get("fp8", 0)
    assert external.by_dtype("attention") == embedded.by_dtype("attention")
    assert external.kernels_per_block[1] <= embedded.kernels_per_block[1] + 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx4090", "rtx5090"])
@pytest.mark.parametrize("precision", list(FP8_OF), ids=str)
@pytest.mark.parametrize("model", ["t2v-a14b", "ti2v-5b"])
def test_no_kernel_of_a_real_size_block_turns_a_matrix(compiled, model, precision, target):
    spec = SPECS[model]
    report = compiled(model, target, precision, "480x480..1280x704", "17..81", layers=1, external=True)
    matrices = {
        tuple(value.shape.numpy())
        for value in dit_graph(replace(spec.dit, layers=1), BFLOAT16, None, FP8_OF[precision]).weights.values()
        if len(value.shape) == 2
    } | {(3 * spec.dit.width, spec.dit.width)}
    copies = [kernel for kernel in report.compiled.kernels if kernel.role == "copy"]
    assert matrices.isdisjoint(operand.dims for kernel in copies for operand in kernel.inputs)
    assert report.problems == []
    assert report.kernels_per_block[0] <= KERNELS[precision] + 1


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'[{"name": "\xf6', b"[" * 100_000], ids=["empty", "other", "not UTF-8", "deep"]
)
def test_a_damaged_layout_is_refused(tmp_path, content):
    (tmp_path / "layout.json").write_bytes(content)
    with pytest.raises(UserError, match="expected the layout of weights"):
        read_layout(tmp_path / "layout.json")
