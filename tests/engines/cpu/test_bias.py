"""Biases are added behind the products, by the activation where there is one, and the velocity is the same."""

import numpy as np

from engines.cpu.bias import separate_biases
from tests.engines.cpu.graphs import inputs, kinds, run, transformer


def test_every_bias_leaves_its_product_and_gelu_takes_one_along():
    model = transformer()
    before, gelus = run(model, inputs()), kinds(model).count("Gelu")
    linears = kinds(model).count("Gemm")
    assert separate_biases(model) == kinds(model).count("FusedMatMul") == linears
    assert kinds(model).count("FastGelu") == gelus > 0
    assert not {"Gemm", "Gelu"} & set(kinds(model))
    assert np.abs(run(model, inputs()) - before).max() < 2e-6 * np.abs(before).max()
