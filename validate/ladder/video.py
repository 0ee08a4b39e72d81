"""The rungs of the final video; each side makes its own from prompt to pixels."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from validate.ladder import thresholds
from validate.ladder.comparison import Comparison
from validate.ladder.metrics import (
    FRAME_RANGE,
    SMALLEST_SIDE,
    Metrics,
    compare,
    compare_changes,
    difference_per_frame,
    incomparable,
    lpips_per_frame,
    single_metric,
    ssim_per_frame,
    why_no_lpips,
)
from validate.ladder.row import Row
from validate.ladder.thresholds import Limit
from validate.reference.parts import F32

SSIM_WINDOW = 7  # minimum of height and width, in pixels


def frames(comparison: Comparison) -> Iterator[Row]:
    limit, ours, theirs = comparison.limits["run"].frames, comparison.our_frames, comparison.reference_frames
    if ours is None:
        yield _stopped_row("frames, end to end", comparison, limit)
        return
    metrics = compare(ours, theirs, signal_range=FRAME_RANGE)
    note = "" if metrics.problem else f"worst frame: {int(np.argmax(difference_per_frame(ours, theirs))) + 1}"
    low = comparison.in_precision("run", (ours, theirs), lambda _: comparison.lowered_frames, FRAME_RANGE)
    yield Row("frames, end to end", "video", metrics, limit, note, in_precision=low)


def structure(comparison: Comparison) -> Iterator[Row]:
    name, limit, ours, theirs = "SSIM of the worst frame", comparison.limits["run"].ssim, *_videos(comparison)
    if ours is None:
        yield _stopped_row(name, comparison, limit)
    elif problem := compare(ours, theirs).problem:
        yield Row(name, "video", incomparable(problem), limit)
    elif min(theirs.shape[3:]) >= SSIM_WINDOW:
        metrics, note = _worst("ssim", ssim_per_frame(ours, theirs))
        if comparison.lowered is not None:
            note += f"; {min(ssim_per_frame(comparison.lowered_frames, theirs)):.4f} for PyTorch in that precision"
        yield Row(name, "video", metrics, limit, note)


def changes(comparison: Comparison) -> Iterator[Row]:
    name, limit, ours, theirs = "change from frame to frame", comparison.limits["run"].changes, *_videos(comparison)
    if ours is None:
        yield _stopped_row(name, comparison, limit)
    elif theirs.shape[2] > 1:
        yield Row(name, "video", compare_changes(ours, theirs), limit, "the difference of neighbouring frames")


def perception(comparison: Comparison) -> Iterator[Row]:
    """Compare LPIPS if its package is installed; otherwise the report says why it is missing."""
    ours, theirs = _videos(comparison)
    if ours is None or compare(ours, theirs).problem or min(theirs.shape[3:]) < SMALLEST_SIDE:
        return
    if not why_no_lpips():
        metrics, note = _worst("lpips", lpips_per_frame(ours, theirs))
        yield Row("LPIPS of the worst frame", "video", metrics, thresholds.LPIPS, note)


def _videos(comparison: Comparison) -> tuple[F32 | None, F32]:
    return comparison.our_frames, comparison.reference_frames


def _stopped_row(name: str, comparison: Comparison, limit: Limit) -> Row:
    return Row(name, "video", incomparable(comparison.stop_reason), limit)


def _worst(measure: Literal["ssim", "lpips"], values: list[float]) -> tuple[Metrics, str]:
    """The metrics of the worst frame, and a note. A NaN is the worst."""
    worst = int(np.argmax(values) if measure == "lpips" else np.argmin(values))
    return single_metric(measure, values[worst]), f"frame {worst + 1}, mean {np.mean(values):.6f}"
