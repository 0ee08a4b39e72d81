"""Engines on ONNX Runtime: the default on CPU, the reference in CI, and CUDA where onnxruntime-gpu is installed.

Three settings keep memory low. Nodes run in the order of the graph: ONNX Runtime's own order starts from the outputs
and leaves the slices that become a VAE's caches to the end, each with a whole video behind it. Planned memory is off:
the plan is one block beside what the first call already took. Outputs go straight into arrays of the caller, where
``run`` would hold them twice. Together they halve the peak of a VAE and take a third off that of a transformer.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.engine import Arrays, check_inputs
from wan22.bundle import Component
from wan22.shapes import Profile, shape_of, sizes_of

PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")  # the first comes with onnxruntime-gpu


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
        self._path, self._profiles, self._providers = folder / component.graph.path, profiles, providers
        self._session: Any = None

    def __enter__(self) -> Self:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings about fusions that did not apply are of no use to a user
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
        there = onnxruntime.get_available_providers()
        usable = [provider for provider in self._providers if provider in there]
        self._session = onnxruntime.InferenceSession(self._path, options, providers=usable)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        check_inputs(self.name, self.inputs, inputs, self._profiles)
        sizes = sizes_of(self.inputs, {key: array.shape for key, array in inputs.items()})
        results = tuple(np.empty(shape_of(tensor, sizes), tensor.dtype) for tensor in self.outputs)
        entering = {key: np.ascontiguousarray(array) for key, array in inputs.items()}  # alive until the run is over
        binding = self._session.io_binding()
        for key, array in entering.items():
            binding.bind_input(key, *_place(array))
        for tensor, array in zip(self.outputs, results, strict=True):
            binding.bind_output(tensor.name, *_place(array))
        self._session.run_with_iobinding(binding)
        return results[0] if len(results) == 1 else results


def _place(array: np.ndarray) -> tuple[str, int, type, tuple[int, ...], int]:
    """What a binding is told of an array in host memory: device and its number, type, shape, address."""
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
