"""The pipeline model of the BLS topology: the owner's loop, with every engine call a request to another Triton model.

What it buys: Triton's own backends run the engines, with their metrics per component. What it costs: every tensor
crosses shared memory, the VAE's caches too, which are gigabytes at full size; both experts stay resident; the model
cannot warm up, because requests to other models are refused until the server is ready; and a SIGTERM loses the running
job, because they are refused again.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from runtime.engine import Arrays, BorrowedEngine, check_inputs
from triton_repo.job import OutOfTimeError
from triton_repo.loading import load
from triton_repo.owner import Owner
from triton_repo.served_pipeline import ServedPipeline
from wan22.bundle import Component

STOPPING = "Server not ready"  # Triton's own words


class BlsPipeline(Owner):
    """The same requests, answers and checks as the owner's."""

    def open(self) -> ServedPipeline:
        prefix = self.settings.components
        return load(self.settings, lambda component: RemoteEngine(component, f"{prefix}_{component.name}"))


class RemoteEngine(BorrowedEngine):
    """An engine that lives in the Triton model ``model``."""

    def __init__(self, component: Component, model: str) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self._model = model

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        check_inputs(self.name, self.inputs, inputs, ())  # the request was held to the profiles already
        names = [tensor.name for tensor in self.outputs]
        response = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise _failure(self._model, response.error().message())
        outputs = tuple(_copy(response, name) for name in names)
        return outputs[0] if len(outputs) == 1 else outputs


def _copy(response: Any, name: str) -> np.ndarray:
    """An array that outlives the response, whose memory Triton takes back."""
    shared: np.ndarray = pb_utils.get_output_tensor_by_name(response, name).as_numpy()
    return shared.copy()


def _failure(model: str, message: str) -> Exception:
    """What a refused call means: a server that was told to stop is no bug."""
    if STOPPING in message:
        return OutOfTimeError("the server is stopping, not ready for more", "UNAVAILABLE")
    return RuntimeError(f"{model}: {message}")
