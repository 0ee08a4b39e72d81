"""All passes together, on the transformer of every model: fused operators and the same velocity."""

from dataclasses import replace

import numpy as np
import pytest

from engines.cpu.passes import fit_transformer
from tests.engines.cpu.graphs import inputs, kinds, run, transformer
from wan22.specs import SPECS


@pytest.mark.parametrize("model", ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_every_model_computes_the_same_velocity(model):
    spec = replace(SPECS[model].dit, layers=1)
    plain, fitted = transformer(spec), transformer(spec)
    given = inputs(spec)
    fit_transformer(fitted, spec)
    expected = run(plain, given)
    assert np.linalg.norm(run(fitted, given) - expected) < 2e-6 * np.linalg.norm(expected)
    assert kinds(fitted).count("MultiHeadAttention") == kinds(fitted).count("RotaryEmbedding") == 2
    assert kinds(fitted).count("Softmax") == 1  # of cross-attention with a short prompt
    assert "Reciprocal" not in kinds(fitted)
