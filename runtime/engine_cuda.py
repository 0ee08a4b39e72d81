"""Engines on ONNX Runtime's CUDA provider, for any NVIDIA GPU from compute capability 8.0 on.

Arrays are CuPy's and are bound by address: nothing but a call's numpy inputs and results crosses the bus, and the VAE's
caches stay on the device. ONNX Runtime computes on CuPy's stream, so neither waits for the other. Every session has an
arena of its own: it grows by what is asked, up to the memory that is free when the session opens, and returns unused
memory after each call, since several sessions stay open. An expert is swapped by closing its session.

Calls with fixed shapes and without state are recorded by ONNX Runtime as CUDA graphs, which need fixed addresses.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime.cuda_graph import RecordedCalls
from runtime.engine import NEXT, Arrays, check_inputs
from runtime.engine_onnxruntime import NO_MEMORY
from runtime.gpu import TO_RUN, Gpu, compute_capability
from wan22.backends import loading, require_module
from wan22.component import Component
from wan22.errors import UserError
from wan22.onnx_file import check_component
from wan22.shapes import sizes_of

PACKAGE, CUDA, CPU = "onnxruntime-gpu", "CUDAExecutionProvider", "CPUExecutionProvider"
INSTALL = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
# Operators of which shape arithmetic consists; ONNX Runtime prefers the CPU for it.
SHAPE_ARITHMETIC = frozenset(
    ("Add", "Cast", "Concat", "Gather", "Min", "Range", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze")
)


class CudaDevice(Gpu):
    """The GPU shared by the engines of a pipeline. Use it as a context manager around them."""

    def __init__(self, onnxruntime: Any, cupy: Any, provider: str = CUDA, place: str = "cuda") -> None:
        super().__init__(cupy)
        self.onnxruntime, self.provider, self.place = onnxruntime, provider, place
        self.others = [CPU] if provider != CPU else []  # for the arithmetic of shapes

    @classmethod
    def open(cls, oldest: str, oldest_gpu: str) -> Self:
        """The GPU of this machine, for graphs that need ONNX Runtime ``oldest`` and this compute capability or later.

        Raises:
            UserError: ONNX Runtime is missing, has no CUDA provider or is too old; CuPy is missing; no GPU, or one that
                is too old.
        """
        onnxruntime = require_module("onnxruntime", PACKAGE, TO_RUN)
        cupy = require_module("cupy", "cupy-cuda13x", TO_RUN)
        check_onnxruntime(onnxruntime, oldest)
        capability = compute_capability(cupy)
        if _numbers(capability) < _numbers(oldest_gpu):
            found = f"a GPU of compute capability {capability}"
            raise UserError(found, f"{oldest_gpu} or later, for flash attention in 16 bits", "use another GPU")
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN from their Python packages, where installed
        return cls(onnxruntime, cupy)

    def engine(self, folder: Path, component: Component) -> "CudaEngine":
        """The engine of ``component`` in the bundle at ``folder``."""
        return CudaEngine(self, folder, component)

    def provider_options(self, *, recorded: bool) -> dict[str, str]:
        """Settings of a session; TF32 is off, because it would undo the graphs' deliberate float32 operations."""
        if self.provider != CUDA:
            return {}
        return {
            "device_id": str(self.number),
            "user_compute_stream": str(self.stream.ptr),
            "gpu_mem_limit": str(int(self.available_bytes())),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search would run for every size
            "use_tf32": "0",
            "enable_cuda_graph": str(int(recorded)),
        }


