"""Reading and writing past the system's cache, where the file system knows how, in memory that is used again.

Through the cache every byte is copied once more, and once memory is full of other files the system must find pages to
give up: together most of a core at a gigabyte in a second. Past it, offset and memory must both begin at a block. And
memory that the system hands out is zeroed first, which takes longer than to read into it; so it is kept.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from functools import partial
from mmap import MADV_HUGEPAGE, mmap
from pathlib import Path
from weakref import finalize

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 4096  # no disk's is larger
AT_ONCE_BYTES = 2**22  # more in one call is slower
LARGE_BYTES = 2**20  # smaller is not worth the trouble
KEPT_BYTES = 2**29  # of memory that waits for its next use
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)

Bytes = npt.NDArray[np.uint8]


def blocks_of(size_bytes: int) -> int:
    """``size_bytes`` and what is missing of the last block."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


class _Lent(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """Lives as long as any view of the memory below it."""


_kept: list[mmap] = []  # lists are safe between threads


def aligned(size_bytes: int) -> Bytes:
    """Memory that begins at a block; it is kept for the next when the last view of it is gone."""
    memory = _taken_up(size_bytes) or _new(size_bytes)
    lent = _Lent((size_bytes,), np.uint8, memory)  # type: ignore[arg-type]  # an mmap is a buffer
    finalize(lent, _keep, memory)
    return lent.view(np.ndarray)


def _new(size_bytes: int) -> mmap:
    memory = mmap(-1, max(size_bytes, BLOCK_BYTES))
    memory.madvise(MADV_HUGEPAGE)
    return memory


def _taken_up(size_bytes: int) -> mmap | None:
    for memory in sorted(_kept, key=len):
        if size_bytes <= len(memory) <= 2 * size_bytes:
            try:
                _kept.remove(memory)
            except ValueError:  # another thread was quicker
                continue
            return memory
    return None


def _keep(memory: mmap) -> None:
    if len(memory) >= LARGE_BYTES and sum(map(len, _kept)) + len(memory) <= KEPT_BYTES:
        _kept.append(memory)


def opened(path: Path, flags: int) -> int:
    """A descriptor that goes past the cache if the file system can."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError:  # one that cannot says so here; whatever else is wrong is told again
        return os.open(path, flags, 0o666)


def transferred(file: int, path: Path, transfer: Callable[[], int]) -> int:
    """What ``transfer`` returns, which reads or writes ``file``, the descriptor that :func:`opened` gave for ``path``.

    Some file systems open a file past the cache and only then refuse to use it so, at once or where something ended
    within a block. It is opened anew under the same number then, since theirs may have been told how it was opened.
    """
    try:
        return transfer()
    except OSError as error:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if error.errno not in REFUSALS or not flags & os.O_DIRECT:
            raise
    through = os.open(path, flags & os.O_ACCMODE)
    os.dup2(through, file, inheritable=False)
    os.close(through)
    return transfer()


def read_past(path: Path, place: int, size_bytes: int) -> Bytes:
    """``size_bytes`` from ``place`` of the file, in memory of their own.

    Not mapped, because what is mapped counts as memory used. What went through the cache all the same is forgotten, or
    126 GB of checkpoint would push everything else out of it.
    """
    lead = place % BLOCK_BYTES
    memory, wanted, done = aligned(blocks_of(lead + size_bytes)), lead + size_bytes, 0
    file = opened(path, os.O_RDONLY) if size_bytes >= LARGE_BYTES else os.open(path, os.O_RDONLY)
    try:
        while done < wanted:
            start = place - lead + done
            room = memory[done : done + AT_ONCE_BYTES].data
            count = transferred(file, path, partial(os.preadv, file, [room], start))
            if not count:
                raise EOFError(f"{path} ends after {start} bytes")
            os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)
            done += count
    finally:
        os.close(file)
    return memory[lead:wanted]
