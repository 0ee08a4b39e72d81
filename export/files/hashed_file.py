"""Hash a file while writing it with direct I/O.

Three stages run in parallel: the caller fills a block-aligned buffer, one thread hashes the previous buffer, and a
second thread writes it to disk.
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

from export.files.direct_io import (
    BLOCK_BYTES,
    Bytes,
    aligned_memory,
    open_direct,
    round_up_to_block,
    transfer_or_reopen,
)
from wan22.component import File

if TYPE_CHECKING:
    from hashlib import _Hash

BUFFERS, BUFFER_BYTES = 4, 2**24
HOLE_BYTES = 2**18  # aligned runs of this many zeros become holes


@dataclass(frozen=True, eq=False)
class _Buffer:
    data: Bytes
    busy: list[Future[None]] = field(default_factory=list)  # tasks that still read it

    def wait(self) -> None:
        while self.busy:
            self.busy.pop().result()


class HashedFile:
    """Keep the first ``begun`` bytes of the file at ``path`` and append to them; ``digest`` is their hash so far."""

    def __init__(self, path: Path, begun: int = 0, digest: "_Hash | None" = None) -> None:
        self._path, self._digest = path, digest or hashlib.sha256()
        self._file = open_direct(path, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(self._file, begun)
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._all = [_Buffer(aligned_memory(BUFFER_BYTES)) for _ in range(BUFFERS)]
        self._next = cycle(self._all)
        self._buffer = next(self._next)
        self._start = begun // BLOCK_BYTES * BLOCK_BYTES  # offset of the buffer in the file
        self._filled = self._hashed = begun - self._start  # bytes in the buffer
        with path.open("rb") as file:
            file.seek(self._start)
            self._buffer.data[: self._filled] = np.frombuffer(file.read(self._filled), np.uint8)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        os.close(self._file)

    def put(self, data: Bytes) -> None:
        """Append ``data``; the caller may change it afterwards."""
        while len(data):
            room = self._buffer.data[self._filled :]
            taken = min(len(room), len(data))
            room[:taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            if taken == len(room):
                self._flush()

    def written(self) -> File:
        """Write everything to disk and return the file's manifest entry."""
        self._flush()
        for buffer in self._all:
            buffer.wait()
        size = self._start + self._filled
        os.ftruncate(self._file, size)
        return File(self._path.name, self._digest.hexdigest(), size)

    def _flush(self) -> None:
        """Hash and write the buffer; an incomplete last block is also copied to the start of the next buffer."""
        whole = round_up_to_block(self._filled)
        begun = self._filled % BLOCK_BYTES
        full, self._buffer = self._buffer, next(self._next)
        self._buffer.wait()
        self._buffer.data[:begun] = full.data[self._filled - begun : self._filled]
        full.data[self._filled : whole] = 0
        full.busy.append(self._hasher.submit(self._digest.update, full.data[self._hashed : self._filled].data))
        full.busy.append(self._writer.submit(_write, self._file, self._path, full.data[:whole], self._start))
        self._start += self._filled - begun
        self._filled = self._hashed = begun


def _write(file: int, path: Path, data: Bytes, place: int) -> None:
    for begin, end in _without_holes(data):
        done = begin
        while done < end:  # a write may be short on a nearly full disk
            done += transfer_or_reopen(file, path, partial(os.pwrite, file, data[done:end].data, place + done))


def _without_holes(data: Bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each range of ``data`` between holes."""
    begin = 0
    for start in range(0, len(data), HOLE_BYTES):
        chunk = data[start : start + HOLE_BYTES]
        if len(chunk) == HOLE_BYTES and not chunk[:64].any() and not chunk.any():
            if begin < start:
                yield begin, start
            begin = start + HOLE_BYTES
    if begin < len(data):
        yield begin, len(data)