class CudaEngine:
    """The engine of one component of a bundle of kind "engines" with backend ``onnxruntime-gpu``."""

    def __init__(self, device: CudaDevice, folder: Path, component: Component) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self._device, self._folder, self._component = device, folder, component
        self._path = folder / component.graph.path
        self._session: Any = None
        self._kept = RecordedCalls(device.stream) if self.replays else None

    @property
    def replays(self) -> bool:
        """True if ONNX Runtime records a call as a CUDA graph and replays it: fixed shapes, no state on the device."""
        fixed = all(isinstance(dim, int) for tensor in self.inputs for dim in tensor.dims)
        return fixed and not any(tensor.name.startswith(NEXT) for tensor in self.outputs)

    def __enter__(self) -> Self:
        check_component(self._folder, self._component)
        self._device.release()
        self._session = self._new_session()
        return self

    def _new_session(self) -> Any:
        device, onnxruntime = self._device, self._device.onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # frees the VAE's caches early
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = (device.provider, device.provider_options(recorded=self.replays))
        try:
            with loading(self._path):
                session = onnxruntime.InferenceSession(self._path, options, providers=[provider, *device.others])
        except Exception as error:
            raise self._explained(error) from None
        if device.provider not in session.get_providers():
            built = getattr(onnxruntime, "cuda_version", "") or "12 or 13"
            found = f"onnxruntime-gpu {onnxruntime.__version__} cannot load its CUDA provider"
            raise UserError(found, f"CUDA {built} and cuDNN 9", INSTALL)
        check_assignment(self.name, device.provider, session.get_provider_graph_assignment_info())
        return session

    def _explained(self, error: Exception) -> Exception:
        """The UserError for ONNX Runtime's ``error`` if memory ran out or the graph does not load, else itself."""
        if any(words in str(error) for words in NO_MEMORY):
            return self._device.out_of_memory(self.name)
        if type(error).__name__ in ("InvalidProtobuf", "InvalidGraph", "NoSuchFile", "NotImplemented"):
            found = f"{self._path} does not load: {error}"
            return UserError(found, "a graph that ONNX Runtime loads", "build it again")
        return error

    def __exit__(self, *_: object) -> None:
        self._device.stream.synchronize()
        if self._kept:
            self._kept.forget()
        self._session = None

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """Run the engine; the module's docstring says where arrays live.

        Raises:
            ValueError: names, types or shapes differ from the graph's.
            UserError: there is too little memory.
        """
        device = self._device
        check_inputs(self.name, self.inputs, inputs, ())
        sizes = sizes_of(self.inputs, {name: array.shape for name, array in inputs.items()})
        device.used_by(self)
        with device.stream, device.refuse_out_of_memory(self.name):
            entering, leaving = device.arrays(inputs, self.outputs, sizes, self._kept)
            self._run(entering, leaving)
            results = device.results(inputs, self.outputs, leaving, recorded=self._kept is not None)
        return results[0] if len(results) == 1 else results

    def _run(self, entering: dict[str, Any], leaving: dict[str, Any]) -> None:
        binding, settings = self._session.io_binding(), self._device.onnxruntime.RunOptions()
        for name, array in entering.items():
            binding.bind_input(name, *self._place(array))
        for name, array in leaving.items():
            binding.bind_output(name, *self._place(array))
        if self._device.provider == CUDA and not self.replays:  # a recorded call must keep its memory
            settings.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self._device.number}")
        try:
            self._session.run_with_iobinding(binding, settings)
        except Exception as error:
            raise self._explained(error) from None

    def _place(self, array: Any) -> tuple[str, int, Any, tuple[int, ...], int]:
        """The arguments that bind an array: device, device number, type, shape, address."""
        place, number = self._device.place, self._device.number
        return place, number, np.dtype(array.dtype).type, tuple(array.shape), int(array.data.ptr)


def check_onnxruntime(onnxruntime: Any, needed: str) -> None:
    """Refuse a build of ONNX Runtime that has no CUDA provider or is older than version ``needed``."""
    version = onnxruntime.__version__
    if CUDA not in onnxruntime.get_available_providers():
        remedy = f"pip uninstall onnxruntime, then {INSTALL}: both packages have one module"
        raise UserError(f"onnxruntime {version} without a CUDA provider", f"{PACKAGE} {needed} or later", remedy)
    if _numbers(version) < _numbers(needed):
        raise UserError(f"{PACKAGE} {version}", f"{needed} or later, which has flash attention", f"{INSTALL} --upgrade")


def check_assignment(name: str, provider: str, subgraphs: Iterable[Any]) -> None:
    """Refuse a session in which another provider computes more than shapes.

    Raises:
        UserError: lists the nodes.
    """
    elsewhere = [node for part in subgraphs if part.ep_name != provider for node in part.get_nodes()]
    if computing := sorted({node.op_type for node in elsewhere} - SHAPE_ARITHMETIC):
        found = f"{name}: ONNX Runtime computes {', '.join(computing)} on the CPU"
        raise UserError(
            found, "nodes that all run on the GPU", f"{INSTALL} --upgrade: newer releases have more kernels"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
