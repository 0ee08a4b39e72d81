"""Failures reported in one line: bad input, a failing disk, a model that computes NaN. Other exceptions are bugs."""

import errno
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType

import msgspec


class UserError(Exception):
    """Bad input, reported in one line: the value found, the value expected, and the remedy.

    The command line prints ``str(error)`` and exits with code 2.
    """

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(found, expected, remedy)
        self.found, self.expected, self.remedy = found, expected, remedy

    def __str__(self) -> str:
        return " ".join(f"{self.found} | expected {self.expected} | {self.remedy}".split())


def some_of(names: Sequence[str], most: int) -> str:
    """The first ``most`` names, for an error message."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def shortened(text: str, most: int = 60) -> str:
    """The first ``most`` characters, for an error message."""
    return text if len(text) <= most else f"{text[:most]}…"


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of a library written in Rust into a ValueError.

    A panic is not a Python ``Exception`` and prints its own backtrace, so standard error is redirected in the block.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error).partition("\n")[0]) from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


DAMAGED_JSON = (msgspec.MsgspecError, UnicodeError, RecursionError)  # what msgspec.json.decode raises
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_BROKEN = (errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
UNWRITABLE = (errno.EROFS, errno.EFBIG)


class NonFiniteError(RuntimeError):
    """A model computed NaN or infinity; the message names the first such tensor and the step.

    This is not a ``UserError``, because no user input causes it. The command line exits with code 1.
    """


@cache
def warn_once(message: str) -> None:
    """Log a warning, at most once per process for each message."""
    logging.getLogger("wan22").warning(message)


def disk_error(error: OSError, named: str = "") -> UserError | None:
    """The user error for a failure of the machine rather than of this program; None for any other error.

    Args:
        error: any OSError.
        named: the current output, used if the error names no file.
    """
    place = error.filename or named
    where = f" while writing {place}" if place else ""
    if error.errno in DISK_FULL:
        return UserError(f"disk full{where}", "free space", "free some and run again")
    if error.errno in DISK_BROKEN:
        found = f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror}{where}"
        return UserError(found, "a working disk", "see the system's log and run again")
    if error.errno in UNWRITABLE:
        return UserError(f"{error.strerror}{where}", "a writable place", "choose another")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{place}: {error.strerror}", "a shorter name", "choose another")
    if isinstance(error, PermissionError):
        found = f"{place}: {error.strerror}"
        return UserError(found, "permission for this user", "check the owner and mode of the file")
    return None


@contextmanager
def refusing_disk_errors(named: str, remedy: Callable[[], str] = str) -> Iterator[None]:
    """Turn an OSError of the block into its :func:`disk_error`, with ``remedy()`` appended; other errors propagate."""
    try:
        yield
    except OSError as error:
        if (refusal := disk_error(error, named)) is None:
            raise
        raise UserError(refusal.found, refusal.expected, refusal.remedy + remedy()) from error


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Ctrl-C in the block takes effect at its end. Only the main thread handles it; in others nothing changes."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[0])
