"""ONNX Runtime gets its fused attention operator, and computes the same with it."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from engines.cpu.attention import fuse_attention
from export.graphs.attention import attention
from export.graphs.builder import FLOAT, GraphBuilder
from wan22.bundle import open_bundle

HEADS, HEAD = 2, 16


def attention_graph(path, *, extra_reader=False):
    """Attention of q over a shorter text, in the form of the transformer's blocks."""
    g = GraphBuilder("attention")
    q, k, v = (g.input(name, FLOAT, [f"{name}_tokens" if name == "q" else "s", HEADS, HEAD]) for name in "qkv")
    g.output("y", attention(g, FLOAT, q, k, v), ["q_tokens", HEADS, HEAD])
    if extra_reader:
        probabilities = next(node for node in g.graph if node.op_type == "Softmax").outputs[0]
        g.output("p", g.mul(probabilities, g.constant(1.0, FLOAT)), [1, HEADS, "q_tokens", "s"])
    g.save(path)
    return ir.load(path)


def run(path, inputs):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def test_the_fused_operator_computes_the_same(tmp_path):
    rng = np.random.default_rng(0)
    inputs = {
        n: rng.standard_normal((s, HEADS, HEAD), dtype=np.float32) for n, s in zip("qkv", (70, 33, 33), strict=True)
    }
    model = attention_graph(tmp_path / "a.onnx")
    assert fuse_attention(model, HEADS, HEAD) == 1
    ir.save(model, tmp_path / "b.onnx")
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["Reshape", "Reshape", "Reshape", "MultiHeadAttention", "Reshape"]
    assert np.abs(run(tmp_path / "a.onnx", inputs) - run(tmp_path / "b.onnx", inputs)).max() < 2e-6


def test_attention_whose_probabilities_are_read_elsewhere_is_left_alone(tmp_path):
    model = attention_graph(tmp_path / "a.onnx", extra_reader=True)
    before = [node.op_type for node in model.graph]
    assert fuse_attention(model, HEADS, HEAD) == 0
    assert [node.op_type for node in model.graph] == before
    assert "com.microsoft" not in model.opset_imports


def test_every_attention_of_the_experts_is_fused_and_the_onnx_bundle_untouched(tiny_bundle, tiny_engines):
    layers = open_bundle(tiny_bundle, "graphs", full_check=True).manifest.spec.dit.layers
    for expert in ("high_noise", "low_noise"):
        exported, engine = (
            onnx.load(f / f"{expert}.onnx", load_external_data=False) for f in (tiny_bundle, tiny_engines)
        )
        fused = [node for node in ir.from_proto(engine).graph.all_nodes() if node.op_type == "MultiHeadAttention"]
        assert len(fused) == 2 * layers
        assert not [node for node in exported.graph.node if node.domain]
