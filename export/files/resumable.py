"""A bundle under way that survives a kill: a hidden folder beside it, and a journal of what of it is known to be right.

The journal's first line says what the bundle is made of; every other line is a file, how much of it was written, and
the hash of that much. An export of the same thing that starts again hashes those prefixes and goes on where they end;
anything else starts afresh. The journal lies beside the bundle in the hidden folder (:mod:`wan22.files`).
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from wan22.bundle import File, refuse_existing
from wan22.errors import DISK_FULL
from wan22.files import claim, hidden_folder

if TYPE_CHECKING:
    from hashlib import _Hash

JOURNAL = "wan-trt.journal"
HASHED_AT_ONCE_BYTES = 2**22


class Journal:
    """Prefixes of files and their hashes, one JSON line each, behind a line that says what they are made of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("ab+", buffering=0)
        self._prefixes: list[File] = []

    def begin(self, folder: Path, made_of: str) -> None:
        """Goes on with what is known of ``folder`` if it is made of the same; removes the rest."""
        self._stream.seek(0)
        first, *lines = self._stream.read().splitlines() or [b""]
        if first.decode(errors="replace") == made_of:
            self._prefixes = list(_readable(lines))
        else:
            self._stream.truncate(0)
            self._stream.write(f"{made_of}\n".encode())
        known = {prefix.path for prefix in self._prefixes}
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in known:
                path.unlink()

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
    return hidden_folder(folder) / folder.absolute().name


def kept_bytes(folder: Path) -> int:
    """What an interrupted export to ``folder`` has on the disk already."""
    return sum(path.stat().st_size for path in partial_folder(folder).rglob("*") if path.is_file())


@contextmanager
def resumable(folder: Path, made_of: str, *, overwrite: bool = False) -> Iterator[tuple[Path, Journal]]:
    """Yields the folder to write to, which becomes ``folder`` when the block ends well, and its journal.

    What is finished stays for the next try after a kill, Ctrl-C or a full disk; after any other error nothing does.

    Raises:
        UserError: as :func:`wan22.files.claim` and :func:`wan22.bundle.refuse_existing`.
    """
    refuse_existing(folder, overwrite=overwrite)
    with claim(folder, resume=True) as claimed:
        claimed.new.mkdir(exist_ok=True)
        journal = Journal(claimed.folder / JOURNAL)
        try:
            journal.begin(claimed.new, made_of)
            yield claimed.new, journal
            claimed.publish()
        except KeyboardInterrupt:
            claimed.keep = journal.worth_keeping
            raise
        except OSError as error:
            claimed.keep = error.errno in DISK_FULL
            raise
        finally:
            journal.close()
