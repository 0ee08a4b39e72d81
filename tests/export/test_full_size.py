"""Graphs of the real models, without a weight: parameters of wan22.md §1.2, arithmetic of §2.8, seconds to write."""

import time
from math import prod

import onnx
import onnx_ir as ir
import pytest

from export.graphs.builder import BFLOAT16, FLOAT
from export.graphs.dit import LatentDims, dit_graph
from export.graphs.linear import Quantised
from export.graphs.text_encoder import text_encoder_graph
from export.graphs.vae_decoder import vae_decoder
from export.graphs.vae_encoder import vae_encoder
from export.graphs.weights_file import declare_weights, placements
from wan22.specs import I2V_A14B, T2V_A14B, TI2V_5B

DITS = [(T2V_A14B, 14_288_491_584), (I2V_A14B, 14_288_901_184), (TI2V_5B, 4_999_787_712)]
PRECISIONS = {"bf16": None, "fp8": Quantised(), "fp8-attn": Quantised(self_attention=True, cross_attention=True)}


def parameters(*graphs):
    weights = declare_weights(graphs)
    return sum(prod(w.shape) for key, w in weights.items() if not key.endswith("_scale"))


@pytest.mark.parametrize(("spec", "count"), DITS, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_transformer_has_its_parameters_and_is_written_in_seconds(tmp_path, spec, count, precision):
    started = time.perf_counter()
    graph = dit_graph(spec.dit, BFLOAT16, None, PRECISIONS[precision])
    graph.bind(placements("dit.safetensors", declare_weights([graph])), tmp_path)
    graph.save(tmp_path / "dit.onnx")
    assert parameters(graph) == count
    assert time.perf_counter() - started < 60
    assert (tmp_path / "dit.onnx").stat().st_size < 10e6


def test_the_other_parts_have_their_parameters():
    assert parameters(text_encoder_graph(T2V_A14B.text_encoder, BFLOAT16)) == 5_680_910_336
    for spec, decoder, encoder in ((T2V_A14B, 73_295_331, 53_595_872), (TI2V_5B, 555_049_228, 149_627_776)):
        z = spec.vae.latent_channels
        halves = {"decoder": z * (z + 1), "encoder": 2 * z * (2 * z + 1)}  # with the convolution at the latent
        assert parameters(vae_decoder(spec.vae, True, FLOAT), vae_decoder(spec.vae, False, FLOAT)) == (
            decoder + halves["decoder"]
        )
        assert parameters(vae_encoder(spec.vae, True, FLOAT), vae_encoder(spec.vae, False, FLOAT)) == (
            encoder + halves["encoder"]
        )


@pytest.mark.parametrize(
    ("spec", "video", "petaflops"),
    [
        (T2V_A14B, (1280, 720, 81), 6.523),
        (T2V_A14B, (832, 480, 81), 1.678),
        (I2V_A14B, (1280, 720, 81), 6.523),
        (TI2V_5B, (1280, 704, 121), 0.517),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_arithmetic_of_a_graph_is_the_models(spec, video, petaflops):
    dims = LatentDims(*spec.latent_shape(*video)[-3:])
    assert flops(dit_graph(spec.dit, BFLOAT16, dims)) == pytest.approx(petaflops * 1e15, rel=2e-3)


def flops(graph):
    """Of every matrix multiplication of a graph of fixed shapes, two for each multiplication with its addition."""
    for key, value in graph.weights.items():  # shape inference wants values or inputs
        del graph.graph.initializers[key]
        graph.graph.inputs.append(value)
    model = onnx.shape_inference.infer_shapes(ir.to_proto(ir.Model(graph.graph, ir_version=11)), data_prop=True)
    products = [node for node in ir.from_proto(model).graph if node.op_type in ("MatMul", "Gemm")]
    return sum(2 * prod(node.outputs[0].shape) * node.inputs[0].shape[-1] for node in products)
