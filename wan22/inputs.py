"""Refuse inputs that no program can read to an end: pipes, devices, and files too large for what they should hold."""

import stat
from pathlib import Path

from wan22.errors import UserError
from wan22.quantities import human_bytes

SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
SECRET_MOST_BYTES = 64 * 1024


def check_regular(path: Path) -> None:
    """Refuse a path that exists but is not a regular file: reading a pipe or device may block or never end."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return
    if kind in SPECIAL:
        raise UserError(f"{path} is {SPECIAL[kind]}", "a file", "copy its content into a file")


def read_small(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file of at most ``most_bytes``; of a larger one nothing more is read.

    Raises:
        UserError: it is larger, or not a regular file.
        OSError: there is no such file, or it cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        found = f"{path} is larger than {human_bytes(most_bytes, 0)}"
        raise UserError(found, "a short text file", "name another")
    return content


def secret_in(path: Path, option: str) -> str:
    """The text of a file that other users of the machine need not see, without the line break at its end."""
    try:
        return read_small(path, SECRET_MOST_BYTES).decode().strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: {error}", "a readable file", "name another") from None
