"""Direct I/O (O_DIRECT) where the file system supports it, into reusable memory.

The page cache copies every byte once more, and once it is full the kernel must evict pages: together most of a core at
1 GB/s. Direct I/O requires that offset and memory are block-aligned. The kernel zeroes new memory first, which takes
longer than reading into it, so buffers are kept and reused.
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

BLOCK_BYTES = 4096  # no disk has larger blocks
AT_ONCE_BYTES = 2**22  # larger calls are slower
LARGE_BYTES = 2**20  # direct I/O does not pay off below
KEPT_BYTES = 2**29  # limit of memory kept for reuse
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)

Bytes = npt.NDArray[np.uint8]


def round_up_to_block(size_bytes: int) -> int:
    """``size_bytes`` rounded up to a multiple of the block size."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


class _Lent(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """An array that lives as long as any view of its memory."""


_kept: list[mmap] = []  # list operations are thread-safe


def aligned_memory(size_bytes: int) -> Bytes:
    """Block-aligned memory, kept for reuse once its last view is gone."""
    memory = _reuse(size_bytes)
    if memory is None:
        memory = mmap(-1, max(size_bytes, BLOCK_BYTES))
        memory.madvise(MADV_HUGEPAGE)
    lent = _Lent((size_bytes,), np.uint8, memory)  # type: ignore[arg-type]  # an mmap is a buffer
    finalize(lent, _keep, memory)
    return lent.view(np.ndarray)


def _reuse(size_bytes: int) -> mmap | None:
    for memory in sorted(_kept, key=len):
        if size_bytes <= len(memory) <= 2 * size_bytes:
            try:
                _kept.remove(memory)
            except ValueError:  # another thread took it
                continue
            return memory
    return None


def _keep(memory: mmap) -> None:
    if len(memory) >= LARGE_BYTES and sum(map(len, _kept)) + len(memory) <= KEPT_BYTES:
        _kept.append(memory)


def open_direct(path: Path, flags: int) -> int:
    """A file descriptor for direct I/O, or an ordinary one where the file system does not support it."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError:  # no O_DIRECT here; any other error occurs again
        return os.open(path, flags, 0o666)


def transfer_or_reopen(file: int, path: Path, transfer: Callable[[], int]) -> int:
    """Call ``transfer``, which reads or writes ``file``, the descriptor of :func:`open_direct` for ``path``.

    Some file systems accept O_DIRECT when opening but reject it later, immediately or at an unaligned end. The file is
    then reopened without O_DIRECT under the same descriptor, and ``transfer`` is called again. Returns its result.
    """
    try:
        return transfer()
    except OSError as error:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if error.errno not in REFUSALS or not flags & os.O_DIRECT:
            raise
    cached = os.open(path, flags & os.O_ACCMODE)
    os.dup2(cached, file, inheritable=False)
    os.close(cached)
    return transfer()


def read_direct(path: Path, place: int, size_bytes: int) -> Bytes:
    """``size_bytes`` of the file from offset ``place``, in separate memory.

    The file is not mapped, because mapped pages count as memory used. Data that went through the page cache anyway is
    dropped from it, or 126 GB of checkpoint would evict everything else.

    Raises:
        EOFError: the file ends earlier.
    """
    lead = place % BLOCK_BYTES
    memory, wanted, done = aligned_memory(round_up_to_block(lead + size_bytes)), lead + size_bytes, 0
    file = open_direct(path, os.O_RDONLY) if size_bytes >= LARGE_BYTES else os.open(path, os.O_RDONLY)
    try:
        while done < wanted:
            start = place - lead + done
            room = memory[done : done + AT_ONCE_BYTES].data
            count = transfer_or_reopen(file, path, partial(os.preadv, file, [room], start))
            if not count:
                raise EOFError(f"{path} ends after {start} bytes")
            os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)
            done += count
    finally:
        os.close(file)
    return memory[lead:wanted]
