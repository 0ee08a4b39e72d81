"""What a Triton server serves, read from its configuration: enough to check a request without asking the server."""

from dataclasses import dataclass
from typing import Any

import msgspec

from triton_repo.settings import Limits, Settings
from wan22.bundle import Manifest
from wan22.errors import DAMAGED_JSON, UserError
from wan22.specs import FAMILY

CALL_S = 5.0  # for an answer about readiness or configuration


class UnreachableError(Exception):
    """The server does not answer, or its model is not ready."""


@dataclass(frozen=True)
class ServedModel:
    id: str  # as clients name it
    name: str  # of the model on its servers
    manifest: Manifest  # without files
    limits: Limits
    loras: tuple[str, ...] = ()

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.id, self.id.removeprefix(FAMILY), self.name

    def encoded(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def decoded(cls, text: str) -> "ServedModel":
        return msgspec.json.decode(text, type=cls)


class TritonServer:
    """A connection for questions about one model of one server; jobs have connections of their own."""

    def __init__(self, url: str, name: str) -> None:
        from tritonclient import grpc

        self.url, self.name = url, name
        self._client = grpc.InferenceServerClient(url)

    def close(self) -> None:
        self._client.close()

    def is_ready(self) -> bool:
        """True if the model takes jobs: not while the server starts or ends."""
        try:
            ready = self._ask("is_server_ready") and self._ask("is_model_ready", self.name)
        except UnreachableError:
            return False
        return bool(ready)

    def model(self) -> ServedModel:
        """The model that it serves.

        Raises:
            UnreachableError: no answer.
            UserError: the model was not made by this version of wan-trt.
        """
        config = self._ask("get_model_config", self.name).config
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        try:
            settings = Settings.read(parameters)
            manifest = msgspec.json.decode(settings.described, type=Manifest)
        except (UserError, *DAMAGED_JSON):
            found = f"model {self.name} of {self.url} without its description"
            raise UserError(found, "a model made by this version of wan-trt", "make and start it again") from None
        return ServedModel(
            manifest.spec.public_name, self.name, manifest, settings.limits, tuple(settings.weight_sets())
        )

    def _ask(self, method: str, *arguments: str) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return getattr(self._client, method)(*arguments, client_timeout=CALL_S)
        except InferenceServerException as error:
            raise UnreachableError(f"{self.url}: {error.message()}") from None
