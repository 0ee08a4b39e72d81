"""Weights files in pinned host memory, from which a GPU copies at bus speed."""

import threading
from pathlib import Path
from typing import Any

import numpy as np


class HostCopies:
    """Pinned copies of weights files, each read once. Several GPUs may share them."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._pinned: dict[Path, Any] = {}
        self._one_at_a_time = threading.Lock()

    def pin(self, path: Path) -> Any | None:
        """The content of ``path`` in pinned memory; None if it cannot be allocated."""
        with self._one_at_a_time:
            return self._pin(path)

    def _pin(self, path: Path) -> Any | None:
        if path not in self._pinned:
            size = path.stat().st_size
            try:
                memory = self._cupy.cuda.PinnedMemoryPointer(self._cupy.cuda.PinnedMemory(size), 0)
            except self._cupy.cuda.runtime.CUDARuntimeError:
                return None
            with path.open("rb", buffering=0) as file:
                _fill(np.frombuffer(memory, np.uint8, size).data, file)
            self._pinned[path] = memory
        return self._pinned[path]

    def drop(self, path: Path) -> None:
        """Free the copy of ``path``; nothing is copied from it any more."""
        self._pinned.pop(path, None)

    def clear(self) -> None:
        self._pinned.clear()


def _fill(view: "memoryview[int]", file: Any) -> None:
    done = 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
