"""The weights of a bundle: safetensors files that every graph of a part points into.

Tensors are written one at a time in the type the graph declares, hashed on the way, so the peak is one tensor. Any tool
that reads safetensors can look inside; ONNX addresses the same bytes by offset.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export.graph import GraphBuilder, Placed
from wan22.bundle import File
from wan22.errors import UserError

HEADER_ALIGNMENT_BYTES = 4096  # a page, so that readers may map the data without copying
SAFETENSORS_DTYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
}


@dataclass(frozen=True)
class Stored:
    """A tensor as it will stand in the file."""

    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.numpy().itemsize


def declared(graphs: Iterable[GraphBuilder]) -> dict[str, Stored]:
    """Every weight that ``graphs`` share a file for; they must agree on type and shape."""
    weights: dict[str, Stored] = {}
    for graph in graphs:
        for key, value in graph.weights.items():
            stored = Stored(value.shape.numpy() if value.shape else (), value.dtype or ir.DataType.FLOAT)
            if weights.setdefault(key, stored) != stored:
                raise ValueError(f"{key}: graphs disagree, {weights[key]} and {stored}")
    return weights


def placements(location: str, weights: Mapping[str, Stored]) -> dict[str, Placed]:
    """Where each tensor will lie in the file named ``location``."""
    offset, placed = len(_header(weights)), {}
    for key, stored in weights.items():
        placed[key] = Placed(location, offset, stored.size_bytes)
        offset += stored.size_bytes
    return placed


def write_weights(
    path: Path,
    weights: Mapping[str, Stored],
    read: Callable[[str], np.ndarray],
    written: Callable[[str, int], None] = lambda _key, _size_bytes: None,
) -> File:
    """Streams ``weights`` to ``path`` in order and returns the manifest's entry for it.

    Args:
        path: the file to write, its folder existing.
        weights: what is to stand in it.
        read: gives the source tensor of a name, any floating type, converted here.
        written: told every tensor's name and stored size in bytes after it was written.

    Raises:
        UserError: a NaN or infinity in a source tensor, or a value that the stored type cannot hold.
    """
    digest, header = hashlib.sha256(), _header(weights)
    with path.open("wb") as file:
        for chunk in _chunks(header, weights, read, written):
            digest.update(chunk)
            file.write(chunk)
    return File(path.name, digest.hexdigest(), path.stat().st_size)


def _chunks(
    header: bytes,
    weights: Mapping[str, Stored],
    read: Callable[[str], np.ndarray],
    written: Callable[[str, int], None],
) -> Iterable[bytes | memoryview]:
    yield header
    for key, stored in weights.items():
        array = np.ascontiguousarray(converted(key, read(key), stored.dtype))
        if array.shape != stored.shape:
            raise ValueError(f"{key}: shape {array.shape}, graph wants {stored.shape}")
        yield array.reshape(-1).view(np.uint8).data
        written(key, stored.size_bytes)


def converted(key: str, array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """``array`` in ``dtype``, rounded to nearest even; refuses what is no number, before or after."""
    if not _all_finite(array):
        raise UserError(f"{key} holds NaN or infinity", "finite weights", "download or train the checkpoint again")
    target = dtype.numpy()
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        array = array.astype(target)
    if not _all_finite(array):
        raise UserError(
            f"{key} holds values beyond {np.dtype(target).name}", "weights that it can hold", "use --precision bf16"
        )
    return array


def _all_finite(array: np.ndarray) -> bool:
    """One pass without a mask as large as the tensor: the extremes of a NaN or infinity show it."""
    if array.size == 0:
        return True
    if array.dtype == ml_dtypes.bfloat16:  # the upper half of a float32: an exponent of all ones is no number
        return int((array.view(np.uint16) & 0x7F80).max()) != 0x7F80
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _header(weights: Mapping[str, Stored]) -> bytes:
    entries, start = {}, 0
    for key, stored in weights.items():
        end = start + stored.size_bytes
        entries[key] = {
            "dtype": SAFETENSORS_DTYPES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text
