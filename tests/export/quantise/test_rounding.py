"""FP8 codes that are rounded for the inputs of their linear, against the slow formula."""

import ml_dtypes
import numpy as np
import pytest

from export.quantise.rounding import compensated, rounded, row_scales
from wan22.precision import Number


def slowly(matrix, scales, covariance):
    """Codes, column by column, with the inverse of what is left of the covariance in every step."""
    weight, entering = matrix.astype(np.float64), matrix.shape[1]
    damped = covariance + 0.01 * np.trace(covariance) / entering * np.eye(entering)
    codes = np.zeros(matrix.shape, ml_dtypes.float8_e4m3fn)
    for j in range(entering):
        inverse = np.linalg.inv(damped[j:, j:])
        codes[:, j] = np.clip(weight[:, j] / scales, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        error = weight[:, j] - codes[:, j].astype(np.float64) * scales
        weight[:, j:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400, 12)) @ rng.standard_normal((12, 160)) + 0.3 * rng.standard_normal((400, 160))
    return (0.05 * rng.standard_normal((24, 160))).astype(np.float32), inputs.astype(np.float32)


def test_later_columns_make_up_for_errors_as_in_the_slow_formula(layer):
    matrix, inputs = layer
    scales = row_scales("w", matrix, None, 448.0)
    expected = slowly(matrix, scales.astype(np.float64), inputs.T.astype(np.float64) @ inputs / len(inputs))
    found = compensated(matrix, scales, inputs)
    assert (found.view(np.uint8) == expected.view(np.uint8)).mean() > 0.98  # a tie may fall to the other side
    nearest = np.concatenate(list(rounded(matrix, scales, None, Number.FP8))).reshape(matrix.shape)

    def error(codes):
        made = codes.astype(np.float32) * scales[:, None]
        return np.linalg.norm(inputs @ (made - matrix).T) / np.linalg.norm(inputs @ matrix.T)

    assert error(found) < 0.6 * error(nearest)


def test_without_inputs_the_codes_are_the_nearest(layer):
    matrix, inputs = layer
    scales = row_scales("w", matrix, None, 448.0)
    found = compensated(matrix, scales, inputs[:0])
    nearest = np.concatenate(list(rounded(matrix, scales, None, Number.FP8))).reshape(matrix.shape)
    assert np.array_equal(found.view(np.uint8), nearest.view(np.uint8))
