"""Load the weights of an engine that takes them as inputs (``wan-trt build --weights external``).

They occupy one block of device memory, filled from a copy in pinned host memory. The pinned copy is kept, so an expert
that was closed to free memory returns at bus speed. If the system cannot pin enough memory, they are read from disk.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from wan22.bundle import Component
from wan22.external_layout import read_layout

READ_AT_ONCE_BYTES = 2**26


class HostCopies:
    """Pinned copies of weights files, each read once."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._pinned: dict[Path, Any] = {}

    def pin(self, path: Path) -> Any | None:
        """The content of ``path`` in pinned memory; None if it cannot be allocated."""
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

    def clear(self) -> None:
        self._pinned.clear()


class ExternalWeights:
    """The weights of one component, on the device from :meth:`load` to :meth:`release`."""

    def __init__(self, cupy: Any, copies: HostCopies, folder: Path, component: Component) -> None:
        layout, content = component.weights
        self.path, self.size_bytes = folder / content.path, content.size_bytes
        self._places = read_layout(folder / layout.path)
        self._cupy, self._copies, self._memory = cupy, copies, None

    def load(self, stream: Any) -> dict[str, int]:
        """Copy the weights to the device; return their addresses by name. Raises CuPy's error when out of memory."""
        memory = self._memory = self._cupy.cuda.alloc(self.size_bytes)
        pinned = self._copies.pin(self.path)
        if pinned is not None:
            memory.copy_from_host_async(ctypes.c_void_p(pinned.ptr), self.size_bytes, stream)
        else:
            with self.path.open("rb", buffering=0) as file:
                for start in range(0, self.size_bytes, READ_AT_ONCE_BYTES):
                    piece = np.fromfile(file, np.uint8, min(READ_AT_ONCE_BYTES, self.size_bytes - start))
                    (memory + start).copy_from_host(ctypes.c_void_p(piece.ctypes.data), piece.size)
        return {place.name: int(memory.ptr) + place.offset for place in self._places}

    def release(self) -> None:
        self._memory = None


def _fill(view: "memoryview[int]", file: Any) -> None:
    done = 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
