"""Biases are added after the products, if possible by the activation or another linear; the velocity is the same."""

import numpy as np

from engines.cpu.attention import fuse_attention
from engines.cpu.bias import forward_value_biases, separate_biases
from engines.cpu.rotary import split_qkv
from tests.engines.cpu.graphs import SPEC, inputs, kinds, run, transformer

SPLIT = (SPEC.heads, SPEC.head_width)


def same(model, before):
    return np.abs(run(model, inputs()) - before).max() < 2e-6 * np.abs(before).max()


def test_every_bias_leaves_its_product_and_gelu_takes_one_along():
    model = transformer()
    before, gelus = run(model, inputs()), kinds(model).count("Gelu")
    linears = kinds(model).count("Gemm")
    assert separate_biases(model) == kinds(model).count("FusedMatMul") == linears
    assert kinds(model).count("FastGelu") == gelus > 0
    assert not {"Gemm", "Gelu"} & set(kinds(model))
    assert same(model, before)


def fused():
    model = transformer()
    split_qkv(model, *SPLIT)
    fuse_attention(model, *SPLIT)
    return model


def biases_added(model):
    return [node.inputs[1].name for node in model.graph if node.op_type == "Add"]


def test_the_bias_of_the_values_is_added_by_the_linear_behind_self_attention():
    model = fused()
    before = run(model, inputs())
    assert forward_value_biases(model) == SPEC.layers
    assert same(model, before)
    separate_biases(model)
    assert same(model, before)
    assert not [name for name in biases_added(model) if name.endswith("self_attn.v.bias")]
    assert [name for name in biases_added(model) if name.endswith("cross_attn.v.bias")]


def test_nothing_is_moved_where_attention_is_not_fused():
    model = transformer()
    assert forward_value_biases(model) == 0
