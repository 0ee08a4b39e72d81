"""Round a matrix column after column, where the columns that follow make up for every error (GPTQ, arXiv 2210.17323).

They can as far as the linear's own inputs are alike there. With few rows of inputs the covariance ``H = l I + X^T X``
is never formed. The columns that follow column j fit its error best with ``x_k^T P x_j``, where ``P`` is the inverse of
``l I + X X^T`` over those columns: ``[rows, rows]``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

F32 = npt.NDArray[np.float32]
GROUP = 16  # columns that a format may give a common scale
# Added to every input's variance, as a share of the mean one: few rows do not tell what else the inputs have.
DAMPING, OF_FEW_ROWS, LARGEST_DAMPING = 0.01, 0.04, 0.5  # at least, by the square of inputs over rows, at most
AT_ONCE = 64  # columns, a multiple of a group, after which all that follow are updated
FEW_ELEMENTS = 2**22  # of a matrix for which one thread is faster
SMALLEST_VARIANCE = 1e-30  # keeps divisors positive


class Format(Protocol):
    """Codes of a matrix ``[out, in]``, which are made one column after another."""

    def begin(self, group: "Tensor", first: int, importance: "Tensor") -> None:
        """Choose scales for ``group [out, 16]``, the columns from ``first`` on; an error there costs ``importance``."""

    def round(self, values: "Tensor", column: int) -> "Tensor":
        """Keep the codes of ``values [out]`` and return what they stand for."""
        ...


def compensate(matrix: npt.NDArray[Any], inputs: F32, into: Format) -> None:
    """Round ``matrix [out, in]`` so that products with ``inputs [rows, in]`` change little; to nearest without rows."""
    with _threads(matrix.size):
        _compensate(matrix, inputs, into)


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


def _compensate(matrix: npt.NDArray[Any], inputs: F32, into: Format) -> None:
    import torch

    weight, (leaving, entering) = torch.from_numpy(np.array(matrix, np.float32)), matrix.shape
    assert entering % GROUP == 0
    x = torch.from_numpy(np.asarray(inputs, np.float32))
    fits, importance = _fits(x)
    owed = torch.zeros(leaving, len(x))  # what the columns so far leave to those that follow
    scaled = x / max(len(x), 1) ** 0.5
    for start in range(0, entering, AT_ONCE):
        end = min(start + AT_ONCE, entering)
        part, errors = weight[:, start:end] + owed @ scaled[:, start:end], torch.empty(leaving, end - start)
        within = fits[start:end] @ scaled[:, start:end]
        for first in range(0, end - start, GROUP):
            last = first + GROUP
            into.begin(part[:, first:last], start + first, importance[start + first : start + last])
            for column in range(first, last):
                errors[:, column] = part[:, column] - into.round(part[:, column], start + column)
                part[:, column + 1 : last] += errors[:, column, None] * within[column, column + 1 : last]
            part[:, last:] += errors[:, first:last] @ within[first:last, last:]
        owed += errors @ fits[start:end]


def _fits(x: "Tensor") -> "tuple[Tensor, Tensor]":
    """For every column of ``x [rows, in]``: how later ones fit it, ``[in, rows]``, and what its own error costs."""
    import torch

    wide = x.double() / max(len(x), 1) ** 0.5
    share = min(max(DAMPING, OF_FEW_ROWS * (x.shape[1] / max(len(x), 1)) ** 2), LARGEST_DAMPING)
    damping = max(share * float((wide**2).sum(0).mean()), SMALLEST_VARIANCE)
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
