"""Sync and rename so that after a crash or a power cut a name belongs to the old content or to the new."""

import ctypes
import errno
import os
from pathlib import Path

RENAME_EXCHANGE, AT_FDCWD = 2, -100  # linux/fs.h, fcntl.h
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)
NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP)  # some file systems cannot sync folders
EARLIER = "wan-trt.earlier"


def sync_tree(path: Path) -> None:
    """Return when the file, or the folder with everything in it, is on the disk."""
    inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
    for each in (*inside, path):
        if not each.is_symlink():
            sync(each)


def sync(path: Path) -> None:
    """Return when the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def exchange(new: Path, old: Path, hidden: Path) -> None:
    """Swap the names of two folders in one step, or through ``hidden`` on file systems that cannot do that.

    After any failure, one of the two has the name of ``old`` once :func:`put_back` has run.
    """
    try:
        _swap(new, old)
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
        (hidden / EARLIER).mkdir()
        old.rename(hidden / EARLIER / old.name)
        try:
            new.rename(old)
        finally:
            put_back(hidden)


def _swap(one: Path, other: Path) -> None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # the C library lacks it
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def put_back(hidden: Path) -> None:
    """Move the old folder of an unfinished :func:`exchange` from ``hidden`` back to its place next to it."""
    for old in (hidden / EARLIER).glob("*"):
        if not (hidden.parent / old.name).exists():
            old.rename(hidden.parent / old.name)
