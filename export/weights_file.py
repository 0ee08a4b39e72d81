"""The weights of a bundle: safetensors files that every graph of a part points into.

Tensors are written one at a time in the type the graph declares, hashed on the way, so the peak is one tensor. Any tool
that reads safetensors can look inside; ONNX addresses the same bytes by offset.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from export.graph import FLOAT, GraphBuilder, Placed
from export.safetensors_file import header_bytes
from export.tensor_file import BFLOAT16, FLOAT8, Array, Planned
from wan22.bundle import File
from wan22.errors import UserError

PAGE_BYTES = 4096  # the data starts at a page, so that readers may map it without copying


def declared(graphs: Iterable[GraphBuilder]) -> dict[str, Planned]:
    """Every weight that ``graphs`` share a file for; they must agree on type and shape."""
    weights: dict[str, Planned] = {}
    for graph in graphs:
        for key, value in graph.weights.items():
            stored = Planned((value.dtype or FLOAT).numpy(), value.shape.numpy() if value.shape else ())
            if weights.setdefault(key, stored) != stored:
                raise ValueError(f"{key}: graphs disagree, {weights[key]} and {stored}")
    return weights


def placements(location: str, weights: Mapping[str, Planned]) -> dict[str, Placed]:
    """Where each tensor will lie in the file named ``location``."""
    offset, placed = len(header_bytes(weights, alignment_bytes=PAGE_BYTES)), {}
    for key, stored in weights.items():
        placed[key] = Placed(location, offset, stored.size_bytes)
        offset += stored.size_bytes
    return placed


def write_weights(
    path: Path,
    weights: Mapping[str, Planned],
    read: Callable[[str], Array],
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
    digest, header = hashlib.sha256(), header_bytes(weights, alignment_bytes=PAGE_BYTES)
    with path.open("wb") as file:
        for chunk in _chunks(header, weights, read, written):
            digest.update(chunk)
            file.write(chunk)
    return File(path.name, digest.hexdigest(), path.stat().st_size)


def _chunks(
    header: bytes,
    weights: Mapping[str, Planned],
    read: Callable[[str], Array],
    written: Callable[[str, int], None],
) -> Iterable[bytes | memoryview]:
    yield header
    for key, stored in weights.items():
        array = np.asarray(converted(key, read(key), stored.dtype), order="C")
        if array.shape != stored.shape:
            raise ValueError(f"{key}: shape {array.shape}, graph wants {stored.shape}")
        yield array.reshape(-1).view(np.uint8).data
        written(key, stored.size_bytes)


def converted(key: str, array: Array, dtype: np.dtype[np.generic]) -> Array:
    """``array`` in ``dtype``, rounded to nearest even; refuses what is no number, before or after."""
    if not _all_finite(array):
        raise UserError(f"{key} holds NaN or infinity", "finite weights", "download or train the checkpoint again")
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not _all_finite(array):
        raise UserError(f"{key} holds values beyond {dtype.name}", "weights that it can hold", "use --precision bf16")
    return array


def _all_finite(array: Array) -> bool:
    """One pass without a mask as large as the tensor: the extremes of a NaN or infinity show it."""
    if array.size == 0:
        return True
    if array.dtype in FLOAT8:  # quantised here, from finite values
        return True
    if array.dtype == BFLOAT16:  # the upper half of a float32: an exponent of all ones is no number
        return int((array.view(np.uint16) & 0x7F80).max()) != 0x7F80
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))
