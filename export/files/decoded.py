"""Decode quantised tensors to float32, a few rows at a time, while they are read.

Each class implements one formula; codes and scales stay in the file. Products are float32, in the order of the written
formula, so the values equal those of the format's reference library.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.files.tensor_file import FLOAT8, PIECE_BYTES, Array, Stored
from wan22.errors import UserError

F32 = npt.NDArray[np.float32]
FLOAT32 = np.dtype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
HADAMARD = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)
CODES = (*FLOAT8, np.dtype(np.int8))  # one-byte types, decoded by table


@dataclass(frozen=True)
class Decoded:
    """A tensor decoded from ``weight``, its codes; both have the same first axis."""

    weight: Stored

    @property
    def path(self) -> Path:
        return self.weight.path

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return FLOAT32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def size_bytes(self) -> int:
        return 4 * prod(self.shape)

    def rows(self, first: int, last: int) -> F32:
        """Rows ``first`` to ``last`` of the first axis."""
        raise NotImplementedError

    def read(self) -> Array:
        if not self.shape:
            return self.rows(0, 1).reshape(())
        values = np.empty(self.shape, np.float32)
        done = 0
        for piece in self._blocks():
            values[done : done + len(piece)] = piece
            done += len(piece)
        return values

    def pieces(self) -> Iterator[Array]:
        for block in self._blocks():
            yield block.reshape(-1)

    def _blocks(self) -> Iterator[F32]:
        """Blocks of rows, of at most ``PIECE_BYTES`` or one row."""
        step = max(1, PIECE_BYTES // max(4 * prod(self.shape[1:]), 1))
        for first in range(0, self.shape[0] if self.shape else 1, step):
            yield self.rows(first, min(first + step, self.shape[0] if self.shape else 1))


def rows_of(stored: Stored, first: int, last: int) -> Array:
    """Rows ``first`` to ``last`` of the first axis of a tensor in a file."""
    if not stored.shape:
        return stored.read().reshape(1)
    width = prod(stored.shape[1:]) * stored.dtype.itemsize
    return replace(stored, shape=(last - first, *stored.shape[1:]), offset=stored.offset + first * width).read()


def table(dtype: np.dtype[np.generic]) -> F32:
    """The float32 value of each of the 256 bytes."""
    values: F32 = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return values


@dataclass(frozen=True)
class Scaled(Decoded):
    """``codes · scale``: one scale per tensor, per row or per block of a matrix.

    The scale is the product of ``scales``; ``columns`` [in] scales the input channels; ``turned`` is the size of the
    rotated groups of inputs, 0 without rotation.
    """

    scales: tuple[Stored, ...] = ()
    columns: Stored | None = None
    turned: int = 0
    entering: Stored | None = None  # the static scale of the matrix's inputs, measured by the publisher

    def rows(self, first: int, last: int) -> F32:
        codes, scale = rows_of(self.weight, first, last), _product(self.scales)
        values: F32 = np.take(table(self.weight.dtype), codes.view(np.uint8))
        if self.scales:
            values = self._times(values, scale, first, last)
        if self.turned:
            values = unrotate(values, self.turned)
        if self.columns is not None:
            values *= self.columns.read().astype(np.float32)
        return values

    def _times(self, values: F32, scale: F32, first: int, last: int) -> F32:
        if scale.ndim == 0:
            values *= scale
        elif scale.size == self.shape[0]:
            values *= scale.reshape(-1, *[1] * (values.ndim - 1))[first:last]
        elif scale.ndim == 3:  # [out, blocks, 1]
            blocked = values.reshape(len(values), scale.shape[1], -1)
            blocked *= scale[first:last]
        else:  # [blocks of rows, blocks of columns]
            tall, wide = (-(-size // count) for size, count in zip(self.shape, scale.shape, strict=True))
            per_column = np.repeat(scale, wide, axis=1)[:, : self.shape[1]]
            values *= per_column[np.arange(first, last) // tall]
        return values


@dataclass(frozen=True)
class Codes:
    """An FP8 matrix as stored: E4M3 codes, one scale [] or one for each row [out], the inputs' static scale, if any."""

    stored: Stored
    scale: F32
    entering: float | None


def codes_of(tensor: "Tensor") -> "Codes | Nvfp4 | None":
    """``tensor`` in a form that FP8 or NVFP4 can multiply directly; None for any other form."""
    if isinstance(tensor, Nvfp4):
        return tensor
    if (
        not isinstance(tensor, Scaled)
        or tensor.weight.dtype != FLOAT8[0]
        or tensor.columns is not None
        or tensor.turned
    ):
        return None
    scale = _product(tensor.scales)
    if not tensor.scales or (scale.ndim and scale.size != tensor.shape[0]):
        return None
    entering = float(tensor.entering.read().astype(np.float32).reshape(-1)[0]) if tensor.entering else None
    return Codes(tensor.weight, scale.reshape(-1) if scale.ndim else scale, entering)


