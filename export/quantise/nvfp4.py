"""Matrices in NVFP4: codes of 4 bits, an E4M3 scale for 16 inputs and a float32 scale for every row.

A value is ``e2m1(code) · group · row``. :func:`quantise` rounds to the nearest code, :func:`compensated` for inputs:
the rows that the linear multiplies, centred and smoothed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from export.files.decoded import Nvfp4
from export.quantise.compensation import F32, GROUP, compensate

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_CODE, LARGEST_SCALE = 6.0, 448.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; bit 3 is the sign
SCALES_TRIED = (1.0, 0.9, 0.8, 1.2)  # multiples of the scale that has no overflow
SMALLEST_ROW = 1e-30  # keeps divisors positive


@dataclass(frozen=True)
class Nvfp4Matrix:
    codes: npt.NDArray[np.uint8]  # [out, in/2], two a byte, the even column in the low half
    groups: npt.NDArray[Any]  # float8_e4m3fn [out, in/16]
    rows: F32  # [out]

    def decoded(self) -> F32:
        """The matrix ``[out, in]``."""
        codes = np.stack((self.codes & 15, self.codes >> 4), -1).reshape(len(self.codes), -1, GROUP)
        values = np.where(codes & 8, -1, 1) * np.array(MAGNITUDES, np.float32)[codes & 7]
        steps = self.groups.astype(np.float32) * self.rows[:, None]
        return np.asarray((values * steps[:, :, None]).reshape(len(codes), -1), np.float32)


def joined(parts: Sequence[Nvfp4Matrix]) -> Nvfp4Matrix:
    """The rows of all ``parts`` as one matrix."""
    codes, groups, rows = ([getattr(part, leaf) for part in parts] for leaf in ("codes", "groups", "rows"))
    return Nvfp4Matrix(np.concatenate(codes), np.concatenate(groups), np.concatenate(rows))


def stored_matrix(stored: Nvfp4) -> Nvfp4Matrix:
    """A matrix that a checkpoint stores in NVFP4, bit for bit."""
    codes = stored.weight.read().view(np.uint8)
    if stored.high_first:
        codes = np.asarray((codes << 4) | (codes >> 4), np.uint8)
    groups = stored.scales.view(ml_dtypes.float8_e4m3fn)
    return Nvfp4Matrix(codes, groups, np.full(len(codes), stored.world, np.float32))


def quantise(matrix: F32) -> Nvfp4Matrix:
    """``matrix [out, in]`` with every value rounded to the nearest code; ``in`` is a multiple of 16."""
    return compensated(matrix, np.zeros((1, matrix.shape[1]), np.float32))


def compensated(matrix: npt.NDArray[Any], inputs: F32) -> Nvfp4Matrix:
    """``matrix [out, in]``, rounded so that products with ``inputs [rows, in]`` change little."""
    made = _Rounding(matrix)
    compensate(matrix, inputs, made)
    return made.matrix


class _Rounding:
    """The codes and scales of a matrix while its columns are rounded."""

    def __init__(self, matrix: npt.NDArray[Any]) -> None:
        import torch

        leaving, entering = matrix.shape
        largest = torch.from_numpy(np.abs(matrix).max(1).astype(np.float32))
        self.rows = (largest / (LARGEST_CODE * LARGEST_SCALE)).clamp(min=SMALLEST_ROW)
        self.codes = torch.empty(leaving, entering, dtype=torch.uint8)
        self.groups = torch.empty(leaving, entering // GROUP, dtype=torch.float8_e4m3fn)
        self.steps = self.rows

    def begin(self, group: "Tensor", first: int, importance: "Tensor") -> None:
        scale = _scale(group, self.rows, importance)
        self.groups[:, first // GROUP] = scale
        self.steps = scale.float() * self.rows

    def round(self, values: "Tensor", column: int) -> "Tensor":
        self.codes[:, column] = _nearest(values, self.steps)
        return _values(self.codes[:, column]) * self.steps

    @property
    def matrix(self) -> Nvfp4Matrix:
        import torch

        packed = (self.codes[:, 0::2] | (self.codes[:, 1::2] << 4)).numpy()
        groups = self.groups.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        return Nvfp4Matrix(packed, groups, self.rows.numpy())


def _scale(group: "Tensor", rows: "Tensor", importance: "Tensor") -> "Tensor":
    """The E4M3 scales of ``group [out, 16]`` with the least error, weighted by the ``importance [16]`` of inputs."""
    import torch

    largest = group.abs().amax(1) / (LARGEST_CODE * rows)
    found, least = torch.zeros(len(group), dtype=torch.float8_e4m3fn), torch.full((len(group),), torch.inf)
    for multiple in SCALES_TRIED:
        scale = (multiple * largest).clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn)
        steps = (scale.float() * rows)[:, None]
        error = ((_values(_nearest(group, steps)) * steps - group) ** 2 * importance).sum(1)
        better = error < least
        found.view(torch.uint8)[better] = scale.view(torch.uint8)[better]
        least = torch.minimum(least, error)
    return found


def _nearest(values: "Tensor", steps: "Tensor") -> "Tensor":
    """The codes nearest to ``values / steps``, halves to the even code; 0 where a step is 0."""
    import torch

    scaled = torch.where(steps > 0, values / steps, 0.0)
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    halves[1::2] = torch.nextafter(halves[1::2], torch.zeros(3))
    code = torch.bucketize(scaled.abs(), halves).to(torch.uint8)
    return code | ((scaled < 0).to(torch.uint8) << 3)


def _values(codes: "Tensor") -> "Tensor":
    import torch

    magnitudes = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    return magnitudes[codes.long()]
