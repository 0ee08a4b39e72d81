"""Engines on TensorRT and TensorRT-RTX, without PyTorch: the raw API, with memory from CuPy.

All engines of a pipeline share one :class:`Device`: a runtime, a stream and one arena of scratch memory. Only one
engine runs at a time, so the arena is as large as the largest of them needs. Closing an engine frees its weights.

Arrays may be numpy's or CuPy's. Results are numpy arrays unless an input is CuPy's. State for the next call (outputs
``next_...``) stays on the device, so the VAE's gigabytes of caches never cross the bus.
"""

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime.built_for import check_build, check_plan
from runtime.cuda_graph import RecordedCalls
from runtime.engine import NEXT, Arrays, check_inputs
from runtime.gpu import TO_RUN, Gpu, compute_capability
from runtime.host_copies import HostCopies
from runtime.rtx import KernelCache, check_valid, configure
from wan22.backends import MODULES, require_module
from wan22.bundle import Manifest
from wan22.component import Component
from wan22.quantities import human_bytes
from wan22.shapes import Profile, is_static, own_profiles, sizes_of


class Device(Gpu):
    """The GPU shared by the engines of a pipeline. Use it as a context manager around them."""

    def __init__(self, trt: Any, cupy: Any, manifest: Manifest | None = None) -> None:
        super().__init__(cupy)
        self.trt = trt
        self.manifest = manifest  # the engines' bundle
        self.logger = trt.Logger(trt.Logger.WARNING)
        self.runtime = trt.Runtime(self.logger)
        self._arena: Any = None
        self.host_copies = HostCopies(cupy)
        self._shared_plans: dict[Path, Any] = {}

    @classmethod
    def open(cls, manifest: Manifest) -> Self:
        """The GPU of this machine, checked against the bundle of ``manifest``.

        Raises:
            UserError: TensorRT or CuPy is missing, there is no GPU, or the engines were built for another machine.
        """
        backend = manifest.build.backend if manifest.build else "tensorrt"
        trt, cupy = require_module(MODULES[backend], backend, TO_RUN), require_module("cupy", "cupy-cuda13x", TO_RUN)
        check_build(manifest, trt.__version__, compute_capability(cupy))
        return cls(trt, cupy, manifest)

    def __exit__(self, *_: object) -> None:
        self._shared_plans.clear()
        self.host_copies.clear()
        super().__exit__()

    def plan(self, path: Path, *, shared: bool) -> Any:
        """The engine in the file ``path``; a ``shared`` one is loaded once and stays."""
        if path in self._shared_plans:
            return self._shared_plans[path]
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as content:
            check_valid(self.trt, self.runtime, content, path.name)
            engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            size = human_bytes(path.stat().st_size, 1)
            raise self.out_of_memory(f"{path.name} ({size}), or it is damaged")
        if shared:
            self._shared_plans[path] = engine
        return engine

    def engine(self, folder: Path, component: Component, profiles: Sequence[Profile]) -> "TensorRTEngine":
        """The engine of ``component`` in the bundle at ``folder``; ``profiles`` are the bundle's."""
        return TensorRTEngine(self, folder, component, profiles)

    def kept_kernels(self, folder: Path, component: Component) -> KernelCache | None:
        """The kernels that TensorRT-RTX compiled for an engine before; None for TensorRT, which does not."""
        return KernelCache(self, folder, component) if hasattr(self.trt, "CudaGraphStrategy") else None

    def new_context(self, engine: Any, kernels: KernelCache | None, *, fixed: bool) -> Any:
        """An execution context that allocates no memory; ``fixed`` if shapes and addresses never change."""
        trt = self.trt
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if kernels is not None:
            configure(trt, config, fixed=fixed)
            kernels.attach(config)
        return engine.create_execution_context(config)

    def arena(self, size_bytes: int) -> int:
        """The address of at least ``size_bytes`` of scratch memory; its earlier content is lost."""
        if self._arena is None or self._arena.mem.size < size_bytes:
            self.release()
            try:
                self._arena = self.cupy.cuda.alloc(size_bytes)
            except self.cupy.cuda.memory.OutOfMemoryError:
                raise self.out_of_memory(f"{human_bytes(size_bytes, 1)} of scratch memory") from None
        return int(self._arena.ptr)

    def release(self) -> None:
        """Return scratch memory and CuPy's reserve to the GPU."""
        self._arena = None
        super().release()


