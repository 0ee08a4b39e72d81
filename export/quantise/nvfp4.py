"""Matrices in NVFP4: codes of 4 bits, an E4M3 scale for 16 inputs and a float32 scale for every row.

A value is ``e2m1(code) · group · row``. :func:`quantise` rounds to the nearest code. :func:`compensated` rounds column
after column and lets the columns that follow make up for the error, as far as the linear's own inputs are alike there
(GPTQ, Frantar et al. 2023). The inputs are the rows that the linear multiplies: centred and smoothed.

A matrix may be split into one of low rank, its largest singular vectors, which stays in 16 bits, and the rest, whose
codes have smaller steps (SVDQuant, Li et al. 2024). Vectors that count the inputs' covariance gained nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from export.files.decoded import Nvfp4

if TYPE_CHECKING:
    from torch import Tensor

F32 = npt.NDArray[np.float32]
GROUP = 16  # inputs that share a scale
LARGEST_CODE, LARGEST_SCALE = 6.0, 448.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; bit 3 is the sign
SCALES_TRIED = (1.0, 0.9, 0.8, 1.2)  # multiples of the scale that has no overflow
# Added to every input's variance, as a share of the mean one: few rows do not tell what else the inputs have.
DAMPING, OF_FEW_ROWS, LARGEST_DAMPING = 0.01, 0.04, 0.5  # at least, by the square of inputs over rows, at most
AT_ONCE = 64  # columns, a multiple of a group, after which all that follow are updated
FEW_ELEMENTS = 2**22  # of a matrix for which one thread is faster
SMALLEST_ROW = 1e-30  # keeps divisors positive
MORE_VECTORS, ITERATIONS, SEED = 16, 3, 0  # of the search for singular vectors


@dataclass(frozen=True)
class Nvfp4Matrix:
    codes: npt.NDArray[np.uint8]  # [out, in/2], two a byte, the even column in the low half
    groups: npt.NDArray[Any]  # float8_e4m3fn [out, in/16]
    rows: F32  # [out]
    up: F32 | None = None  # [out, rank], divided by ``rows``
    down: F32 | None = None  # [rank, in], rounded to bfloat16

    def decoded(self) -> F32:
        """The matrix ``[out, in]`` of the codes, without ``up · down``."""
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


def compensated(matrix: npt.NDArray[Any], inputs: F32, low_rank: int = 0) -> Nvfp4Matrix:
    """``matrix [out, in]``, rounded so that products with ``inputs [rows, in]`` change little.

    With ``low_rank``, at most the smaller side of the matrix, only what ``up · down`` of this rank leaves is rounded.

    With few rows the covariance ``H = l I + X^T X`` is never formed. The columns that follow column j fit its error
    best with ``x_k^T P x_j``, where ``P`` is the inverse of ``l I + X X^T`` over those columns: ``[rows, rows]``.
    """
    with _threads(matrix.size):
        return _compensated(matrix, inputs, low_rank)


@contextmanager
def _threads(elements: int) -> Iterator[None]:
    """All cores for a large matrix: whoever writes weights files has left one thread to PyTorch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads((os.cpu_count() or 1) if elements > FEW_ELEMENTS else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compensated(matrix: npt.NDArray[Any], inputs: F32, low_rank: int) -> Nvfp4Matrix:
    import torch

    weight, (leaving, entering) = torch.from_numpy(np.array(matrix, np.float32)), matrix.shape
    assert entering % GROUP == 0
    up = down = None
    if low_rank:
        up, down = _split(weight, low_rank)
        weight.addmm_(up, down, alpha=-1)
    count, x = max(len(inputs), 1), torch.from_numpy(np.asarray(inputs, np.float32))
    if count > entering:  # as many rows as inputs have the same X^T X
        x = torch.linalg.qr(x.double(), mode="r").R.float()
    fits, importance = _fits(x, count)
    rows = (weight.abs().amax(1) / (LARGEST_CODE * LARGEST_SCALE)).clamp(min=SMALLEST_ROW)
    codes = torch.empty(leaving, entering, dtype=torch.uint8)
    groups = torch.empty(leaving, entering // GROUP, dtype=torch.float8_e4m3fn)
    owed = torch.zeros(leaving, len(x))  # what the columns so far leave to those that follow
    scaled = x / count**0.5
    for start in range(0, entering, AT_ONCE):
        end = min(start + AT_ONCE, entering)
        part, errors = weight[:, start:end] + owed @ scaled[:, start:end], torch.empty(leaving, end - start)
        within = fits[start:end] @ scaled[:, start:end]
        for first in range(0, end - start, GROUP):
            last = first + GROUP
            scale = _scale(part[:, first:last], rows, importance[start + first : start + last])
            groups[:, (start + first) // GROUP] = scale
            steps = scale.float() * rows
            for column in range(first, last):
                codes[:, start + column] = _nearest(part[:, column], steps)
                errors[:, column] = part[:, column] - _values(codes[:, start + column]) * steps
                part[:, column + 1 : last] += errors[:, column, None] * within[column, column + 1 : last]
            part[:, last:] += errors[:, first:last] @ within[first:last, last:]
        owed += errors @ fits[start:end]
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).numpy()
    made = Nvfp4Matrix(packed, groups.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), rows.numpy())
    if up is None or down is None:
        return made
    return replace(made, up=(up / rows[:, None]).numpy(), down=down.numpy())


def _split(weight: "Tensor", rank: int) -> "tuple[Tensor, Tensor]":
    """``up [out, rank]`` and ``down [rank, in]``, whose product is nearly the nearest to ``weight`` of this rank.

    The vectors are found by iteration from random ones (Halko et al. 2011): a whole decomposition takes minutes.
    """
    import torch

    wanted = min(rank + MORE_VECTORS, *weight.shape)
    found = torch.randn(weight.shape[1], wanted, generator=torch.Generator().manual_seed(SEED))
    for _ in range(ITERATIONS):
        found = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ found)[0])[0]
    *_, largest = torch.linalg.svd(weight @ found, full_matrices=False)
    down = largest[:rank] @ found.T
    return weight @ down.T, down.bfloat16().float()


def _fits(x: "Tensor", count: int) -> "tuple[Tensor, Tensor]":
    """For every column of ``x [rows, in]``: how later ones fit it, ``[in, rows]``, and what its own error costs.

    ``count`` is the number of inputs that ``x`` stands for.
    """
    import torch

    wide = x.double() / count**0.5
    share = min(max(DAMPING, OF_FEW_ROWS * (x.shape[1] / count) ** 2), LARGEST_DAMPING)
    damping = max(share * float((wide**2).sum(0).mean()), SMALLEST_ROW)
    inverse = torch.linalg.inv(wide @ wide.T + damping * torch.eye(len(x), dtype=torch.float64))
    fits, importance = torch.empty(x.shape[1], len(x)), torch.empty(x.shape[1])
    for start in range(0, x.shape[1], AT_ONCE):
        part = wide[:, start : start + AT_ONCE]
        projected, left = inverse @ part, torch.empty(part.shape[1], dtype=torch.float64)
        for column in range(part.shape[1]):  # each leaves the inverse to those that follow without itself
            before = projected[:, :column]
            projected[:, column] += before @ ((before.T @ part[:, column]) / left[:column])
            left[column] = 1 - part[:, column] @ projected[:, column]
        fits[start : start + AT_ONCE] = (projected / left).T
        importance[start : start + AT_ONCE] = damping / left
        inverse += (projected / left) @ projected.T
    return fits, importance / importance.mean()


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
