"""Engines on ONNX Runtime: the default on CPU, the reference in CI, and CUDA if onnxruntime-gpu is installed.

Three settings keep memory low. Nodes run in the order of the graph: ONNX Runtime's default order starts from the
outputs and delays the slices that become a VAE's caches, which keeps the full video of each in memory. Memory planning
is off: the plan needs one more block on top of the memory of the first call. Outputs are bound to the caller's arrays,
because ``run`` would hold them twice. Together they halve a VAE's peak and cut a transformer's by a third.

State is overwritten in place, so a VAE's caches, which are larger than the rest of it, exist once. The exported graphs
allow this: each new cache is computed from the only value that reads the old one. All engines of a process share one
arena, since one runs at a time. It begins as one large region, so that tensors of many sizes fit behind each other;
only used pages become resident. It stays when engines are closed.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime.engine import NEXT, Arrays, check_inputs
from runtime.prompt_part import TEXT, PromptPart
from wan22.backends import loading
from wan22.component import Component, Tensor
from wan22.errors import UserError
from wan22.memory import available_host_bytes
from wan22.onnx_file import check_component
from wan22.shapes import Profile, shape_of, sizes_of

NO_MEMORY = ("bad_alloc", "Failed to allocate memory", "Available memory of", "out of memory")  # in its errors
PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")  # the first comes with onnxruntime-gpu
ARENA = {
    "max_mem": 0,  # no limit
    "arena_extend_strategy": 0,  # in powers of two
    "initial_chunk_size_bytes": 2**28,  # a larger one costs a 32nd of itself
    "max_dead_bytes_per_chunk": 2**20,
}


_threads = 0  # of every session of this process; 0 means one for each physical core
_one_at_a_time = threading.Lock()
_here = threading.local()  # with other ``threads`` for sessions that a thread opens


def use_threads(count: int) -> None:
    """Let sessions that are opened from now on use ``count`` threads, for processes that share a machine."""
    global _threads  # noqa: PLW0603 - a property of the process
    _threads = count


@contextmanager
def threads_of_sessions(count: int) -> Iterator[None]:
    """Let sessions that this thread opens in the block use ``count`` threads; 0 leaves it as it is."""
    before = getattr(_here, "threads", 0)
    _here.threads = count or before
    try:
        yield
    finally:
        _here.threads = before


class OnnxRuntimeEngine:
    """The engine of one component of a bundle of kind "engines" with backend ``onnxruntime``."""

    def __init__(
        self,
        folder: Path,
        component: Component,
        profiles: Sequence[Profile] = (),
        providers: tuple[str, ...] = PREFERRED,
    ) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self._folder, self._component = folder, component
        self._path, self._profiles, self._providers = folder / component.graph.path, profiles, providers
        self._halves = [folder / half.path for half in component.halves]
        self._session: Any = None
        self._prompt: PromptPart | None = None

    def __enter__(self) -> Self:
        check_component(self._folder, self._component)
        if self._halves:
            prompt, step = self._halves
            part, self._session = self._new_session(prompt, spin=False), self._new_session(step)
            self._prompt = PromptPart(part)
        else:
            self._session = self._new_session(self._path)
        return self

    def _new_session(self, path: Path, *, spin: bool = True) -> Any:
        return new_session(path, self.name, self._providers, spin=spin)

    def __exit__(self, *_: object) -> None:
        self._session = self._prompt = None

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        check_inputs(self.name, self.inputs, inputs, self._profiles)
        sizes = sizes_of(self.inputs, {key: array.shape for key, array in inputs.items()})
        entering = {key: np.ascontiguousarray(array) for key, array in inputs.items()}  # kept alive until the run ends
        with refuse_out_of_memory(self.name):
            results = tuple(_result_array(tensor, shape_of(tensor, sizes), entering) for tensor in self.outputs)
            self._run(entering, results)
        return results[0] if len(results) == 1 else results

    def _run(self, entering: dict[str, np.ndarray], results: Sequence[np.ndarray]) -> None:
        """Run into ``results``. With a separate prompt part, its outputs replace the text in ``entering``."""
        binding = self._session.io_binding()
        if self._prompt is not None:
            for key, value in self._prompt(entering.pop(TEXT)).items():
                binding.bind_ortvalue_input(key, value)
        for key, array in entering.items():
            binding.bind_input(key, *_place(array))
        for tensor, array in zip(self.outputs, results, strict=True):
            binding.bind_output(tensor.name, *_place(array))
        self._session.run_with_iobinding(binding)


def new_session(path: Path, name: str, providers: Sequence[str] = PREFERRED, *, spin: bool = True) -> Any:
    """A session of the graph at ``path``, called ``name`` in errors.

    With ``spin`` its threads spin for a while after a run, which slows the next session's.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings about missed fusions do not help users
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = False
    options.intra_op_num_threads = getattr(_here, "threads", 0) or _threads
    with _one_at_a_time:
        _make_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    there = onnxruntime.get_available_providers()
    usable = [provider for provider in providers if provider in there]
    try:
        with refuse_out_of_memory(name), loading(path):
            return onnxruntime.InferenceSession(path, options, providers=usable)
    except (state.InvalidProtobuf, state.InvalidGraph, state.NoSuchFile, state.NotImplemented) as error:
        found = f"{path} does not load: {error}"
        raise UserError(found, "a graph that ONNX Runtime loads", "build it again") from None


@contextmanager
def refuse_out_of_memory(name: str) -> Iterator[None]:
    """Turn a failed allocation, numpy's or ONNX Runtime's, into a UserError."""
    try:
        yield
    except Exception as error:  # only the text of ONNX Runtime's errors mentions memory
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        found = f"out of memory in {name}: {available_host_bytes() / 2**30:.1f} GiB available"
        remedy = "use --residency one-component, a smaller --size or fewer --frames"
        raise UserError(found, "more free memory", remedy) from None


@cache
def _make_arena() -> None:
    """Register the arena, once per process. It replaces any earlier one, which older sessions keep."""
    import onnxruntime

    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(ARENA))


def _result_array(tensor: Tensor, shape: tuple[int, ...], entering: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array for an output: the input state that it replaces, or a new one.

    State that does not own its memory is not overwritten.
    """
    before = entering.get(tensor.name.removeprefix(NEXT)) if tensor.name.startswith(NEXT) else None
    if before is None or before.shape != shape or not (before.flags.owndata and before.flags.writeable):
        return np.empty(shape, tensor.dtype)
    return before


def _place(array: np.ndarray) -> tuple[str, int, type, tuple[int, ...], int]:
    """The arguments that bind an array in host memory: device, device number, type, shape, address."""
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
