"""Tensors inside files, and files written without holding a model in memory.

Safetensors and torch's zip both store tensors as plain little-endian rows at some offset, so one description fits both.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from export.files.direct_io import read_direct
from wan22.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

PIECE_BYTES = 2**24

Array = npt.NDArray[np.generic]
Pieces = Callable[[str], Iterable[Array]]  # name → the tensor's elements in order, in pieces of any size


@dataclass(frozen=True)
class Stored:
    """The location of a tensor: ``offset`` bytes into ``path``."""

    path: Path
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Array:
        """The whole tensor, in separate memory."""
        return self._elements(0, self.size_bytes).reshape(self.shape)

    def pieces(self) -> Iterator[Array]:
        """The elements in order, flat, in pieces of at most ``PIECE_BYTES``, each in separate memory."""
        for start in range(0, self.size_bytes, PIECE_BYTES):
            yield self._elements(start, min(PIECE_BYTES, self.size_bytes - start))

    def _elements(self, start: int, size_bytes: int) -> Array:
        """The elements in ``size_bytes`` from ``start`` bytes into the tensor."""
        found = read_direct(self.path, self.offset + start, size_bytes).view(self.dtype)
        return found if found.flags.aligned else found.copy()


@dataclass(frozen=True)
class Planned:
    """A tensor to write."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def as_torch(array: Array) -> Any:
    """A ``torch.Tensor`` that shares the memory of ``array``; ``torch.from_numpy`` does not support bfloat16."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def extremes(array: Array) -> npt.NDArray[np.float32]:
    """The smallest and the largest element, in one pass; they reveal NaN and infinity without a mask."""
    import torch

    smallest, largest = torch.aminmax(as_torch(array))
    return np.array([float(smallest), float(largest)], np.float32)


def check_finite(key: str, ends: npt.NDArray[np.float32]) -> None:
    """Refuse the tensor ``key`` if its :func:`extremes` are not finite."""
    if not np.isfinite(ends).all():
        raise UserError(f"{key} holds NaN or infinity", "finite weights", "download or train the checkpoint again")


class HoleyFile(io.FileIO):
    """A file whose blocks of zeros take no disk space."""

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        words = len(view) // 8 * 8  # max takes vector instructions, any does not
        if len(view) < 4096 or any(view[:64]) or np.frombuffer(view[:words], np.uint64).max() or any(view[words:]):
            done = 0
            while done < len(view):  # a single write may be short on a nearly full disk
                done += super().write(view[done:]) or 0
            return done
        end = self.seek(len(view), io.SEEK_CUR)
        if end > os.fstat(self.fileno()).st_size:
            self.truncate(end)
        return len(view)
