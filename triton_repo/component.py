"""One engine as a Triton model, for machines without a GPU: ONNX Runtime in a Python model.

On GPU hosts Triton's TensorRT or ONNX Runtime backend replaces it, with the same inputs and outputs.
"""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from runtime.engine_onnxruntime import OnnxRuntimeEngine
from triton_repo.loading import trusted_bundle
from triton_repo.model_status import StatusFile, end_with_server
from triton_repo.settings import Settings
from wan22.errors import UserError


class ComponentModel:
    """A model that runs the component named in its parameters, one request after the other."""

    def initialize(self, args: dict[str, str]) -> None:
        end_with_server()
        status = StatusFile(args["model_name"])
        parameters = json.loads(args["model_config"])["parameters"]
        try:
            settings = Settings.read({key: value["string_value"] for key, value in parameters.items()})
            bundle = trusted_bundle(settings)
        except UserError as error:
            status.failed(error.found, error.expected, error.remedy)
            raise pb_utils.TritonModelException(str(error)) from None
        self.engine = OnnxRuntimeEngine(bundle.folder, bundle.component(settings.component))
        self.engine.__enter__()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self.engine.__exit__(None, None, None)

    def _answer(self, request: Any) -> Any:
        outputs = self.engine(**{tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        arrays = outputs if isinstance(outputs, tuple) else (outputs,)
        named = zip(self.engine.outputs, arrays, strict=True)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(tensor.name, np.ascontiguousarray(array)) for tensor, array in named]
        )
