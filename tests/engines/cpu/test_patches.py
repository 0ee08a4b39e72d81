"""The patch embedding becomes a matrix product for any number of channels, and the velocity is the same."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from engines.cpu.patches import multiply_patches, patches_of
from tests.engines.cpu.graphs import SPEC, inputs, kinds, run, transformer
from wan22.specs import SPECS


@pytest.mark.parametrize("model", ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_a_product_takes_the_place_of_the_convolution(model):
    spec = replace(SPECS[model].dit, layers=1)
    plain, fitted = transformer(spec), transformer(spec)
    assert multiply_patches(fitted) == 1
    assert "Conv" not in kinds(fitted)
    given = inputs(spec)
    expected = run(plain, given)
    assert np.abs(run(fitted, given) - expected).max() < 2e-6 * np.abs(expected).max()


def test_the_rows_of_pixels_are_found_again():
    model = transformer()
    assert patches_of(model.graph) is None
    multiply_patches(model)
    assert patches_of(model.graph).outputs[0].uses()[0].node.op_type == "Gemm"


@pytest.mark.parametrize(
    "changed", [{"strides": [1, 1, 1]}, {"pads": [0, 1, 1, 0, 1, 1]}, {"dilations": [1, 2, 2]}], ids=str
)
def test_a_convolution_whose_kernels_are_no_patches_is_left_alone(changed):
    model = transformer(SPEC)
    (conv,) = [node for node in model.graph if node.op_type == "Conv"]
    for name, value in changed.items():
        conv.attributes[name] = ir.AttrInt64s(name, value)
    assert multiply_patches(model) == 0
    assert "Conv" in kinds(model)
