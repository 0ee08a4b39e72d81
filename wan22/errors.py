"""What is told in one line: bad input, and a model that computes NaN. Any other exception is a bug."""

import errno
import logging
from collections.abc import Sequence
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


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of OSErrors, the ones that are the user's to mend wherever they come from


class NonFiniteError(RuntimeError):
    """A model computed NaN or infinity; the message names the first such tensor and the step.

    No input of the user explains that, so it is no ``UserError``. The command line leaves with exit code 1.
    """


@cache
def warn_once(message: str) -> None:
    """Logs a warning; the same again in this process is not repeated."""
    logging.getLogger("wan22").warning(message)
