"""NVFP4: nearest codes, halves to even, and errors made up for by later columns, against slow formulas."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch

from export.quantise.nvfp4 import GROUP, SCALES_TRIED, _nearest, compensated, quantise

E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def nearest(value, step):
    """The code by ml_dtypes' own rounding."""
    scaled = np.float32(value) / np.float32(step) if step > 0 else np.float32(0)
    return int(np.asarray(scaled).astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def best_scale(group, row, importance):
    best = (np.inf, None)
    for multiple in SCALES_TRIED:
        scale = np.float32(multiple) * (np.abs(group).max() / np.float32(6 * row))
        scale = np.asarray(min(scale, np.float32(448))).astype(ml_dtypes.float8_e4m3fn)
        step = np.float32(scale) * row
        error = sum(w * (E2M1[nearest(x, step)] * step - x) ** 2 for x, w in zip(group, importance, strict=True))
        if error < best[0]:
            best = (error, scale)
    return best[1]


def slowly(matrix, covariance):
    """Codes and block scales, column by column, with the inverse of what is left of the covariance in every step."""
    weight, (leaving, entering) = matrix.astype(np.float64).copy(), matrix.shape
    damped = covariance + 0.01 * np.trace(covariance) / entering * np.eye(entering)
    inverses = [np.linalg.inv(damped[j:, j:]) for j in range(entering)]
    rows = (np.abs(matrix).max(1) / np.float32(2688)).astype(np.float32)
    codes = np.zeros(matrix.shape, np.uint8)
    scales = np.zeros((leaving, entering // GROUP), ml_dtypes.float8_e4m3fn)
    for j in range(entering):
        if j % GROUP == 0:
            importance = [1 / inverses[k][0, 0] for k in range(j, j + GROUP)]
            for i in range(leaving):
                scales[i, j // GROUP] = best_scale(weight[i, j : j + GROUP].astype(np.float32), rows[i], importance)
        for i in range(leaving):
            step = np.float32(scales[i, j // GROUP]) * rows[i]
            codes[i, j] = nearest(weight[i, j], step)
            error = weight[i, j] - E2M1[codes[i, j]] * step
            weight[i, j:] -= error * inverses[j][0] / inverses[j][0, 0]
    return codes, scales


def unpacked(found):
    return np.stack((found.codes & 15, found.codes >> 4), -1).reshape(len(found.codes), -1)


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400, 12)) @ rng.standard_normal((12, 160)) + 0.3 * rng.standard_normal((400, 160))
    return (0.05 * rng.standard_normal((24, 160))).astype(np.float32), inputs.astype(np.float32)


def test_a_matrix_is_its_nearest_codes(layer):
    matrix, _ = layer
    matrix[3], matrix[4, :32] = 0, 0
    found = quantise(matrix)
    for i, row in enumerate(matrix):
        for group in range(len(row) // GROUP):
            part = row[group * GROUP : (group + 1) * GROUP]
            scale = best_scale(part, found.rows[i], [1.0] * GROUP)
            assert found.groups[i, group].view(np.uint8) == scale.view(np.uint8)
            codes = [nearest(x, np.float32(scale) * found.rows[i]) for x in part]
            assert [c if c != 8 else 0 for c in unpacked(found)[i, group * GROUP : (group + 1) * GROUP]] == [
                c if c != 8 else 0 for c in codes
            ]
    steps = np.repeat(found.groups.astype(np.float64), GROUP, 1) * found.rows[:, None]
    assert np.allclose(found.decoded(), E2M1[unpacked(found)] * steps, rtol=1e-6)
    assert np.linalg.norm(found.decoded() - matrix) < 0.12 * np.linalg.norm(matrix)


def test_halves_round_to_the_even_code():
    halves = np.array([(a + b) / 2 for a, b in pairwise(E2M1[:8])], np.float32)
    found = _nearest(torch.from_numpy(np.concatenate([halves, -halves])), torch.ones(14))
    assert np.array_equal(E2M1[found.numpy()], [0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4])


def test_later_columns_make_up_for_errors_as_in_the_slow_formula(layer):
    matrix, inputs = layer
    covariance = inputs.T @ inputs / len(inputs)
    codes, scales = slowly(matrix, covariance.astype(np.float64))
    found = compensated(matrix, inputs)
    same = unpacked(found) == codes
    assert same.mean() > 0.99  # float32 here, float64 there: a tie may fall to the other side, and changes what follows
    assert (found.groups.view(np.uint8) == scales.view(np.uint8)).mean() > 0.99

    def error(rounded):
        return np.linalg.norm(inputs @ (rounded - matrix).T) / np.linalg.norm(inputs @ matrix.T)

    assert error(found.decoded()) < 0.6 * error(quantise(matrix).decoded())


def outer(made):
    """What the branch of ``made`` multiplies by, as its graph stores it."""
    stored = [part.astype(ml_dtypes.bfloat16).astype(np.float64) for part in (made.up, made.down)]
    return (stored[0] * made.rows[:, None]) @ stored[1]


@pytest.mark.parametrize("rank", [1, 16, 24])
def test_a_branch_has_the_largest_singular_vectors_and_the_codes_have_the_rest(layer, rank):
    matrix, inputs = layer
    rng = np.random.default_rng(1)
    matrix = matrix + (rng.standard_normal((24, 3)) @ rng.standard_normal((3, 160))).astype(np.float32)
    found, plain = compensated(matrix, inputs, rank), compensated(matrix, inputs)
    assert (found.up.shape, found.down.shape) == ((24, rank), (rank, 160))
    left = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[rank:]
    rest = np.linalg.norm(matrix - outer(found))
    assert rest <= 1.02 * np.linalg.norm(left) + 4e-3 * np.linalg.norm(matrix)  # of bfloat16
    errors = [found.decoded() + outer(found) - matrix, plain.decoded() - matrix]
    whole, without = (np.linalg.norm(error) for error in errors)
    assert whole < 0.25 * rest + 4e-3 * np.linalg.norm(matrix)
    of_products = [np.linalg.norm(inputs @ error.T) for error in errors]
    assert of_products[0] < (0.9 if rank == 1 else 0.2) * of_products[1]
    assert whole < (0.9 if rank == 1 else 0.2) * without


def test_a_branch_has_the_same_bytes_every_time_and_zeros_stay_zeros(layer):
    matrix, inputs = layer
    first, second = (compensated(matrix, inputs, 16) for _ in range(2))
    for leaf in ("codes", "groups", "rows", "up", "down"):
        assert getattr(first, leaf).tobytes() == getattr(second, leaf).tobytes(), leaf
    nothing = compensated(np.zeros_like(matrix), inputs, 16)
    assert not nothing.decoded().any()
    assert not outer(nothing).any()
    assert np.isfinite(nothing.down).all()
