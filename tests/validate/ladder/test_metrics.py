"""Metrics that decide a release: known values, and a NaN never passes."""

import math

import numpy as np
import pytest

from validate.ladder.metrics import FRAME_RANGE, SLICE_VALUES, compare, compare_changes, ssim_per_frame
from validate.ladder.thresholds import Limit


def test_known_values():
    metrics = compare([3.0, 4.0], [3.0, 0.0])
    assert metrics.max_abs == 4
    assert metrics.relative_l2 == pytest.approx(4 / 3)
    assert metrics.cosine == pytest.approx(3 / 5)
    assert metrics.psnr_db is None
    assert metrics.values == 2


def test_psnr_of_a_tenth_of_the_range_is_20_db():
    assert compare([0.2, 0.2], [0.0, 0.0], signal_range=FRAME_RANGE).psnr_db == pytest.approx(20)
    assert compare([0.5], [0.5], signal_range=FRAME_RANGE).psnr_db == math.inf


def test_zero_reference_is_equal_only_to_zero():
    assert compare(np.zeros(3), np.zeros(3)).relative_l2 == 0
    assert compare(np.zeros(3), np.zeros(3)).cosine == 1
    assert compare(np.full(3, 1e-30), np.zeros(3)).relative_l2 == math.inf
    assert compare(np.full(3, 1e-30), np.zeros(3)).cosine == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "limit", [Limit("max_abs", 1e9, ""), Limit("psnr_db", -1e9, ""), Limit("relative_l2", 1e9, "")]
)
def test_values_that_are_not_finite_never_pass(bad, limit):
    good, spoilt = np.zeros((2, 3)), np.zeros((2, 3))
    spoilt[1, 2] = bad
    for ours, reference in ((spoilt, good), (good, spoilt), (spoilt, spoilt)):
        metrics = compare(ours, reference, signal_range=FRAME_RANGE)
        assert not limit.accepts(metrics)
        assert "1 of 6 values are NaN or infinite, the first at [1, 2]" in metrics.problem


def test_shapes_that_differ_never_pass():
    metrics = compare([1, 2, 3], [1, 2])
    assert not Limit("max_abs", 0, "").accepts(metrics)
    assert metrics.problem == "shape [3] against [2]"
    assert not Limit("max_abs", 0, "").accepts(compare([], []))


def test_integers_compare_exactly():
    assert Limit("max_abs", 0, "").accepts(compare(np.array([2**40]), np.array([2**40])))
    assert not Limit("max_abs", 0, "").accepts(compare(np.array([2**40 + 1]), np.array([2**40])))


def test_slices_sum_to_the_full_tensor():
    values = np.ones(SLICE_VALUES + 5, np.float32)
    off = values.copy()
    off[-1] += 1
    metrics = compare(off, values)
    assert metrics.max_abs == 1
    assert metrics.relative_l2 == pytest.approx(1 / math.sqrt(values.size))


def video(values):
    """Frames ``[1, 3, F, 8, 8]``, each of one value."""
    return np.broadcast_to(np.float32(values)[None, None, :, None, None], (1, 3, len(values), 8, 8)).copy()


def test_flicker_shows_in_the_changes_and_a_constant_error_does_not():
    reference = video([0.0, 0.1, 0.2])
    assert compare_changes(video([0.3, 0.4, 0.5]), reference).max_abs < 1e-6
    assert compare_changes(video([0.1, 0.0, 0.3]), reference).psnr_db == pytest.approx(20)


def test_ssim_is_one_for_the_same_frame_and_falls_with_structure():
    rough = np.random.default_rng(0).uniform(-1, 1, (1, 3, 2, 16, 16)).astype(np.float32)
    other = rough.copy()
    other[:, :, 1] = other[:, :, 1, ::-1]
    same, turned = ssim_per_frame(other, rough)
    assert same == 1
    assert turned < 0.5
