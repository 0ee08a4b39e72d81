"""How long work tells its caller where it stands, without knowing who draws the bar."""

from typing import Protocol


class Progress(Protocol):
    """Called with the name of the work, what is done and the total, both in ``unit`` ("steps", "tensors", "bytes")."""

    def __call__(self, task: str, done: int, total: int, unit: str = "") -> None: ...


def silent(task: str, done: int, total: int, unit: str = "") -> None:
    """The progress of a caller who does not want any."""
