"""Distances between two tensors. Sums run in float64 over slices, so a 720p video needs no second copy.

If either side has a value that is not finite, or the shapes differ, every metric is NaN, and NaN satisfies no limit.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

SLICE_VALUES = 2**22
FRAME_RANGE = 2.0  # frames lie in [-1, 1]
PACKAGE = "lpips"
SMALLEST_SIDE = 31  # pixels that the smaller side must have for AlexNet's layers


@dataclass(frozen=True)
class Metrics:
    """Distance of ``ours`` from ``reference``. If they cannot be compared, all are NaN and ``problem`` says why."""

    max_abs: float
    relative_l2: float  # ‖ours − reference‖ / ‖reference‖; against an all-zero reference 0 or inf
    cosine: float  # 1 for two all-zero tensors, 0 when only one is
    psnr_db: float | None  # None without a signal range; inf for identical tensors
    values: int
    problem: str = ""
    excess: float | None = None  # our error over the reference's error in the same precision
    ssim: float | None = None  # structural similarity of the worst frame, 1 for the same picture
    lpips: float | None = None  # perceptual distance of the worst frame, 0 for the same picture


@dataclass
class _Sums:
    max_abs: float = 0.0
    error: float = 0.0
    reference: float = 0.0
    ours: float = 0.0
    product: float = 0.0

    def add(self, ours: NDArray[np.float64], reference: NDArray[np.float64]) -> None:
        error = ours - reference
        self.max_abs = max(self.max_abs, float(np.abs(error).max()))
        self.error += float(error @ error)
        self.reference += float(reference @ reference)
        self.ours += float(ours @ ours)
        self.product += float(ours @ reference)


def compare(ours: ArrayLike, reference: ArrayLike, *, signal_range: float | None = None) -> Metrics:
    """Compare two tensors of the same shape and any real dtype.

    ``signal_range`` is the width of the interval of possible values (``FRAME_RANGE``). It is needed for the PSNR.
    """
    a, b = np.asarray(ours), np.asarray(reference)
    if problem := _problem(a, b):
        return incomparable(problem)
    sums = _Sums()
    for piece, other in zip(_slices(a), _slices(b), strict=True):
        sums.add(piece, other)
    psnr = None if signal_range is None else _psnr_db(sums.error / a.size, signal_range)
    return Metrics(sums.max_abs, _relative(sums), _cosine(sums), psnr, a.size)


def compare_changes(ours: NDArray[np.float32], reference: NDArray[np.float32]) -> Metrics:
    """Compare the changes from frame to frame in two videos ``[1, 3, F, H, W]``, F > 1. They reveal flicker."""
    if problem := _problem(ours, reference):
        return incomparable(problem)
    sums = _Sums()
    for frame in range(1, ours.shape[2]):
        sums.add(*(_slice(side[:, :, frame]) - _slice(side[:, :, frame - 1]) for side in (ours, reference)))
    values = ours[:, :, 1:].size
    return Metrics(sums.max_abs, _relative(sums), _cosine(sums), _psnr_db(sums.error / values, FRAME_RANGE), values)


def incomparable(problem: str) -> Metrics:
    """Metrics for tensors that are missing or cannot be compared; no limit accepts them."""
    return Metrics(math.nan, math.nan, math.nan, None, 0, problem)


def single_metric(measure: Literal["excess", "ssim", "lpips"], value: float) -> Metrics:
    """Metrics with a value for ``measure`` only."""
    return Metrics(math.nan, math.nan, math.nan, None, 0, "", **{measure: value})


def ssim_per_frame(ours: NDArray[np.float32], reference: NDArray[np.float32]) -> list[float]:
    """Structural similarity of every frame of two videos ``[1, 3, F, H, W]`` (Wang et al. 2004)."""
    from skimage.metrics import structural_similarity

    return [
        float(structural_similarity(ours[0, :, i], reference[0, :, i], channel_axis=0, data_range=FRAME_RANGE))
        for i in range(ours.shape[2])
    ]


def difference_per_frame(ours: NDArray[np.float32], reference: NDArray[np.float32]) -> list[float]:
    """Largest absolute difference of every frame of two videos ``[1, 3, F, H, W]``."""
    return [float(np.abs(ours[:, :, i] - reference[:, :, i]).max()) for i in range(ours.shape[2])]


def _problem(ours: NDArray[np.generic], reference: NDArray[np.generic]) -> str:
    if ours.shape != reference.shape:
        return f"shape {list(ours.shape)} against {list(reference.shape)}"
    if ours.size == 0:
        return f"no values: shape {list(ours.shape)}"
    sides = (("ours", ours), ("reference", reference))
    return "; ".join(found for side, array in sides if (found := _not_finite(side, array)))


def _not_finite(side: str, array: NDArray[np.generic]) -> str:
    if not np.issubdtype(array.dtype, np.inexact):
        return ""
    bad = ~np.isfinite(array.astype(np.float64, copy=False))
    if not bad.any():
        return ""
    first = [int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape)]
    return f"{side}: {int(bad.sum())} of {bad.size} values are NaN or infinite, the first at {first}"


def _slices(array: NDArray[np.generic]) -> Iterator[NDArray[np.float64]]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, SLICE_VALUES):
        yield flat[start : start + SLICE_VALUES].astype(np.float64)


def _slice(array: NDArray[np.float32]) -> NDArray[np.float64]:
    return array.reshape(-1).astype(np.float64)


def _relative(sums: _Sums) -> float:
    if sums.reference == 0:
        return 0.0 if sums.error == 0 else math.inf
    return math.sqrt(sums.error / sums.reference)


def _cosine(sums: _Sums) -> float:
    if sums.ours == 0 or sums.reference == 0:
        return 1.0 if sums.ours == sums.reference else 0.0
    return sums.product / math.sqrt(sums.ours) / math.sqrt(sums.reference)


def _psnr_db(mean_square: float, signal_range: float) -> float:
    return math.inf if mean_square == 0 else 10 * math.log10(signal_range**2 / mean_square)


# -- LPIPS, which needs an optional package


@cache
def why_no_lpips() -> str:
    """The reason why LPIPS cannot be measured; empty if it can."""
    if find_spec(PACKAGE) is None:
        return f"not measured: package {PACKAGE} is not installed"
    try:
        _network()
    except Exception as error:  # offline or another torchvision: the rest of the report works without LPIPS
        return f"not measured: the network of package {PACKAGE} cannot be loaded ({' '.join(str(error).split())})"
    return ""


@cache
def _network() -> Any:
    """AlexNet with the published weights, which the package downloads on first use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns of the deprecated way in which the package loads weights
        return import_module(PACKAGE).LPIPS(net="alex", verbose=False).eval()


def lpips_per_frame(ours: NDArray[np.float32], reference: NDArray[np.float32]) -> list[float]:
    """Perceptual distance (Zhang et al. 2018) of every frame of two videos ``[1, 3, F, H, W]`` in [-1, 1]."""
    import torch

    with torch.inference_mode():
        return [
            float(_network()(*(torch.from_numpy(side[:, :, i].clip(-1, 1)) for side in (ours, reference))))
            for i in range(ours.shape[2])
        ]