def unrotate(values: F32, size: int) -> F32:
    """Rotate every group of ``size`` inputs of ``values`` [rows, in] back.

    ``size`` is a power of 4; the rotation is the regular Hadamard matrix, which is its own inverse.
    """
    matrix = HADAMARD
    while len(matrix) < size:
        matrix = np.kron(matrix, HADAMARD)
    matrix = (matrix / np.float32(size**0.5)).astype(np.float32)
    turned: F32 = (values.reshape(len(values), -1, size) @ matrix.T).reshape(values.shape)
    return turned


@dataclass(frozen=True)
class Nvfp4(Decoded):
    """``e2m1 · block scale · world``: two codes per byte, an FP8 scale per 16 inputs, one or two scales per matrix.

    ``high_first``: the even column is in the high nibble. ``tiled``: block scales use cuBLAS' tiles of 128 x 4.
    ``divided``: divide by the last scale instead of multiplying.
    """

    blocks: Stored
    worlds: tuple[Stored, ...]
    high_first: bool = False
    tiled: bool = False
    divided: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[0], 2 * self.weight.shape[1]

    def rows(self, first: int, last: int) -> F32:
        packed: npt.NDArray[np.uint8] = rows_of(self.weight, first, last).view(np.uint8)
        low, high = packed & 15, packed >> 4
        codes = np.stack((high, low) if self.high_first else (low, high), axis=-1)
        values: F32 = E2M1[codes].reshape(last - first, -1, 16)
        values *= _nvfp4_steps(self)[first:last, :, None]
        return values.reshape(last - first, -1)

    @property
    def scales(self) -> Array:
        """The E4M3 scale of each group, [out, in/16]."""
        found, (rows, columns) = self.blocks.read(), self.shape
        return untile(found, rows, columns // 16) if self.tiled else found.reshape(rows, columns // 16)

    @property
    def world(self) -> float:
        """The scale of the whole matrix, a multiplier."""
        found = float(_product(self.worlds))
        return 1 / found if self.divided else found


@dataclass(frozen=True)
class Mxfp8(Decoded):
    """FP8 codes with a power of two, 2^(byte - 127), per 32 inputs, in cuBLAS' tiles of 128 x 4."""

    powers: Stored

    def rows(self, first: int, last: int) -> F32:
        values: F32 = np.take(table(self.weight.dtype), rows_of(self.weight, first, last).view(np.uint8))
        blocked = values.reshape(last - first, -1, 32)
        blocked *= _mxfp8_steps(self)[first:last, :, None]
        return values


# Small caches keep the scales of the matrix being decoded; those of a whole model would take gigabytes.


@lru_cache(maxsize=4)
def _product(scales: tuple[Stored, ...]) -> F32:
    scale = np.ones((), np.float32)
    for stored in scales:
        scale = scale * stored.read().astype(np.float32)
    return scale if scale.size > 1 else scale.reshape(())


@lru_cache(maxsize=2)
def _nvfp4_steps(tensor: Nvfp4) -> F32:
    """The scale of each block: [out, in/16]."""
    steps: F32 = tensor.scales.astype(np.float32)
    if not (np.isfinite(steps).all() and (steps >= 0).all()):
        spoiled = f"{tensor.path}: block scales of {list(tensor.shape)} that are negative or NaN"
        raise UserError(spoiled, "scales of 0 or more", "download it again")
    world = _product(tensor.worlds)
    return steps / world if tensor.divided else steps * world


@lru_cache(maxsize=2)
def _mxfp8_steps(tensor: Mxfp8) -> F32:
    """The scale of each block: [out, in/32]."""
    found = untile(tensor.powers.read().view(np.uint8), tensor.shape[0], tensor.shape[1] // 32)
    return np.ldexp(np.float32(1), found.astype(np.int32) - 127).astype(np.float32)


def untile(stored: Array, rows: int, columns: int) -> Array:
    """``[rows, columns]`` scales from their padded tiles of 128 x 4."""
    tall, wide = -(-rows // 128), -(-columns // 4)
    tiles = stored.reshape(tall, wide, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(tall * 128, wide * 4)[:rows, :columns]


@dataclass(frozen=True)
class GgufBlocks(Decoded):
    """Blocks of ggml along the last axis; ``weight`` holds their bytes, [rows, bytes per row]."""

    kind: int
    values_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values_shape

    def rows(self, first: int, last: int) -> F32:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        each = prod(self.values_shape[1:-1])  # rows of blocks per row of the first axis
        found = rows_of(self.weight, first * each, last * each)
        with np.errstate(all="ignore"):  # of scales that are no numbers; the writer refuses what is not finite
            values: F32 = dequantize(found, GGMLQuantizationType(self.kind))
        return values.reshape(last - first, *self.values_shape[1:])


Tensor = Stored | Decoded
