"""Norms of cross-attention become one ONNX Runtime operator with the same result."""

import numpy as np

from engines.cpu.rms_norm import fuse_rms_norms
from tests.engines.cpu.graphs import inputs, kinds, run, transformer


def test_q_and_k_of_cross_attention_are_normed_in_one_operator_each():
    model = transformer()
    before = run(model, inputs())
    assert fuse_rms_norms(model) == 2
    assert kinds(model).count("RMSNormalization") == 2
    assert kinds(model).count("Reciprocal") == 1  # of self-attention, whose norms are joined
    assert np.abs(run(model, inputs()) - before).max() < 2e-6 * np.abs(before).max()
