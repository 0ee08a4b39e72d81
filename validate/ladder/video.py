"""The rungs of the finished video, from prompt to pixels on both sides, each side on its own."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from validate.ladder import thresholds
from validate.ladder.comparison import Climb
from validate.ladder.metrics import (
    FRAME_RANGE,
    SMALLEST_SIDE,
    Metrics,
    compare,
    compare_changes,
    difference_per_frame,
    incomparable,
    lpips_per_frame,
    of_one_number,
    ssim_per_frame,
    why_no_lpips,
)
from validate.ladder.row import Row
from validate.ladder.thresholds import Limit
from validate.reference.parts import F32

SSIM_WINDOW = 7  # pixels that the smaller side must have


def frames(climb: Climb) -> Iterator[Row]:
    limit, ours, theirs = climb.limits["run"].frames, climb.our_frames, climb.reference_frames
    if ours is None:
        yield _stopped("frames, end to end", climb, limit)
        return
    metrics = compare(ours, theirs, signal_range=FRAME_RANGE)
    note = "" if metrics.problem else f"worst frame: {int(np.argmax(difference_per_frame(ours, theirs))) + 1}"
    low = climb.in_precision("run", (ours, theirs), lambda _: climb.lowered_frames, FRAME_RANGE)
    yield Row("frames, end to end", "video", metrics, limit, note, in_precision=low)


def structure(climb: Climb) -> Iterator[Row]:
    name, limit, ours, theirs = "SSIM of the worst frame", climb.limits["run"].ssim, *_videos(climb)
    if ours is None:
        yield _stopped(name, climb, limit)
    elif problem := compare(ours, theirs).problem:
        yield Row(name, "video", incomparable(problem), limit)
    elif min(theirs.shape[3:]) >= SSIM_WINDOW:
        metrics, note = _worst("ssim", ssim_per_frame(ours, theirs))
        if climb.lowered is not None:
            note += f"; {min(ssim_per_frame(climb.lowered_frames, theirs)):.4f} for PyTorch in that precision"
        yield Row(name, "video", metrics, limit, note)


def changes(climb: Climb) -> Iterator[Row]:
    name, limit, ours, theirs = "change from frame to frame", climb.limits["run"].changes, *_videos(climb)
    if ours is None:
        yield _stopped(name, climb, limit)
    elif theirs.shape[2] > 1:
        yield Row(name, "video", compare_changes(ours, theirs), limit, "the difference of neighbouring frames")


def perception(climb: Climb) -> Iterator[Row]:
    """Where the package for it is installed; where it is not, the report says so."""
    ours, theirs = _videos(climb)
    if ours is None or compare(ours, theirs).problem or min(theirs.shape[3:]) < SMALLEST_SIDE:
        return
    if not why_no_lpips():
        metrics, note = _worst("lpips", lpips_per_frame(ours, theirs))
        yield Row("LPIPS of the worst frame", "video", metrics, thresholds.LPIPS, note)


def _videos(climb: Climb) -> tuple[F32 | None, F32]:
    return climb.our_frames, climb.reference_frames


def _stopped(name: str, climb: Climb, limit: Limit) -> Row:
    return Row(name, "video", incomparable(climb.stopped), limit)


def _worst(measure: Literal["ssim", "lpips"], values: list[float]) -> tuple[Metrics, str]:
    """A NaN is the worst of all."""
    worst = int(np.argmax(values) if measure == "lpips" else np.argmin(values))
    return of_one_number(measure, values[worst]), f"frame {worst + 1}, mean {np.mean(values):.6f}"
