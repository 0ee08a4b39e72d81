"""The callback by which long work reports progress, independent of its display."""

from typing import Protocol


class Progress(Protocol):
    """Called with the task's name, the amount done and the total, both in ``unit`` ("steps", "tensors", "bytes")."""

    def __call__(self, task: str, done: int, total: int, unit: str = "") -> None: ...


def silent(task: str, done: int, total: int, unit: str = "") -> None:
    """A progress callback that does nothing."""
