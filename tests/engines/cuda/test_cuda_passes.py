"""Graphs for the CUDA provider compute what the exported ones compute, with its fused operators."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from engines.cuda.attention import fuse_attention
from engines.cuda.casts import drop_double_casts
from engines.cuda.passes import fit_transformer
from engines.cuda.skip_norm import fuse_skip_norms
from engines.cuda.squares import check_no_squares
from export.graphs.attention import attention
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16, GraphBuilder
from export.graphs.dit import dit_graph
from tests.engines.cpu.graphs import inputs, kinds, run
from wan22.errors import UserError
from wan22.specs import SPECS

MODELS = ("t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny")


def transformer(spec, compute):
    """A transformer with synthetic weights of the types that an export stores."""
    g, rng = dit_graph(spec, compute), np.random.default_rng(0)
    for key, value in g.weights.items():
        array = rng.standard_normal(tuple(value.shape), dtype=np.float32) * (1 if "norm" in key else 0.05)
        value.const_value = ir.tensor(array.astype(value.dtype.numpy()), dtype=value.dtype, name=key)
    return ir.Model(g.graph, ir_version=11)


def spec_of(name):
    return replace(SPECS[name].dit, layers=2)


def relative_l2(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_in_16_bits_is_as_near_to_float32_as_the_exported_one(name):
    spec = spec_of(name)
    half, given = transformer(spec, FLOAT16), inputs(spec)
    exact, exported = run(transformer(spec, FLOAT), given), run(half, given)
    fit_transformer(half, spec)
    fitted = run(half, given)
    assert relative_l2(fitted, exact) < 1.1 * relative_l2(exported, exact)
    assert 0 < relative_l2(fitted, exported) < relative_l2(exported, exact)


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_computes_the_same_on_the_operators_cpu_kernels(name):
    spec = spec_of(name)
    model = transformer(spec, FLOAT)
    before, given = len(kinds(model)), inputs(spec)
    expected = run(model, given)
    fit_transformer(model, spec)
    found = kinds(model)
    assert found.count("Attention") == 2 * spec.layers
    assert found.count("RotaryEmbedding") == 2 * spec.layers
    assert found.count("RMSNormalization") == 4 * spec.layers
    assert found.count("SkipLayerNormalization") == 3 * spec.layers
    assert not {"Softmax", "Conv"} & set(found)
    assert len(found) < 0.8 * before
    assert relative_l2(run(model, given), expected) < 1e-6


def test_attention_in_bfloat16_equals_the_operators_reference():
    """ONNX Runtime has no bfloat16 kernels on the CPU, so ONNX's own reference evaluates both graphs."""
    heads, head = 2, 16
    g = GraphBuilder("attention")
    q, k, v = (g.input(name, FLOAT, [f"{name}_rows" if name == "q" else "rows", heads, head]) for name in "qkv")
    g.output("y", g.cast(attention(g, BFLOAT16, q, k, v), FLOAT), ["q_rows", heads, head])
    rng = np.random.default_rng(0)
    given = {
        n: rng.standard_normal((rows, heads, head), dtype=np.float32) for n, rows in (("q", 9), ("k", 5), ("v", 5))
    }
    model = ir.Model(g.graph, ir_version=11)
    expected = evaluated(model, given)
    assert fuse_attention(model, heads, head) == 1
    (fused,) = (node for node in model.graph if node.op_type == "Attention")
    assert {name: value.value for name, value in fused.attributes.items()} == {
        "q_num_heads": heads,
        "kv_num_heads": heads,
        "scale": 1.0,
    }
    assert relative_l2(evaluated(model, given), expected) < 0.01  # 8 bits


def evaluated(model, given):
    return ReferenceEvaluator(ir.to_proto(model)).run(None, given)[0]


def test_v_is_never_widened_and_q_and_k_are_normalised_in_float32():
    model = transformer(spec_of(MODELS[0]), BFLOAT16)
    fit_transformer(model, spec_of(MODELS[0]))
    for node in model.graph:
        if node.op_type == "Attention":
            above = [_above_reshapes(value) for value in node.inputs]
            assert [producer.op_type for producer in above] == ["Cast", "Cast", "Gemm"]
        if node.op_type in ("RMSNormalization", "RotaryEmbedding", "LayerNormalization", "SkipLayerNormalization"):
            kinds_above = {_above_reshapes(value).op_type for value in node.inputs[:1] if value.producer()}
            assert "Gemm" not in kinds_above, f"{node.name} reads 16 bits"


def _above_reshapes(value):
    node = value.producer()
    while node.op_type == "Reshape" and node.inputs[0].producer() is not None:
        node = node.inputs[0].producer()
    return node


def test_a_cast_that_loses_bits_stays():
    g = GraphBuilder("casts")
    x = g.input("x", FLOAT, [4])
    g.output("y", g.cast(g.cast(g.cast(x, FLOAT16), FLOAT), BFLOAT16), [4], BFLOAT16)
    model = ir.Model(g.graph, ir_version=11)
    assert drop_double_casts(model) == 0


def test_a_sum_over_other_axes_than_the_last_is_not_fused():
    g = GraphBuilder("norm")
    a, b = (g.input(name, FLOAT, [2, 3, 4]) for name in "ab")
    g.output("y", g.op("LayerNormalization", g.add(a, b), g.constant(np.ones((3, 4)), FLOAT), axis=1), [2, 3, 4])
    assert fuse_skip_norms(ir.Model(g.graph, ir_version=11)) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_matrix_of_tokens_by_tokens_is_refused_with_its_node(name):
    model = transformer(spec_of(name), BFLOAT16)
    with pytest.raises(UserError, match=r"dit: MatMul blocks.0/self_attn/MatMul makes a matrix of tokens by tokens"):
        check_no_squares(model, "dit")


def test_attention_of_an_unknown_form_is_refused_not_run_slowly():
    spec = spec_of(MODELS[0])
    model = transformer(spec, BFLOAT16)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    users = list(softmax.outputs[0].uses())
    scaled = ir.node("Mul", [softmax.outputs[0], softmax.outputs[0]])
    model.graph.insert_after(softmax, scaled)
    for use in users:
        use.node.replace_input_with(use.idx, scaled.outputs[0])
    with pytest.raises(UserError, match="tokens by tokens"):
        fit_transformer(model, spec)
