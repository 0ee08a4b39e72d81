"""q and k of self-attention get separate linears, norms and rotations with the same result."""

import numpy as np

from engines.cpu.rotary import split_qkv
from tests.engines.cpu.graphs import SPEC, inputs, kinds, run, transformer


def test_the_joint_linear_becomes_three_and_nothing_is_copied_out_of_it():
    model = transformer()
    before, gemms = run(model, inputs()), kinds(model).count("Gemm")
    assert split_qkv(model, SPEC.heads, SPEC.head_width) == 1
    assert kinds(model).count("Gemm") == gemms + 2
    assert kinds(model).count("RotaryEmbedding") == kinds(model).count("RMSNormalization") == 2
    assert "Slice" not in kinds(model)
    assert np.abs(run(model, inputs()) - before).max() < 2e-6 * np.abs(before).max()


def test_a_rotation_of_another_form_is_left_alone():
    model = transformer()
    subtracted = next(node for node in model.graph if node.op_type == "Sub")
    subtracted.op_type = "Add"  # a·cos + b·sin
    before = kinds(model)
    assert split_qkv(model, SPEC.heads, SPEC.head_width) == 0
    assert kinds(model) == before
