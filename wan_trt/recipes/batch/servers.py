"""Servers as workers of a batch: Triton servers by host and port, gateways by http:// or https://."""

import base64
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from gateway.client import GatewayClient, RefusedError
from triton_repo.client import WanClient
from triton_repo.client_errors import JobError
from triton_repo.schema import Setting
from wan22.errors import UserError
from wan_trt.recipes.batch.jobs import Job
from wan_trt.recipes.batch.run import Worker, WorkerLostError, Workers

QUEUE_FULL = "Exceeds maximum queue size"  # Triton's words
BACK_S = 60.0
KEY_VARIABLE = "WAN_TRT_KEY"
REFUSED_KEY = (401, 403)
IMAGES = {"image": "input_reference", "last_image": "last_image"}  # → field of /v1/videos


def server_workers(urls: Sequence[str], model: str = "wan22", key: str = "") -> Workers:
    """Servers, one job at a time each; a gateway has as many at a time as servers are ready behind it.

    One that was lost gets a minute to come back.

    Raises:
        UserError: an address is none, a gateway refuses the key, or does not have the model.
    """
    opened, places = set[int](), list[Any]()
    for url in urls:
        gateway = GatewayClient(url, key) if url.startswith(("http://", "https://")) else None
        places += [gateway or url] * (1 if gateway is None else _ready_servers(gateway, model))

    def open_worker(index: int) -> Any:
        wait_s = BACK_S if index in opened else 0.0
        opened.add(index)
        place = places[index]
        if isinstance(place, GatewayClient):
            return _gateway(place, model, f"{place.url}#{index}", wait_s)
        return _server(place, model, wait_s)

    return Workers(len(places), "servers", open_worker)


@contextmanager
def _server(url: str, model: str, wait_s: float) -> "Iterator[Worker]":
    from tritonclient import grpc

    with WanClient(url, model) as client:
        probe, until = grpc.InferenceServerClient(client.url), time.monotonic() + wait_s
        while True:
            try:
                if probe.is_model_ready(model):
                    break
                problem = f"model {model} is not ready"
            except grpc.InferenceServerException as error:
                problem = str(error.message() or error)
            if time.monotonic() >= until:
                raise UserError(f"server {client.url}: {problem}", "a running server", "is it started, and ready?")
            time.sleep(1)
        yield _Server(client)


class _Server:
    def __init__(self, client: Any) -> None:
        self.name, self._client = client.url, client

    def stop(self) -> None:
        self._client.close()

    def render(self, job: Job) -> bytes:
        while True:
            try:
                video: bytes = self._client.submit(job.settings).result().video
                return video
            except JobError as error:
                if QUEUE_FULL in str(error):  # with jobs of others
                    time.sleep(1)
                elif error.status == "UNAVAILABLE":
                    raise WorkerLostError(str(error)) from None
                else:
                    raise error.reason from None


def _ready_servers(gateway: GatewayClient, model: str, wait_s: float = 0.0) -> int:
    """The number of servers behind ``gateway`` that have ``model`` ready. Raises UserError if there are none."""
    until = time.monotonic() + wait_s
    while True:
        problem = f"model {model} is not ready there"
        try:
            found = [each for each in gateway.models() if model in (each["id"], *each["aliases"])]
            if ready := sum(each["ready_servers"] for each in found):
                return int(ready)
        except RefusedError as error:
            problem = error.message
            if error.status in REFUSED_KEY:
                refused = f"gateway {gateway.url}: {problem.partition(' | ')[0]}"
                raise UserError(refused, "a key of it", f"set {KEY_VARIABLE}, or name its file with --key") from None
        if time.monotonic() >= until:
            remedy = "is it started, and ready? a Triton server is named as HOST:PORT, without http://"
            raise UserError(f"gateway {gateway.url}: {problem}", "a running gateway", remedy)
        time.sleep(1)


@contextmanager
def _gateway(client: GatewayClient, model: str, name: str, wait_s: float) -> "Iterator[Worker]":
    if wait_s:
        _ready_servers(client, model, wait_s)
    yield _Gateway(client, model, name)


class _Gateway:
    def __init__(self, client: GatewayClient, model: str, name: str) -> None:
        self.name, self._client, self._model = name, client, model
        self._video_id, self._stopped = "", threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        if self._video_id:
            with suppress(RefusedError):
                self._client.delete(self._video_id)

    def render(self, job: Job) -> bytes:
        fields, once = fields_of(job.settings, self._model), uuid.uuid4().hex
        try:
            self._video_id = self._accepted(fields, once)
            if self._stopped.is_set():
                self.stop()
            video = self._client.follow(self._video_id)
            if video["status"] == "failed":
                raise UserError(video["error"]["message"], "a video", video["error"]["code"])
            content = self._client.content(self._video_id)
            with suppress(RefusedError):
                self._client.delete(self._video_id)  # the batch has it
            return content
        except RefusedError as error:
            if 400 <= error.status < 500 and error.status not in REFUSED_KEY:
                raise UserError(error.message, "a job that it takes", "correct the line") from None
            raise WorkerLostError(str(error)) from None
        finally:
            self._video_id = ""

    def _accepted(self, fields: dict[str, Any], once: str) -> str:
        """The id of the new job. A lost answer is asked for again, and a full queue is waited for."""
        until = time.monotonic() + BACK_S
        while True:
            try:
                return str(self._client.create(fields, once)["id"])
            except RefusedError as error:
                full = error.status == 429
                if not full and (0 < error.status < 500 or time.monotonic() > until):
                    raise
                if self._stopped.wait(min(10.0, error.retry_after_s) if full else 1.0):
                    raise


def fields_of(settings: Mapping[str, Setting], model: str) -> dict[str, Any]:
    """The request of ``/v1/videos`` for inputs of the served model, whose names it knows as aliases."""
    if "noise" in settings:
        raise UserError("noise through a gateway", "latent, a name of its operator's", "or use a Triton server")
    fields: dict[str, Any] = {"model": model, "priority": 2}
    for name, value in settings.items():
        if isinstance(value, bytes):
            media = "png" if value[:4] == b"\x89PNG" else "webp" if value[8:12] == b"WEBP" else "jpeg"
            fields[IMAGES[name]] = f"data:image/{media};base64,{base64.b64encode(value).decode()}"
        else:
            fields[name] = value
    return fields
