"""A client of the served model: one gRPC stream per job, progress as it comes, the video at the end. No torch.

A stream is always read to its end, also after an error: some releases of the server leak the request otherwise, and
then never unload the model. Giving up (Ctrl-C, a deadline) cancels the stream, which the model sees before its next
engine call, or never starts if it waited in the queue.
"""

import json
import math
import queue
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from triton_repo.schema import INPUTS_BY_NAME, NUMPY
from wan22.errors import UserError

Event = dict[str, Any]
OnProgress = Callable[[Event], None]
Status = Literal["INVALID_ARGUMENT", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL"]
Setting = str | int | float | bool | bytes
WIRE_NAMES = {"STRING": "BYTES"}  # the protocol has its own word
GRACE_S = 2.0  # beyond the deadline: the server answers first if it can
MICROSECONDS = 1_000_000
KEEPALIVE_MS = 330_000  # servers take pings more often than every five minutes for an attack


class JobError(Exception):
    """The server did not make the video; ``status`` says what kind of no it was."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status: Status = status

    def as_user_error(self) -> UserError:
        parts = str(self).split(" | expected ")
        if len(parts) == 2 and " | " in parts[1]:
            return UserError(parts[0], *parts[1].split(" | ", 1))
        remedy = {"INVALID_ARGUMENT": "ask for something else", "INTERNAL": "see the server's log"}
        return UserError(str(self), "a video", remedy.get(self.status, "try again later"))


@dataclass(frozen=True, eq=False)
class Result:
    video: bytes
    event: Event  # the last one: seed, width, height, frames, fps, seconds, latents_sha256

    @property
    def seed(self) -> int:
        return int(self.event["seed"])


class WanClient:
    """A connection to a server; a context manager. Jobs of one client run one after the other.

    Args:
        url: host and port of the server's gRPC endpoint.
        model: the name it is served under.
    """

    def __init__(self, url: str, model: str = "wan22") -> None:
        from tritonclient import grpc

        alive = grpc.KeepAliveOptions(keepalive_time_ms=KEEPALIVE_MS, keepalive_permit_without_calls=False)
        self.url, self.model = url.removeprefix("grpc://"), model
        self._client = grpc.InferenceServerClient(self.url, keepalive_options=alive)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def generate(
        self,
        prompt: str,
        *,
        image: bytes | Path | None = None,
        on_progress: OnProgress | None = None,
        deadline_s: float = math.inf,
        priority: Literal[1, 2] = 2,
        **settings: Setting | None,
    ) -> Result:
        """The video of ``prompt``.

        Args:
            prompt: what it shows.
            image: to start from: encoded JPEG, PNG or WebP, or the file that holds it.
            on_progress: called with every event of the server, as it comes; what it raises cancels the job.
            deadline_s: from now on; the job is given up then, whether it waits or runs.
            priority: 1 goes before 2.
            settings: any other input of ``schema.INPUTS``; None leaves it to the model.

        Raises:
            JobError: the server refused, failed or could not be reached, or the deadline passed.
            UserError: a setting that no model has, or an image file that cannot be read.
        """
        given = {"prompt": prompt, "image": content_of(image), **settings}
        options: dict[str, Any] = {"priority": priority}
        if math.isfinite(deadline_s):
            given["deadline_unix_ms"] = int((time.time() + deadline_s) * 1000)
            options["timeout"] = int(deadline_s * MICROSECONDS)
        job = _Stream(self._client, deadline_s + GRACE_S)
        return job.run(self.model, _inputs(given), options, on_progress or (lambda _event: None))


class _Stream:
    """One job on one stream."""

    def __init__(self, client: Any, within_s: float) -> None:
        self._client, self._give_up = client, time.monotonic() + within_s
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._over = False  # the server has said its last word

    def run(self, model: str, inputs: list[Any], options: Mapping[str, Any], on_progress: OnProgress) -> Result:
        from tritonclient.utils import InferenceServerException

        # tritonclient calls with the keywords ``result`` and ``error``; other names would fail in its thread, unheard
        self._client.start_stream(callback=lambda result, error: self._answers.put((result, error)))
        try:
            # a connection that has failed already refuses here, and has told why to the callback
            with suppress(InferenceServerException):
                self._client.async_stream_infer(model, inputs, enable_empty_final_response=True, **options)
            return self._read(on_progress)
        finally:
            self._client.stop_stream(cancel_requests=not self._over)

    def _read(self, on_progress: OnProgress) -> Result:
        last: Result | None = None
        while True:
            result, error = self._next()
            if error is not None:
                self._over = True
                raise _job_error(error)
            event = result.as_numpy("event")
            if event is not None:
                last = Result(result.as_numpy("video").tobytes(), json.loads(event[0]))
                on_progress({**last.event, "preview": result.as_numpy("preview").tobytes()})
            if result.get_response().parameters["triton_final_response"].bool_param:
                self._over = True
                break
        if last is None or last.event["phase"] != "done":
            raise JobError("INTERNAL", "the server ended the stream without a video")
        return last

    def _next(self) -> tuple[Any, Any]:
        left = self._give_up - time.monotonic()
        try:
            # in slices, because a queue that waits for ever cannot be interrupted everywhere
            return self._answers.get(timeout=min(max(left, 0), 3600))
        except queue.Empty:
            if left > 3600:
                return self._next()
            raise JobError("DEADLINE_EXCEEDED", "no video before the deadline; the job is cancelled") from None


def content_of(image: bytes | Path | None) -> bytes | None:
    if not isinstance(image, Path):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise UserError(f"{image}: {error.strerror}", "a readable image", "name an image file") from None


def _inputs(given: Mapping[str, Setting | None]) -> list[Any]:
    from tritonclient import grpc

    inputs = []
    for name, value in given.items():
        if name not in INPUTS_BY_NAME:
            raise UserError(f"setting {name!r}", f"one of {', '.join(INPUTS_BY_NAME)}", "name one of them")
        if value is not None:
            array = _array(name, value)
            dtype = INPUTS_BY_NAME[name].dtype
            tensor = grpc.InferInput(name, list(array.shape), WIRE_NAMES.get(dtype, dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
    return inputs


def _array(name: str, value: Setting) -> np.ndarray:
    dtype = INPUTS_BY_NAME[name].dtype
    if dtype == "UINT8":
        return np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value, np.uint8)
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    try:
        return np.array([value], NUMPY[dtype])
    except (OverflowError, ValueError, TypeError):
        raise UserError(f"{name} {value!r}", f"a number that fits {dtype}", "choose another") from None


def _job_error(error: Any) -> JobError:
    """Streams carry no status code for a single request, only text, so the server's own words decide."""
    message = str(error.message()).removeprefix("[request id: <id_unknown>] ").strip()
    return JobError(_status(message), message)


def _status(message: str) -> Status:
    lower = message.lower()
    if "cancel" in lower and "|" not in message:
        return "CANCELLED"
    known: tuple[tuple[Status, tuple[str, ...]], ...] = (
        ("DEADLINE_EXCEEDED", ("deadline of the request", "timeout expired")),
        ("UNAVAILABLE", ("exceeds maximum queue size", "failed to connect", "connection refused", "not ready")),
        ("INTERNAL", ("not healthy", "see the server's log", "stub process")),
    )
    for status, words in known:
        if any(word in lower for word in words):
            return status
    return "INVALID_ARGUMENT" if "|" in message or "input" in lower else "INTERNAL"
