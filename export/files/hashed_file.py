"""A file that is hashed while it is written, and written past the system's cache.

It is filled in a few buffers of whole disk blocks that go to the disk as they are, by one thread, while another hashes
them and the caller fills the next.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.files.direct_io import BLOCK_BYTES, Bytes, aligned, blocks_of, opened, transferred
from wan22.bundle import File

if TYPE_CHECKING:
    from hashlib import _Hash

BUFFERS, BUFFER_BYTES = 4, 2**24
HOLE_BYTES = 2**18  # so many zeros, and no fewer, take no space on the disk


@dataclass(frozen=True, eq=False)
class _Buffer:
    data: Bytes
    busy: list[Future[None]] = field(default_factory=list)  # who still reads it

    def wait(self) -> None:
        while self.busy:
            self.busy.pop().result()


class HashedFile:
    """Appends to the file at ``path``, of which the first ``begun`` bytes stay; ``digest`` is their hash, continued."""

    def __init__(self, path: Path, begun: int = 0, digest: "_Hash | None" = None) -> None:
        self._path, self._digest = path, digest or hashlib.sha256()
        self._file = opened(path, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(self._file, begun)
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._all = [_Buffer(aligned(BUFFER_BYTES)) for _ in range(BUFFERS)]
        self._next = cycle(self._all)
        self._buffer = next(self._next)
        self._start = begun // BLOCK_BYTES * BLOCK_BYTES  # of the buffer, in the file
        self._filled = self._hashed = begun - self._start  # bytes of the buffer
        self._buffer.data[: self._filled] = _read(path, self._start, begun)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        os.close(self._file)

    def put(self, data: Bytes) -> None:
        """Appends ``data``, which the caller may change afterwards."""
        while len(data):
            room = self._buffer.data[self._filled :]
            taken = min(len(room), len(data))
            room[:taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            if taken == len(room):
                self._flush()

    def written(self) -> File:
        """The entry of the file, all of which is on the disk then."""
        self._flush()
        for buffer in self._all:
            buffer.wait()
        size = self._start + self._filled
        os.ftruncate(self._file, size)
        return File(self._path.name, self._digest.hexdigest(), size)

    def _flush(self) -> None:
        """Sends the buffer off; a block that is not full yet is the first of the next buffer too."""
        whole = blocks_of(self._filled)
        begun = self._filled % BLOCK_BYTES
        full, self._buffer = self._buffer, next(self._next)
        self._buffer.wait()
        self._buffer.data[:begun] = full.data[self._filled - begun : self._filled]
        full.data[self._filled : whole] = 0
        full.busy.append(self._hasher.submit(self._digest.update, full.data[self._hashed : self._filled].data))
        full.busy.append(self._writer.submit(_write, self._file, self._path, full.data[:whole], self._start))
        self._start += self._filled - begun
        self._filled = self._hashed = begun


def _read(path: Path, start: int, end: int) -> Bytes:
    with path.open("rb") as file:
        file.seek(start)
        return np.frombuffer(file.read(end - start), np.uint8)


def _write(file: int, path: Path, data: Bytes, place: int) -> None:
    for begin, end in _no_holes(data):
        done = begin
        while done < end:  # the system may take less than it is given, on a disk that is nearly full
            done += transferred(file, path, partial(os.pwrite, file, data[done:end].data, place + done))


def _no_holes(data: Bytes) -> Iterator[tuple[int, int]]:
    """What of ``data`` is to be written: long stretches between stretches of zeros."""
    begin = 0
    for start in range(0, len(data), HOLE_BYTES):
        chunk = data[start : start + HOLE_BYTES]
        if len(chunk) == HOLE_BYTES and not chunk[:64].any() and not chunk.any():
            if begin < start:
                yield begin, start
            begin = start + HOLE_BYTES
    if begin < len(data):
        yield begin, len(data)
