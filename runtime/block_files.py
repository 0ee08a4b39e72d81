"""The weights files of a transformer in stages, open for reading at any offset."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from wan22.block_layout import BlockLayout
from wan22.errors import UserError

PAGE_BYTES = 4096


class BlockFiles:
    """The files of experts with the same ``layout``, by their names. Use it as a context manager."""

    def __init__(self, paths: Mapping[str, Path], layout: BlockLayout) -> None:
        self.paths, self._layout = paths, layout
        self._open: dict[str, int] = {}

    def __enter__(self) -> Self:
        for name, path in self.paths.items():
            self._open[name] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, expert: str, offset: int, size_bytes: int) -> np.ndarray:
        """Bytes of the file of ``expert`` in new memory that starts on a page."""
        memory = page_aligned(size_bytes)
        self.fill(expert, offset, memory)
        return memory

    def fill(self, expert: str, offset: int, memory: np.ndarray) -> None:
        """Read as many bytes as ``memory`` holds.

        Raises:
            UserError: the file ends before.
        """
        done = 0
        while done < len(memory):
            count = os.preadv(self._open[expert], [memory.data[done:]], offset + done)
            if not count:
                found = f"{self.paths[expert]} ends at {self.paths[expert].stat().st_size} bytes"
                raise UserError(found, f"{self._layout.size_bytes}", "run wan-trt build again")
            done += count


def page_aligned(size_bytes: int) -> np.ndarray:
    memory = np.empty(size_bytes + PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % PAGE_BYTES
    return memory[start : start + size_bytes]
