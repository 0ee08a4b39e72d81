"""The pipeline model of the BLS topology: the owner's loop, with every engine call a request to another Triton model.

Advantage: Triton's own backends run the engines, with metrics per component. Costs: every tensor crosses shared memory,
including the VAE's caches, gigabytes at full size; both experts stay resident; the model cannot warm up, because Triton
refuses requests to other models until the server is ready; and SIGTERM loses the running job, because it refuses them
again.
"""

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from runtime.engine import Arrays, BorrowedEngine, check_inputs
from triton_repo.job import OutOfTimeError
from triton_repo.loading import load
from triton_repo.owner import Owner
from triton_repo.served_pipeline import ServedPipeline
from wan22.component import Component

STOPPING = "Server not ready"  # Triton's own words


class BlsPipeline(Owner):
    """An owner whose engines are other Triton models; requests, answers and checks are the same."""

    def open(self) -> ServedPipeline:
        prefix = self.settings.components
        return load(self.settings, lambda component: RemoteEngine(component, f"{prefix}_{component.name}"))


class RemoteEngine(BorrowedEngine):
    """An engine served as the Triton model ``model``."""

    def __init__(self, component: Component, model: str) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self._model = model

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        check_inputs(self.name, self.inputs, inputs, ())  # the request has been checked against the profiles
        names = [tensor.name for tensor in self.outputs]
        response = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            message = response.error().message()
            if STOPPING in message:  # not a bug
                raise OutOfTimeError("the server is stopping", "UNAVAILABLE")
            raise RuntimeError(f"{self._model}: {message}")
        shared = [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names]
        outputs = tuple(array.copy() for array in shared)  # Triton reuses the response's memory
        return outputs[0] if len(outputs) == 1 else outputs
