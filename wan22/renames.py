"""Syncing and renaming: after a crash or a power cut a name belongs to the old content or to the new."""

import ctypes
import errno
import os
from pathlib import Path

RENAME_EXCHANGE, AT_FDCWD = 2, -100  # linux/fs.h, fcntl.h
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)
NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP)  # of folders, on some file systems
EARLIER = "wan-trt.earlier"


def sync_tree(path: Path) -> None:
    """Returns when the file, or the folder with everything in it, is on the disk."""
    inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
    for each in (*inside, path):
        if not each.is_symlink():
            sync(each)


def sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def exchange(new: Path, old: Path, beside: Path) -> None:
    """Swaps the names of two folders: in one step, or on file systems that cannot by way of the folder ``beside``.

    Whatever fails or ends the process, one of the two has the name of ``old`` when :func:`put_back` has run.
    """
    try:
        _swap(new, old)
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
        (beside / EARLIER).mkdir()
        old.rename(beside / EARLIER / old.name)
        try:
            new.rename(old)
        finally:
            put_back(beside)


def _swap(one: Path, other: Path) -> None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def put_back(beside: Path) -> None:
    """Gives its name back to what an :func:`exchange` that did not finish left in ``beside``, a folder next to it."""
    for old in (beside / EARLIER).glob("*"):
        if not (beside.parent / old.name).exists():
            old.rename(beside.parent / old.name)
