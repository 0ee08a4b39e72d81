"""A tensor inside a file, and files that are written without ever holding a model in memory.

Both formats of a checkpoint (safetensors, torch's zip) store tensors as plain little-endian rows at some offset. So one
description serves both, and reading maps only the tensor asked for, for as long as the array lives.
"""

import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

Array = npt.NDArray[np.generic]
Pieces = Callable[[str], Iterable[Array]]  # name → the tensor's elements in order, in pieces of any size


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: ``offset`` bytes into ``path``."""

    path: Path
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Array:
        """The tensor, read-only, mapped from the file."""
        if self.size_bytes == 0:
            return np.empty(self.shape, self.dtype)
        return np.asarray(np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=self.shape))


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class HoleyFile(io.FileIO):
    """A file whose blocks of zeros take no space on the disk."""

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        if len(view) < 4096 or _any(view):
            return super().write(view)
        end = self.seek(len(view), io.SEEK_CUR)
        if end > os.fstat(self.fileno()).st_size:
            self.truncate(end)
        return len(view)


def _any(view: memoryview) -> bool:
    """Whether any byte is not zero; eight at a time, which is as fast as memory."""
    words = len(view) // 8 * 8
    return bool(np.bitwise_or.reduce(np.frombuffer(view[:words], np.uint64))) or any(view[words:])
