"""The weights of a bundle: safetensors files that every graph of a part points into.

Tensors are written piece by piece in the type the graph declares, hashed on the way, so the peak is a few pieces. Any
tool that reads safetensors can look inside; ONNX addresses the same bytes by offset.
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
from wan22.bundle import File
from wan22.errors import UserError

T = TypeVar("T")
BLOCK_ELEMENTS = 2**18  # converted at once
MARK_EVERY_BYTES = 2**30  # what a killed export loses at most
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
    pieces: Pieces,
    written: Callable[[str, int], None] = lambda _key, _size_bytes: None,
    journal: Journal | None = None,
) -> File:
    """Streams ``weights`` to ``path`` in order and returns the manifest's entry for it.

    Args:
        path: the file to write, its folder existing.
        weights: what is to stand in it.
        pieces: gives the elements of a name in order, any floating type, converted here.
        written: told every tensor's name and stored size in bytes after it was written.
        journal: told now and then how far the file is, and asked where an interrupted one goes on.

    Raises:
        UserError: a NaN or infinity in a source tensor, or a value that the stored type cannot hold.
    """
    header = header_bytes(weights, alignment_bytes=PAGE_BYTES)
    begun, digest = journal.verified(path) if journal else (0, None)
    with HashedFile(path, begun, digest) as file, _one_thread():
        marked, end = begun, len(header)
        file.put(np.frombuffer(b"" if begun else header, np.uint8))
        made = groupby(_made(_left(weights, begun - len(header)), pieces), itemgetter(0))
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


def _left(weights: Mapping[str, Planned], begun: int) -> list[str]:
    """The tensors of which not all lies in the first ``begun`` bytes of data."""
    ends = accumulate(stored.size_bytes for stored in weights.values())
    return [key for key, end in zip(weights, ends, strict=True) if end > begun]


def _made(keys: Iterable[str], pieces: Pieces) -> Iterator[tuple[str, Array]]:
    """Every piece of every tensor, by its name. One thread begins tensors, which reads what must be known as a whole;
    another makes their pieces; so the disk, both and who converts, hashes and writes them are busy at a time.
    """
    begun = ahead((key, pieces(key)) for key in keys)
    return ahead((key, piece) for key, elements in begun for piece in elements)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """``items`` in order, each made while the one before it is being used; no more than one waits."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # not the end


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch with one thread: several wait for each other by spinning, and leave no core for hashing and writing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _put(file: HashedFile, key: str, stored: Planned, pieces: Iterable[Array]) -> None:
    """In blocks that stay in a core's cache, so that memory is read and written once."""
    missing = prod(stored.shape)
    for piece in pieces:
        flat = piece.reshape(-1)
        for start in range(0, flat.size, BLOCK_ELEMENTS):
            file.put(converted(key, flat[start : start + BLOCK_ELEMENTS], stored.dtype).view(np.uint8))
        missing -= piece.size
    if missing:
        raise ValueError(f"{key}: {missing} elements fewer than the {stored.shape} that the graph wants")


def converted(key: str, array: Array, dtype: np.dtype[np.generic]) -> Array:
    """``array`` in ``dtype``, rounded to nearest even; refuses what is no number, before or after."""
    if array.dtype in FLOAT8 or array.size == 0:  # quantised here, from finite values
        return array.astype(dtype, copy=False)
    ends = extremes(array)
    check_finite(key, ends)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        rounded = ends.astype(dtype).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise UserError(f"{key} holds values beyond {dtype.name}", "weights that it can hold", "use --precision bf16")
    return _cast(array, dtype)


def _cast(array: Array, dtype: np.dtype[np.generic]) -> Array:
    """Several times as fast in PyTorch as in numpy, most of all into memory that is there already."""
    result = np.empty(array.shape, dtype)
    as_torch(result).copy_(as_torch(array))
    return result
