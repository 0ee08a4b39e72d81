"""The weights files of a transformer in stages, open for reading at any offset."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from wan22.block_layout import BlockLayout, Overlay
from wan22.errors import UserError

PAGE_BYTES = 4096


class Piece(NamedTuple):
    """Bytes of a file and their place in what is asked for."""

    path: Path
    offset: int
    start: int
    size_bytes: int


class BlockFiles:
    """The files of experts with the same ``layout``, by their names. Use it as a context manager.

    An expert may have an overlay, which replaces parts of its file.
    """

    def __init__(self, paths: Mapping[str, Path], layout: BlockLayout) -> None:
        self.paths, self._layout = paths, layout
        self._open: dict[Path, int] = {}
        self._overlays: dict[str, tuple[Path, list[tuple[int, int, int]]]] = {}

    def __enter__(self) -> Self:
        for path in self.paths.values():
            self._descriptor(path)
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def use(self, expert: str, overlay: tuple[Path, Overlay] | None) -> None:
        """Replace parts of the file of ``expert`` from now on. Nothing may be read meanwhile."""
        before, _ = self._overlays.pop(expert, (None, []))
        if before in self._open:
            os.close(self._open.pop(before))
        if overlay is not None:
            self._overlays[expert] = overlay[0], overlay[1].replaced(self._layout)

    def overlay_of(self, expert: str) -> Path | None:
        return self._overlays[expert][0] if expert in self._overlays else None

    def read(self, expert: str, offset: int, size_bytes: int) -> np.ndarray:
        """Bytes of the file of ``expert`` in new memory that starts on a page."""
        memory = page_aligned(size_bytes)
        self.fill(expert, offset, memory)
        return memory

    def fill(self, expert: str, offset: int, memory: np.ndarray) -> None:
        """Read as many bytes as ``memory`` holds.

        Raises:
            UserError: a file ends before.
        """
        for piece in self.pieces(expert, offset, len(memory)):
            self._read(piece, memory[piece.start : piece.start + piece.size_bytes])

    def pieces(self, expert: str, offset: int, size_bytes: int) -> Iterator[Piece]:
        """Where bytes of the file of ``expert`` are; later pieces replace parts of earlier ones."""
        yield Piece(self.paths[expert], offset, 0, size_bytes)
        path, replaced = self._overlays.get(expert, (Path(), []))
        for at, place, size in replaced:
            first, end = max(offset, at), min(offset + size_bytes, at + size)
            if first < end:
                yield Piece(path, place + first - at, first - offset, end - first)

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def _read(self, piece: Piece, memory: np.ndarray) -> None:
        descriptor, done = self._descriptor(piece.path), 0
        while done < len(memory):
            count = os.preadv(descriptor, [memory.data[done:]], piece.offset + done)
            if not count:
                found = f"{piece.path} ends at {piece.path.stat().st_size} bytes"
                raise UserError(found, f"{self._layout.size_bytes}", "run wan-trt build again")
            done += count


def page_aligned(size_bytes: int) -> np.ndarray:
    memory = np.empty(size_bytes + PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % PAGE_BYTES
    return memory[start : start + size_bytes]
