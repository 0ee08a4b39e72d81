"""Matrices in NVFP4: codes of 4 bits, an E4M3 scale for 16 inputs and a float32 scale for every row.

A value is ``e2m1(code) · block · row``. :func:`quantise` rounds to the nearest code. :func:`compensated` rounds column
after column and lets the columns that follow make up for the error, as far as the linear's own inputs are alike there
(GPTQ, Frantar et al. 2023). Its covariance is that of the rows that the linear multiplies: centred and smoothed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

F32 = npt.NDArray[np.float32]
GROUP = 16  # inputs that share a scale
LARGEST_CODE, LARGEST_BLOCK = 6.0, 448.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; bit 3 is the sign
SCALES_TRIED = (1.0, 0.9, 0.8, 1.2)  # multiples of the scale that has no overflow
DAMPING = 0.01  # of the mean variance, added to every input's
LAZY = 128  # columns after which all that follow are updated


@dataclass(frozen=True)
class Nvfp4Matrix:
    codes: npt.NDArray[np.uint8]  # [out, in/2], two a byte, the even column in the low half
    blocks: npt.NDArray[Any]  # float8_e4m3fn [out, in/16]
    rows: F32  # [out]

    def decoded(self) -> F32:
        """The matrix ``[out, in]``."""
        codes = np.stack((self.codes & 15, self.codes >> 4), -1).reshape(len(self.codes), -1, GROUP)
        values = np.where(codes & 8, -1, 1) * np.array(MAGNITUDES, np.float32)[codes & 7]
        steps = self.blocks.astype(np.float32) * self.rows[:, None]
        return np.asarray((values * steps[:, :, None]).reshape(len(codes), -1), np.float32)


def quantise(matrix: F32) -> Nvfp4Matrix:
    """``matrix [out, in]`` with every value rounded to the nearest code; ``in`` is a multiple of 16."""
    return compensated(matrix, None)


def compensated(matrix: F32, covariance: F32 | None) -> Nvfp4Matrix:
    """``matrix [out, in]``, rounded for inputs of ``covariance [in, in]``; None for inputs that have nothing in common.

    The covariance need not have full rank: a hundredth of the mean variance is added to every input's.
    """
    import torch

    weight = torch.from_numpy(np.array(matrix, np.float32))
    leaving, entering = weight.shape
    assert entering % GROUP == 0
    rows = (weight.abs().amax(1) / (LARGEST_CODE * LARGEST_BLOCK)).clamp(min=1e-30)
    factor = None if covariance is None else _factor(torch.from_numpy(np.asarray(covariance, np.float32)))
    codes = torch.empty(leaving, entering, dtype=torch.uint8)
    blocks = torch.empty(leaving, entering // GROUP, dtype=torch.float8_e4m3fn)
    for start in range(0, entering, LAZY):
        end = min(start + LAZY, entering)
        errors = torch.zeros(leaving, end - start)
        for first in range(start, end, GROUP):
            last = first + GROUP
            importance = torch.ones(GROUP) if factor is None else factor.diagonal()[first:last] ** -2
            scale = _scale(weight[:, first:last], rows, importance)
            blocks[:, first // GROUP] = scale
            steps = scale.float() * rows
            for column in range(first, last):
                codes[:, column] = _nearest(weight[:, column], steps)
                if factor is not None:
                    error = (weight[:, column] - _values(codes[:, column]) * steps) / factor[column, column]
                    weight[:, column:last] -= error[:, None] * factor[column, column:last]
                    errors[:, column - start] = error
            if factor is not None:
                weight[:, last:end] -= errors[:, first - start : last - start] @ factor[first:last, last:end]
        if factor is not None:
            weight[:, end:] -= errors @ factor[start:end, end:]
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).numpy()
    return Nvfp4Matrix(packed, blocks.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), rows.numpy())


def _factor(covariance: "Tensor") -> "Tensor":
    """The upper Cholesky factor of the inverse: its rows tell how later columns make up for an error."""
    import torch

    damped = covariance.double()
    damped.diagonal().add_(max(DAMPING * float(damped.diagonal().mean()), 1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _scale(group: "Tensor", rows: "Tensor", importance: "Tensor") -> "Tensor":
    """The E4M3 scales of ``group [out, 16]`` with the least error, weighted by the ``importance [16]`` of inputs."""
    import torch

    largest = group.abs().amax(1) / (LARGEST_CODE * rows)
    found, least = torch.zeros(len(group), dtype=torch.float8_e4m3fn), torch.full((len(group),), torch.inf)
    for multiple in SCALES_TRIED:
        scale = (multiple * largest).clamp(max=LARGEST_BLOCK).to(torch.float8_e4m3fn)
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


def low_rank(matrix: F32, rank: int) -> tuple[F32, F32]:
    """``down [rank, in]`` and ``up [out, rank]``, whose product is nearest to ``matrix [out, in]`` (Li et al. 2024)."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(torch.from_numpy(matrix), q=min(rank + 8, *matrix.shape), niter=4)
    root = values[:rank].sqrt()
    return (right[:, :rank] * root).T.contiguous().numpy(), (left[:, :rank] * root).contiguous().numpy()
