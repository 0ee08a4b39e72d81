"""Stages of a transformer on TensorRT and TensorRT-RTX: weights are bound as base plus offset, blocks stream past.

Computations run on the pipeline's stream, copies of weights on a second one. Weights come from pinned host memory, or
from disk through two pinned buffers that a thread fills; that is also how a system is served that cannot pin a whole
file. 16-bit and FP8 arrays are integers of the same size here: CuPy only moves them.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np

from runtime.block_files import BlockFiles
from runtime.built_for import check_plan
from runtime.engine_tensorrt import Device
from wan22.block_layout import BlockLayout, Overlay, Place
from wan22.component import Component, Stage, Tensor
from wan22.errors import UserError
from wan22.quantities import human_bytes
from wan22.shapes import Profile, fitting_profile, own_profiles, shape_of, sizes_of

log = logging.getLogger(__name__)

AS_INTEGERS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
KIBIBYTE = 2**10  # the unit of ulimit -l
RING = 2  # pinned buffers between disk and device


class GpuStages:
    """The device of :mod:`runtime.block_transformer` on a GPU."""

    def __init__(
        self,
        device: Device,
        experts: Sequence[Component],
        layout: BlockLayout,
        folder: Path,
        profiles: Sequence[Profile],
        *,
        from_disk: bool,
    ) -> None:
        """``experts`` have the same stages. ``from_disk`` streams without a copy of the weights in host memory."""
        self._device, self._component, self._layout, self._folder = device, experts[0], layout, folder
        self._stages = {stage.name: stage for stage in experts[0].stages}
        self._profiles = {stage.name: own_profiles(profiles, stage.inputs) for stage in experts[0].stages}
        self._files = BlockFiles({expert.name: folder / expert.weights[1].path for expert in experts}, layout)
        self._from_disk = from_disk
        self._contexts: dict[str, Any] = {}
        self._profile_in_use: dict[str, int] = {}
        self._copied: deque[tuple[Any, Any]] = deque()  # events around every copy, and around every wait for one
        self._waited: deque[tuple[Any, Any]] = deque()
        self._read: deque[float] = deque()  # seconds of reads into the ring
        self._thread: ThreadPoolExecutor | None = None
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        device, cupy = self._device, self._device.cupy
        device.release()
        self._closing.enter_context(self._files)
        self._thread = self._closing.enter_context(ThreadPoolExecutor(1, "read-blocks"))
        self._copies = cupy.cuda.Stream(non_blocking=True)
        self._ring = [self._pinned(self._layout.step_bytes) for _ in range(RING)] if self._from_disk else []
        self._ring_used: list[Any] = [None] * RING
        self._turn = 0
        for stage in self._stages.values():
            self._contexts[stage.name] = self._context(stage)
        return self

    def __exit__(self, *_: object) -> None:
        self._device.stream.synchronize()
        self._closing.close()  # waits for the thread
        self._thread = None
        self._copies.synchronize()
        self._contexts.clear()
        self._ring = []

    def _context(self, stage: Stage) -> Any:
        """A context that takes other addresses in every call, so that no call may be recorded as a graph."""
        device, engine = self._device, self._device.plan(self._folder / stage.graph.path, shared=True)
        (part,) = (c for c in self._component.compiled() if c.graph == stage.graph)
        if device.manifest is not None:
            check_plan(str(engine.name), device.manifest, part)
        self._profile_in_use[stage.name] = 0
        kernels = device.kept_kernels(self._folder, part)
        if kernels is not None:
            self._closing.callback(kernels.save)
        return device.new_context(engine, kernels, fixed=False)

    # -- computation, on the pipeline's stream

    def run(self, name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        """Enqueue stage ``name``; ``weights`` are pointers."""
        context, stage, stream = self._contexts[name], self._stages[name], self._device.stream
        shapes = {key: array.shape for key, array in inputs.items()}
        profile = fitting_profile(sizes_of(stage.inputs, shapes), self._profiles[name])
        if profile != self._profile_in_use[name]:
            context.set_optimization_profile_async(profile, stream.ptr)
            self._profile_in_use[name] = profile
        for key, shape in shapes.items():
            if not context.set_input_shape(key, tuple(shape)):
                raise RuntimeError(f"{name}: TensorRT refused shape {shape} of {key}")
        addresses = {key: int(array.data.ptr) for key, array in (*inputs.items(), *outputs.items())}
        for key, address in addresses.items() | {(t.name, int(weights[t.name].ptr)) for t in stage.weights}:
            context.set_tensor_address(key, address)
        needed = int(context.update_device_memory_size_for_shapes())
        context.set_device_memory(self._device.arena(needed) if needed else 0, needed)
        if not context.execute_async_v3(stream.ptr):
            raise RuntimeError(f"{name}: TensorRT could not run the engine; see its log")

    def empty(self, tensor: Tensor, **sizes: int) -> Any:
        cupy = self._device.cupy
        try:
            with self._device.stream:
                return cupy.empty(shape_of(tensor, sizes), AS_INTEGERS.get(tensor.dtype, tensor.dtype))
        except cupy.cuda.memory.OutOfMemoryError:
            raise self._device.out_of_memory(f"{tensor.name} of the transformer") from None

    def put(self, array: np.ndarray) -> Any:
        with self._device.stream:
            return self._device.cupy.asarray(np.ascontiguousarray(array))

    def get(self, array: Any) -> np.ndarray:
        """A host copy, once all computations are done."""
        with self._device.stream:
            host: np.ndarray = array.get(stream=self._device.stream)
        self._device.stream.synchronize()
        return host

    def move(self, source: Any, target: Any) -> None:
        with self._device.stream:
            target[...] = source

    def views(self, memory: Any, places: Sequence[Place]) -> dict[str, Any]:
        """Pointers, which keep ``memory`` allocated."""
        return {place.name: memory + place.offset for place in places}

    def read(self, expert: str, offset: int, size_bytes: int) -> Any:
        """A part of the weights of ``expert``. The copy is ordered behind all earlier readers of reused memory."""
        memory, host = self.allocate(size_bytes), self._files.read(expert, offset, size_bytes)
        memory.copy_from_host_async(ctypes.c_void_p(host.ctypes.data), size_bytes, self._device.stream)
        self._device.stream.synchronize()  # ``host`` is freed on return
        return memory

    def host_bytes(self, expert: str, offset: int, size_bytes: int) -> np.ndarray:
        return self._files.read(expert, offset, size_bytes)

    # -- transfers, on the stream of copies

    def allocate(self, size_bytes: int) -> Any:
        try:
            with self._device.stream:
                return self._device.cupy.cuda.alloc(size_bytes)
        except self._device.cupy.cuda.memory.OutOfMemoryError:
            raise self._device.out_of_memory(f"{human_bytes(size_bytes, 1)} of weights") from None

    def copy(self, expert: str, block: int, slot: Any, after: Any) -> "Future[Any]":
        """Enqueue a copy. Its future holds the event of its end once the bytes are in host memory."""
        return self._bring(expert, block, slot, after, 0)

    def refresh(self, expert: str, block: int, slot: Any, after: Any) -> "Future[Any]":
        return self._bring(expert, block, slot, after, self._layout.varying[0])

    def _bring(self, expert: str, block: int, slot: Any, after: Any, start: int) -> "Future[Any]":
        """Enqueue the copy of a block's weights from byte ``start`` of its region on."""
        offset, size = self._layout.region(block) + start, self._layout.step_bytes - start
        pieces = list(self._files.pieces(expert, offset, size))
        pinned: list[Any] = [None if self._from_disk else self._device.host_copies.pin(each.path) for each in pieces]
        if all(whole is not None for whole in pinned):
            found = zip(pinned, pieces, strict=True)
            done: Future[Any] = Future()
            parts = [(whole.ptr + piece.offset, start + piece.start, piece.size_bytes) for whole, piece in found]
            done.set_result(self._enqueue(parts, slot, after))
            return done
        if not self._ring:
            self._fall_back(expert)
        turn, self._turn = self._turn, (self._turn + 1) % RING
        assert self._thread is not None
        return self._thread.submit(self._through_ring, (expert, offset, size), start, slot, after, turn)

    def _through_ring(self, wanted: tuple[str, int, int], start: int, slot: Any, after: Any, turn: int) -> Any:
        if self._ring_used[turn] is not None:
            self._ring_used[turn].synchronize()
        expert, offset, size = wanted
        started = perf_counter()
        self._files.fill(expert, offset, np.frombuffer(self._ring[turn], np.uint8, size))
        self._read.append(perf_counter() - started)
        self._ring_used[turn] = self._enqueue([(self._ring[turn].ptr, start, size)], slot, after)
        return self._ring_used[turn]

    def _enqueue(self, parts: Sequence[tuple[int, int, int]], slot: Any, after: Any) -> Any:
        """Enqueue copies of ``parts``: host address, place in ``slot``, size."""
        if after is not None:
            self._copies.wait_event(after)
        started = self._record(self._copies)
        for address, place, size in parts:
            (slot + place).copy_from_host_async(ctypes.c_void_p(address), size, self._copies)
        done = self._record(self._copies)
        self._copied.append((started, done))
        return done

    def use(self, expert: str, overlay: tuple[Path, Overlay] | None) -> None:
        before = self._files.overlay_of(expert)
        if self._thread is None:
            self._files.use(expert, overlay)
        else:
            self._thread.submit(self._files.use, expert, overlay).result()  # behind its reads
            self._copies.synchronize()
        if before is not None:
            self._device.host_copies.drop(before)

    def wait(self, event: "Future[Any]") -> None:
        arrived = self._record(self._device.stream)
        self._device.stream.wait_event(event.result())
        self._waited.append((arrived, self._record(self._device.stream)))

    def seconds(self) -> tuple[float, float]:
        read = sum(self._read.popleft() for _ in range(len(self._read)))
        return read + self._elapsed(self._copied), self._elapsed(self._waited)

    def _elapsed(self, pairs: deque[tuple[Any, Any]]) -> float:
        """Remove the pairs of events that have happened; the seconds between them."""
        total = 0.0
        while pairs and pairs[0][1].done:
            total += self._device.cupy.cuda.get_elapsed_time(*pairs.popleft()) / 1000
        return total

    def computed(self) -> Any:
        return self._record(self._device.stream)

    def _record(self, stream: Any) -> Any:
        event = self._device.cupy.cuda.Event()
        event.record(stream)
        return event

    def _fall_back(self, expert: str) -> None:
        size = self._files.paths[expert].stat().st_size
        told = "cannot pin %s of host memory, so blocks come from disk; ulimit -l %d would allow it"
        log.warning(told, human_bytes(size, 1), -(-size // KIBIBYTE))
        self._ring = [self._pinned(self._layout.step_bytes) for _ in range(RING)]

    def _pinned(self, size_bytes: int) -> Any:
        cupy = self._device.cupy
        try:
            return cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(size_bytes), 0)
        except cupy.cuda.runtime.CUDARuntimeError:
            found = f"cannot pin {RING} buffers of {human_bytes(size_bytes, 1)}"
            remedy = f"ulimit -l {-(-RING * size_bytes // KIBIBYTE)} or more, or free memory"
            raise UserError(found, "host memory that the GPU reads", remedy) from None
