"""What is told in one line: bad input, a disk that fails, a model that computes NaN. Any other exception is a bug."""

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache


class UserError(Exception):
    """Bad input, said in one line: what was found, what was expected, what to do about it.

    The command line prints ``str(error)`` and leaves with exit code 2.
    """

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(found, expected, remedy)
        self.found, self.expected, self.remedy = found, expected, remedy

    def __str__(self) -> str:
        return " ".join(f"{self.found} | expected {self.expected} | {self.remedy}".split())


def some_of(names: Sequence[str], most: int) -> str:
    """The first ``most`` names, for an error."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_BROKEN = (errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
UNWRITABLE = (errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG)


class NonFiniteError(RuntimeError):
    """A model computed NaN or infinity; the message names the first such tensor and the step.

    No input of the user explains that, so it is no ``UserError``. The command line leaves with exit code 1.
    """


@cache
def warn_once(message: str) -> None:
    """Logs a warning; the same again in this process is not repeated."""
    logging.getLogger("wan22").warning(message)


def disk_error(error: OSError, named: str = "") -> UserError | None:
    """The line for an error that comes from the machine, not from this program; None for any other.

    Args:
        error: wherever it comes from.
        named: the output under way, for an error that names no file.
    """
    place = error.filename or named
    where = f" while writing {place}" if place else ""
    if error.errno in DISK_FULL:
        return UserError(f"disk full{where}", "free space", "free some and run again")
    if error.errno in DISK_BROKEN:
        found = f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror}{where}"
        return UserError(found, "disks that work", "see the system's log and run again")
    if error.errno in UNWRITABLE:
        return UserError(f"{error.strerror}{where}", "a place that can be written", "choose another")
    if isinstance(error, PermissionError):
        found = f"{place}: {error.strerror}"
        return UserError(found, "what this user may use", "change its mode or the user")
    return None


@contextmanager
def refusing_disk_errors(named: str, remedy: Callable[[], str] = str) -> Iterator[None]:
    """Turns a :func:`disk_error` of the block into one line, with ``remedy()`` at its end; others pass."""
    try:
        yield
    except OSError as error:
        if (told := disk_error(error, named)) is None:
            raise
        raise UserError(told.found, told.expected, told.remedy + remedy()) from error
