"""Properties of every VAE graph: both halves, both generations, first and later chunks."""

from dataclasses import replace

import onnx
import pytest

from export.checkpoint.schema import vae_tensors
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16
from export.graphs.vae_decoder import vae_decoder
from export.graphs.vae_encoder import vae_encoder
from tests.export.conftest import made_up
from tests.export.graphs.vae_chunks import HALVES, MODELS, write
from wan22.errors import UserError
from wan22.specs import SPECS, T2V_A14B, TI2V_5B

FORBIDDEN = {"ScatterND", "ScatterElements", "NonZero", "Loop", "Scan", "If", "GatherND", "Gather", "Resize"}
ELEMENT = {FLOAT: onnx.TensorProto.FLOAT, FLOAT16: onnx.TensorProto.FLOAT16, BFLOAT16: onnx.TensorProto.BFLOAT16}
every_graph = pytest.mark.parametrize(
    ("model", "half", "first"),
    [(model, half, first) for model in MODELS for half in HALVES for first in (True, False)],
    ids=lambda value: {True: "first", False: "next"}.get(value, value),
)


def graph(model, half, first, *arguments):
    return HALVES[half](SPECS[model].vae, first, *arguments)


def checked(g, model, folder):
    """The saved graph after ONNX's full check, with inferred types for every value."""
    path = write(g, made_up(vae_tensors(SPECS[model].vae)), folder)
    onnx.checker.check_model(path, full_check=True)
    return onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph


@every_graph
@pytest.mark.parametrize("compute", [FLOAT, BFLOAT16, FLOAT16], ids=["fp32", "bf16", "fp16"])
def test_convolutions_compute_in_the_type_asked_for_and_norms_in_float32(model, half, first, compute, tmp_path):
    made = checked(graph(model, half, first, compute), model, tmp_path)
    types = {v.name: v.type.tensor_type.elem_type for v in [*made.value_info, *made.input, *made.output]}
    types |= {v.name: v.data_type for v in made.initializer}
    found = {op: {types[n.input[0]] for n in made.node if n.op_type == op} for op in ("Conv", "MatMul", "ReduceSum")}
    assert found == {"Conv": {ELEMENT[compute]}, "MatMul": {ELEMENT[compute]}, "ReduceSum": {ELEMENT[FLOAT]}}
    assert {types[n.input[0]] for n in made.node if n.op_type in ("Softmax", "Sigmoid")} == {ELEMENT[FLOAT]}
    caches = {v.name for v in [*made.input, *made.output] if "cache" in v.name}
    assert {types[v.name] for v in [*made.input, *made.output] if v.name not in caches} == {ELEMENT[FLOAT]}
    assert {types[name] for name in caches} == {ELEMENT[FLOAT16 if compute == FLOAT16 else FLOAT]}


@every_graph
def test_fixed_sizes_reach_every_edge(model, half, first, tmp_path):
    made = checked(graph(model, half, first, FLOAT, (4, 6)), model, tmp_path)
    sides = [[d.dim_value for d in v.type.tensor_type.shape.dim][3:] for v in [*made.input, *made.output]]
    assert all(rows * 6 == columns * 4 > 0 for rows, columns in sides)


@every_graph
def test_no_operator_that_tensorrt_runs_badly(model, half, first):
    nodes = list(graph(model, half, first).graph)
    assert not {node.op_type for node in nodes} & FORBIDDEN
    sizes_asked = sum(node.op_type == "Shape" for node in nodes)
    assert sizes_asked == (3 if half == "decoder" and first else 1)  # attention; the zeros of two time convolutions


@every_graph
def test_edges_are_named_and_sized_as_the_contract_says(model, half, first):
    spec = SPECS[model].vae
    inputs, outputs = graph(model, half, first).edges()
    caches = spec.decoder_caches if half == "decoder" else spec.encoder_caches
    pixels = (1, 3, 1 if first else 4, f"{spec.spatial_stride}*height", f"{spec.spatial_stride}*width")
    edges = {"latents": (1, spec.latent_channels, 1, "height", "width"), "frames": pixels}
    entering, leaving = ("latents", "frames") if half == "decoder" else ("frames", "latents")
    assert [(t.name, t.dims) for t in inputs[:1]] == [(entering, edges[entering])]
    assert [(t.name, t.dims) for t in outputs[:1]] == [(leaving, edges[leaving])]
    names = [f"cache_{index:02d}" for index in range(len(caches))]
    assert [t.name for t in inputs[1:]] == ([] if first else names)
    assert [t.name for t in outputs[1:]] == [f"next_{name}" for name in names]
    for tensor, cache in zip(outputs[1:], caches, strict=True):
        prefix = "" if cache.scale == 1 else f"{cache.scale}*"
        assert tensor.dims == (1, cache.channels, cache.frames, f"{prefix}height", f"{prefix}width")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("half", HALVES)
def test_a_new_cache_is_made_of_the_only_value_that_is_made_of_the_old_one(model, half):
    """Only then can an engine overwrite the old cache."""
    made = graph(model, half, False).graph
    readers = {value.name: [use.node for use in value.uses()] for value in made.inputs if value.name != "latents"}
    for value in made.outputs[1:]:
        joined = value.producer().inputs[0].producer()
        assert value.producer().op_type == "Slice"
        assert readers[value.name.removeprefix("next_")] == [joined]


@pytest.mark.parametrize("spec", [T2V_A14B.vae, TI2V_5B.vae], ids=["2.1", "2.2"])
@pytest.mark.parametrize("half", HALVES)
def test_both_graphs_declare_the_checkpoint_s_tensors(spec, half):
    """At full size: later chunks need all parameters of their half, the first all but the time convolutions."""
    first, later = (HALVES[half](spec, first).weights for first in (True, False))
    outer = {"decoder": "conv2.", "encoder": "conv1."}[half]
    expected = {k: v for k, v in vae_tensors(spec).items() if k.startswith((f"{half}.", outer))}
    assert {k: tuple(v.shape) for k, v in later.items()} == expected
    assert {k: tuple(v.shape) for k, v in first.items()} == {
        k: v for k, v in expected.items() if ".time_conv." not in k
    }


def test_nodes_carry_the_path_of_their_module():
    g = vae_decoder(TI2V_5B.vae, first=False)
    assert "decoder/upsamples.0.upsamples.3/time_conv/Conv" in {node.name for node in g.graph}


@pytest.mark.parametrize("write_graph", [vae_decoder, vae_encoder])
def test_widths_that_its_shortcuts_cannot_join_are_refused(write_graph):
    spec = replace(TI2V_5B.vae, multipliers=(1, 4, 4, 4))
    if write_graph is vae_decoder:
        spec = replace(TI2V_5B.vae, multipliers=(1, 2, 2, 4))
    with pytest.raises(UserError, match="a VAE stage of"):
        write_graph(spec, first=False)
