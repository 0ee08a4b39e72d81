"""The weights of a bundle: one safetensors file per part, addressed by all graphs of the part.

Tensors are converted to the graph's type, hashed and written piece by piece, so peak memory is a few pieces. Any
safetensors reader can open the file; ONNX addresses the same bytes by offset.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, groupby
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np

from export.files.hashed_file import HashedFile
from export.files.resumable import Journal
from export.files.safetensors_file import header_bytes
from export.files.tensor_file import FLOAT8, Array, Pieces, Planned, as_torch, check_finite, extremes
from export.graphs.builder import FLOAT, GraphBuilder, Placed
from export.graphs.linear import FLOAT4
from wan22.component import File
from wan22.errors import UserError

T = TypeVar("T")
BLOCK_ELEMENTS = 2**18  # elements per conversion
MARK_EVERY_BYTES = 2**30  # the most that a killed export loses
PAGE_BYTES = 4096  # the data starts on a page boundary, so that readers can map it without copying


def declare_weights(graphs: Iterable[GraphBuilder]) -> dict[str, Planned]:
    """Every weight of ``graphs``, which share a file and must agree on type and shape."""
    weights: dict[str, Planned] = {}
    for graph in graphs:
        for key, value in graph.weights.items():
            stored = Planned((value.dtype or FLOAT).numpy(), value.shape.numpy() if value.shape else ())
            if value.dtype == FLOAT4:  # two codes a byte
                stored = Planned(np.dtype(np.uint8), (*stored.shape[:-1], stored.shape[-1] // 2))
            if weights.setdefault(key, stored) != stored:
                raise ValueError(f"{key}: graphs disagree, {weights[key]} and {stored}")
    return weights


def placements(location: str, weights: Mapping[str, Planned]) -> dict[str, Placed]:
    """The position of each tensor in the file ``location``."""
    offset, placed = len(header_bytes(weights, alignment_bytes=PAGE_BYTES)), {}
    for key, stored in weights.items():
        placed[key] = Placed(location, offset, stored.size_bytes)
        offset += stored.size_bytes
    return placed


def write_weights(
    path: Path,
    weights: Mapping[str, Planned],
    pieces: Pieces,
    written: Callable[[str, int], None] = lambda _key, _size_bytes: None,
    journal: Journal | None = None,
) -> File:
    """Stream ``weights`` to ``path`` in order and return the manifest's entry for it.

    Args:
        path: the file to write; its folder exists.
        weights: the tensors to write.
        pieces: returns the elements of a tensor in order, in any floating type.
        written: called with each tensor's name and stored size in bytes once it is written.
        journal: records progress and says where an interrupted file resumes.

    Raises:
        UserError: a source tensor holds NaN, infinity or a value outside the stored type's range.
    """
    header = header_bytes(weights, alignment_bytes=PAGE_BYTES)
    begun, digest = journal.verify(path) if journal else (0, None)
    with HashedFile(path, begun, digest) as file, _one_thread():
        marked, end = begun, len(header)
        file.put(np.frombuffer(b"" if begun else header, np.uint8))
        ends = accumulate((stored.size_bytes for stored in weights.values()), initial=len(header))
        next(ends)
        remaining = [key for key, last in zip(weights, ends, strict=True) if last > begun]
        made = groupby(_read_ahead(remaining, pieces), itemgetter(0))
        for key, stored in weights.items():
            end += stored.size_bytes
            if end > begun:
                _put(file, key, stored, (piece for _, piece in next(made)[1]))
            if journal and end - marked >= MARK_EVERY_BYTES:
                journal.record(file.written())
                marked = end
            written(key, stored.size_bytes)
        entry = file.written()
    if journal and entry.size_bytes > marked:
        journal.record(entry)
    return entry


def _read_ahead(keys: Iterable[str], pieces: Pieces) -> Iterator[tuple[str, Array]]:
    """Yield every piece of every tensor with the tensor's name.

    One thread prepares tensors (and reads whole-tensor statistics), a second produces pieces, so reading, converting
    and writing overlap.
    """
    begun = prefetch((key, pieces(key)) for key in keys)
    return prefetch((key, piece) for key, elements in begun for piece in elements)


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield ``items`` in order, computing at most one ahead in a thread."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # not the end


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread: its workers spin while they wait and would leave no core for hashing and writing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _put(file: HashedFile, key: str, stored: Planned, pieces: Iterable[Array]) -> None:
    """Convert and write a tensor in cache-sized blocks, so that memory is read and written only once."""
    missing = prod(stored.shape)
    for piece in pieces:
        flat = piece.reshape(-1)
        for start in range(0, flat.size, BLOCK_ELEMENTS):
            file.put(convert(key, flat[start : start + BLOCK_ELEMENTS], stored.dtype).view(np.uint8))
        missing -= piece.size
    if missing:
        raise ValueError(f"{key}: {missing} elements short of the graph's shape {stored.shape}")


def convert(key: str, array: Array, dtype: np.dtype[np.generic]) -> Array:
    """``array`` in ``dtype``, rounded to nearest even.

    Raises:
        UserError: ``array`` or the result holds NaN or infinity.
    """
    if array.dtype in FLOAT8 or array.size == 0:  # quantised by this export from finite values
        return array.astype(dtype, copy=False)
    ends = extremes(array)
    check_finite(key, ends)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        rounded = ends.astype(dtype).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise UserError(f"{key} exceeds the range of {dtype.name}", "weights within it", "use --precision bf16")
    result = np.empty(array.shape, dtype)
    as_torch(result).copy_(as_torch(array))  # several times as fast as numpy, especially into existing memory
    return result
