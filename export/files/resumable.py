"""A resumable bundle: a hidden folder next to the final one, and a journal of the progress.

The journal's first line identifies the input; every other line names a file, the number of bytes written so far, and
their hash. A new export of the same input verifies these prefixes and resumes where they end; any other input starts
from scratch. The journal is stored next to the bundle inside the hidden folder (:mod:`wan22.files`).
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from wan22.bundle import refuse_existing
from wan22.component import File
from wan22.errors import DAMAGED_JSON, DISK_FULL
from wan22.files import claim, hidden_folder

if TYPE_CHECKING:
    from hashlib import _Hash

JOURNAL = "wan-trt.journal"
HASHED_AT_ONCE_BYTES = 2**22


class Journal:
    """Prefixes of files and their hashes, one JSON line each, after a line that identifies the input."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("ab+", buffering=0)
        self._prefixes: list[File] = []

    def begin(self, folder: Path, made_of: str) -> None:
        """Keep the recorded files of ``folder`` if the input is the same; remove everything else."""
        self._stream.seek(0)
        first, *lines = self._stream.read().splitlines() or [b""]
        if first.decode(errors="replace") == made_of:
            with suppress(*DAMAGED_JSON):  # a kill may have truncated the last line
                for line in lines:
                    self._prefixes.append(msgspec.json.decode(line, type=File))
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

    def verify(self, path: Path) -> tuple[int, "_Hash"]:
        """The number of intact bytes at the start of ``path``, and their hash object."""
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


def partial_folder(folder: Path) -> Path:
    return hidden_folder(folder) / folder.absolute().name


def kept_bytes(folder: Path) -> int:
    """The bytes that an interrupted export to ``folder`` left on disk."""
    return sum(path.stat().st_size for path in partial_folder(folder).rglob("*") if path.is_file())


@contextmanager
def resumable_folder(folder: Path, made_of: str, *, overwrite: bool = False) -> Iterator[tuple[Path, Journal]]:
    """Yield the folder to write to, which becomes ``folder`` if the block succeeds, and its journal.

    After a kill, Ctrl-C or a full disk, recorded progress stays for the next attempt; any other error removes it.

    Raises:
        UserError: see :func:`wan22.files.claim` and :func:`wan22.bundle.refuse_existing`.
    """
    refuse_existing(folder, "graphs", overwrite=overwrite)
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
