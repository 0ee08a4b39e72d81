"""The shared memory of a server: a folder and Triton's regions under one prefix, removed together.

The folder is locked while a process of its server lives, so the next server to start can recognise and remove the
memory of killed servers. Standard library only.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
FOLDER, LOCK = "server", "lock"
OWN_PREFIX = re.compile(r"(wan22_[0-9a-f]{8}_)server")


def remove_regions(prefix: str) -> None:
    """Remove everything in shared memory whose name begins with ``prefix``."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        if region.is_dir() and not region.is_symlink():
            shutil.rmtree(region, ignore_errors=True)
        else:
            region.unlink(missing_ok=True)


def close_regions(prefix: str) -> None:
    """Remove other users' access, which Triton grants despite the umask, to the regions with requests and videos."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        with suppress(FileNotFoundError):
            region.chmod(region.stat().st_mode & ~0o077)


def remove_dead_servers() -> None:
    """Remove the memory of this user's servers that have no living process."""
    for folder in SHARED_MEMORY.glob(f"wan22_*{FOLDER}"):
        prefix = OWN_PREFIX.fullmatch(folder.name)
        if prefix and folder.lstat().st_uid == os.getuid() and not _is_locked(folder / LOCK):
            remove_regions(prefix[1])


@contextmanager
def server_folder(prefix: str) -> Iterator[tuple[Path, int]]:
    """Create a private folder; yield it and the descriptor of its lock, which the server inherits.

    At the end of the block everything under ``prefix`` is removed.
    """
    remove_dead_servers()
    folder = SHARED_MEMORY / f"{prefix}{FOLDER}"
    hidden = folder.with_name(f".{folder.name}")  # until it is locked
    hidden.mkdir(mode=0o700)
    lock = os.open(hidden / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(folder)
        yield folder, lock
    finally:
        remove_regions(prefix)
        os.close(lock)


def _is_locked(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
