"""Engines on ONNX Runtime: the default on CPU, the reference in CI, and CUDA where onnxruntime-gpu is installed."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.engine import Arrays, check_inputs
from wan22.bundle import Component
from wan22.shapes import Profile

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
        outputs = self._session.run(None, inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