class TensorRTEngine:
    """The engine of one component of a bundle of kind "engines"."""

    def __init__(self, device: Device, folder: Path, component: Component, profiles: Sequence[Profile]) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self._component = component
        self._device, self._folder, self._path = device, folder, folder / component.graph.path
        self._profiles = own_profiles(profiles, component.inputs)
        self._engine: Any = None
        self._context: Any = None
        self._kernels: KernelCache | None = None
        self._profile_in_use = self._scratch = 0
        self._replay = RecordedCalls(device.stream) if self.replays else None

    @property
    def replays(self) -> bool:
        """True if a call is recorded once as a CUDA graph and replayed: fixed shapes, and no state on the device.

        TensorRT-RTX records by itself (see :meth:`Device.new_context`).
        """
        fixed = all(is_static(profile) for profile in self._profiles)
        stateful = any(tensor.name.startswith(NEXT) for tensor in self.outputs)
        return fixed and not stateful and not hasattr(self._device.trt, "CudaGraphStrategy")

    def __enter__(self) -> Self:
        self._device.release()
        self._engine = self._device.plan(self._path, shared=False)
        if self._device.manifest is not None:
            check_plan(str(self._engine.name), self._device.manifest, self._component)
        self._kernels = self._device.kept_kernels(self._folder, self._component)
        fixed = all(is_static(profile) for profile in self._profiles)
        self._context = self._device.new_context(self._engine, self._kernels, fixed=fixed)
        self._profile_in_use = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._device.stream.synchronize()
        if self._replay:
            self._replay.forget()
        if self._kernels is not None:
            self._kernels.save()
        self._context = self._engine = None

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """Run the engine; the module's docstring says where arrays live.

        Raises:
            ValueError: names, types or shapes differ from the graph's.
            UserError: the engine was not built for these shapes, or there is too little memory.
        """
        index = check_inputs(self.name, self.inputs, inputs, self._profiles)
        sizes = sizes_of(self.inputs, {name: array.shape for name, array in inputs.items()})
        self._device.used_by(self)
        with self._device.stream, self._device.refuse_out_of_memory(self.name):
            self._use_profile(index)
            entering, leaving = self._device.arrays(inputs, self.outputs, sizes, self._replay)
            arrays = entering | leaving
            self._bind(arrays)
            self._run(tuple(int(array.data.ptr) for array in arrays.values()))
            results = self._device.results(inputs, self.outputs, leaving, recorded=self._replay is not None)
        return results[0] if len(results) == 1 else results

    # -- one call

    def _use_profile(self, index: int) -> None:
        if index != self._profile_in_use:
            if not self._context.set_optimization_profile_async(index, self._device.stream.ptr):
                raise RuntimeError(f"{self.name}: TensorRT refused optimisation profile {index}")
            self._profile_in_use = index

    def _bind(self, arrays: Mapping[str, Any]) -> None:
        context = self._context
        for tensor in self.inputs:
            if not context.set_input_shape(tensor.name, tuple(arrays[tensor.name].shape)):
                raise RuntimeError(f"{self.name}: TensorRT refused shape {arrays[tensor.name].shape} of {tensor.name}")
        for name, array in arrays.items():
            context.set_tensor_address(name, int(array.data.ptr))
        needed = int(context.update_device_memory_size_for_shapes())
        self._scratch = self._device.arena(needed) if needed else 0
        context.set_device_memory(self._scratch, needed)

    def _run(self, addresses: tuple[int, ...]) -> None:
        def enqueue() -> None:
            if not self._context.execute_async_v3(self._device.stream.ptr):
                raise RuntimeError(f"{self.name}: TensorRT could not run the engine; see its log")

        if self._replay is None:
            enqueue()
        else:
            self._replay.run((self._profile_in_use, *addresses, self._scratch), enqueue)
