"""Stages of a transformer on ONNX Runtime: weights are bound in place, and a thread reads blocks ahead from disk."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np

from runtime.block_files import BlockFiles, page_aligned
from runtime.engine_onnxruntime import new_session, refuse_out_of_memory
from wan22.block_layout import BlockLayout, Overlay, Place
from wan22.component import Stage, Tensor
from wan22.shapes import shape_of


class HostStages:
    """The device of :mod:`runtime.block_transformer` in host memory."""

    def __init__(self, folder: Path, stages: tuple[Stage, ...], layout: BlockLayout, files: Mapping[str, Path]) -> None:
        """``files`` are the experts' weights by name."""
        self._folder, self._stages = folder, {stage.name: stage for stage in stages}
        self._layout, self._files = layout, BlockFiles(files, layout)
        self._dtypes = {tensor.name: tensor.dtype for stage in stages for tensor in stage.weights}
        self._sessions: dict[str, Any] = {}
        self._copied: deque[float] = deque()  # seconds of copies, from the thread that makes them
        self._waited = 0.0
        self._thread: ThreadPoolExecutor | None = None
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        self._closing.enter_context(self._files)
        self._thread = self._closing.enter_context(ThreadPoolExecutor(1, "read-blocks"))
        for name, stage in self._stages.items():
            self._sessions[name] = new_session(self._folder / stage.graph.path, stage.graph.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._sessions.clear()
        self._closing.close()  # waits for the thread
        self._thread = None

    # -- computation

    def run(
        self,
        name: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        weights: Mapping[str, np.ndarray],
    ) -> None:
        """Run stage ``name`` into the arrays ``outputs``; all arrays are contiguous."""
        binding, stage = self._sessions[name].io_binding(), self._stages[name]
        used = {tensor.name: weights[tensor.name] for tensor in stage.weights}
        for key, array in (*inputs.items(), *used.items()):
            binding.bind_input(key, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for key, array in outputs.items():
            binding.bind_output(key, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        with refuse_out_of_memory(f"{name} of the transformer"):
            self._sessions[name].run_with_iobinding(binding)

    def empty(self, tensor: Tensor, **sizes: int) -> np.ndarray:
        return np.empty(shape_of(tensor, sizes), tensor.dtype)

    def put(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array)

    def get(self, array: np.ndarray) -> np.ndarray:
        return array

    def views(self, memory: np.ndarray, places: Sequence[Place]) -> dict[str, np.ndarray]:
        """The weights at ``places`` of ``memory``, except those beyond its end."""
        found = {}
        for place in places:
            end = place.offset + place.size_bytes
            if end <= len(memory):
                found[place.name] = memory[place.offset : end].view(self._dtypes[place.name]).reshape(place.shape)
        return found

    def read(self, expert: str, offset: int, size_bytes: int) -> np.ndarray:
        return self._files.read(expert, offset, size_bytes)

    def host_bytes(self, expert: str, offset: int, size_bytes: int) -> np.ndarray:
        return self._files.read(expert, offset, size_bytes)

    def use(self, expert: str, overlay: tuple[Path, Overlay] | None) -> None:
        """Ordered behind the reads of the thread, if it runs."""
        if self._thread is None:
            self._files.use(expert, overlay)
        else:
            self._thread.submit(self._files.use, expert, overlay).result()

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        target[...] = source

    # -- transfers

    def allocate(self, size_bytes: int) -> np.ndarray:
        with refuse_out_of_memory("weights of the transformer"):
            return page_aligned(size_bytes)

    def copy(self, expert: str, block: int, slot: np.ndarray, after: None) -> "Future[None]":  # noqa: ARG002
        """Computations run when they are called, so the last use of ``slot`` is over."""
        return self._read_ahead(expert, self._layout.region(block), slot)

    def refresh(self, expert: str, block: int, slot: np.ndarray, after: None) -> "Future[None]":  # noqa: ARG002
        start = self._layout.varying[0]
        return self._read_ahead(expert, self._layout.region(block) + start, slot[start:])

    def _read_ahead(self, expert: str, offset: int, memory: np.ndarray) -> "Future[None]":
        assert self._thread is not None
        return self._thread.submit(self._fill, expert, offset, memory)

    def _fill(self, expert: str, offset: int, slot: np.ndarray) -> None:
        started = perf_counter()
        self._files.fill(expert, offset, slot)
        self._copied.append(perf_counter() - started)

    def wait(self, event: "Future[None]") -> None:
        started = perf_counter()
        event.result()
        self._waited += perf_counter() - started

    def seconds(self) -> tuple[float, float]:
        copied, waited = [self._copied.popleft() for _ in range(len(self._copied))], self._waited
        self._waited = 0.0
        return sum(copied), waited

    def computed(self) -> None:
        return None
