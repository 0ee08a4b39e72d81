"""What a command leaves in the folder that the user named: every file whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from wan22.errors import UserError
from wan22.whole_file import whole_file


def check_writable(folder: Path) -> None:
    """Makes ``folder``, before the long work; raises UserError when it cannot be."""
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = f"cannot write the report to {folder}: {error.strerror}"
        raise UserError(found, "a writable folder with free space", "name another with -o") from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes contents by name into ``folder``, each file whole or not at all.

    Raises:
        UserError: the folder cannot be made or written.
    """
    check_writable(folder)
    for name, content in files.items():
        with _refusing(folder):
            _replace(folder / name, content)


def check_place(path: Path, what: str, *, make_folder: bool = False) -> None:
    """Raises UserError, before the long work, where no file can be written at ``path``; makes its folder if told to."""
    if make_folder:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found = f"{what} {path}: {error.strerror}"
            raise UserError(found, "a folder that can be written", "name another") from None
    if not path.absolute().parent.is_dir():
        raise UserError(f"{what} {path}: no such folder", "an existing folder", "make it first")
    if path.is_dir():
        raise UserError(f"{what} {path}: a folder", "the name of a file", "name one in it")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{what} {path}: its folder is read-only", "a folder that can be written", "name another")


def write_file(path: Path, content: bytes, what: str) -> None:
    """One file, whole or not at all. Raises UserError where it cannot be written."""
    try:
        _replace(path, content)
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}", "a file that can be written", "name another") from None


def _replace(path: Path, content: bytes) -> None:
    """So that a reader never meets half a file."""
    with whole_file(path) as partial:
        partial.write_bytes(content)
