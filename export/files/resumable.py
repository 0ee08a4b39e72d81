"""A bundle under way that survives a kill: a hidden folder beside it, and a journal of what of it is known to be right.

The journal's first line says what the bundle is made of; every other line is a file, how much of it was written, and
the hash of that much. An export of the same thing that starts again hashes those prefixes and goes on where they end;
anything else starts afresh. The journal is locked while its export runs. The folder gets its real name, and loses the
journal, only when the bundle is whole.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from wan22.bundle import File, refuse_existing
from wan22.errors import DISK_FULL, UserError

if TYPE_CHECKING:
    from hashlib import _Hash

JOURNAL = "journal.jsonl"
HASHED_AT_ONCE_BYTES = 2**22


class Journal:
    """Prefixes of files and their hashes, one JSON line each, behind a line that says what they are made of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("ab+", buffering=0)
        self._prefixes: list[File] = []

    def lock(self) -> bool:
        """Whether this is the only one that writes here. The folder may have got its real name meanwhile."""
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._stream.fileno()), self.path.stat())
        except (BlockingIOError, FileNotFoundError):
            return False

    def begin(self, made_of: str) -> None:
        """Goes on with what is there if it is made of the same, else deletes it."""
        self._stream.seek(0)
        first, *lines = self._stream.read().splitlines() or [b""]
        if first.decode(errors="replace") == made_of:
            self._prefixes = list(_readable(lines))
            return
        for other in self.path.parent.iterdir():
            if other != self.path:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        self._stream.truncate(0)
        self._stream.write(f"{made_of}\n".encode())

    @property
    def worth_keeping(self) -> bool:
        return bool(self._prefixes)

    def record(self, prefix: File) -> None:
        self._prefixes.append(prefix)
        self._stream.write(msgspec.json.encode(prefix) + b"\n")

    def verified(self, path: Path) -> tuple[int, "_Hash"]:
        """How many bytes of ``path`` are as they were written, and their hash, to be continued."""
        known, size_bytes = hashlib.sha256(), 0
        if not path.is_file():
            return size_bytes, known
        with path.open("rb") as stream:
            for prefix in (p for p in self._prefixes if p.path == path.name):
                digest, left = known.copy(), prefix.size_bytes - size_bytes
                while left and (piece := stream.read(min(left, HASHED_AT_ONCE_BYTES))):
                    digest.update(piece)
                    left -= len(piece)
                if digest.hexdigest() != prefix.sha256:
                    break
                known, size_bytes = digest, prefix.size_bytes
        return size_bytes, known

    def close(self) -> None:
        self._stream.close()


def _readable(lines: list[bytes]) -> Iterator[File]:
    """A kill may have cut the last line off."""
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=File)
        except msgspec.DecodeError:
            return


def partial_folder(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def kept_bytes(folder: Path) -> int:
    """What an interrupted export to ``folder`` has on the disk already."""
    return sum(path.stat().st_size for path in partial_folder(folder).rglob("*") if path.is_file())


@contextmanager
def resumable(folder: Path, made_of: str, *, overwrite: bool = False) -> Iterator[tuple[Path, Journal]]:
    """Yields the folder to write to, which becomes ``folder`` when the block ends well, and its journal.

    What is finished stays for the next try after a kill, Ctrl-C or a full disk; after any other error nothing does.

    Raises:
        UserError: no writable place, ``folder`` exists, a full disk, or another process writes the same bundle.
    """
    partial = partial_folder(folder)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(partial / JOURNAL)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", "a writable place", "choose another") from error
    try:
        if not journal.lock():
            raise UserError(f"another export writes {folder}", "one at a time", "wait for it or choose another folder")
        with _renamed(partial, folder, journal, overwrite=overwrite):
            journal.begin(made_of)
            yield partial, journal
    finally:
        journal.close()


@contextmanager
def _renamed(partial: Path, folder: Path, journal: Journal, *, overwrite: bool) -> Iterator[None]:
    keep = False
    try:
        refuse_existing(folder, overwrite=overwrite)
        yield
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        journal.path.unlink()
        partial.rename(folder)
    except KeyboardInterrupt:
        keep = journal.worth_keeping
        raise
    except OSError as error:
        keep = error.errno in DISK_FULL
        if not keep:
            raise
        remedy = f"free some and run again to go on, or delete {partial}"
        raise UserError(f"disk full while writing {folder}", "free space", remedy) from error
    finally:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
