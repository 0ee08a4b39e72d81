"""Calls of an engine with fixed shapes, recorded once as a CUDA graph and replayed."""

from collections.abc import Mapping
from typing import Any


class RecordedCalls:
    """A call recorded as a CUDA graph: the same kernels on the same addresses, launched as one."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._arrays: dict[tuple[Any, ...], Any] = {}
        self._graphs: dict[tuple[int, ...], Any] = {}

    def kept(self, side: str, arrays: Mapping[str, Any], *, copy: bool) -> dict[str, Any]:
        """``arrays`` at the addresses that earlier calls used for these names and shapes."""
        found = {}
        for name, array in arrays.items():
            key = (side, name, tuple(array.shape))
            if key not in self._arrays:
                self._arrays[key] = array.copy() if copy else array
            elif copy:
                self._arrays[key][...] = array
            found[name] = self._arrays[key]
        return found

    def run(self, key: tuple[int, ...], enqueue: Any) -> None:
        """The first call of a kind just runs (kernels load), the second is recorded, later ones are replayed."""
        stream = self._stream
        if key not in self._graphs:
            enqueue()
            self._graphs[key] = None
            return
        if self._graphs[key] is None:
            stream.begin_capture()
            enqueue()
            self._graphs[key] = stream.end_capture()
        self._graphs[key].launch(stream)

    def forget(self) -> None:
        self._arrays.clear()
        self._graphs.clear()
