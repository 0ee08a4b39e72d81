"""A client of the served model: one gRPC stream per job, with progress events and the video at the end. No torch.

A stream is always read to its end, even after an error; otherwise some server releases leak the request and never
unload the model. Giving up (``Job.cancel``, Ctrl-C, a deadline) cancels the stream; the model notices before its next
engine call, and a queued job never starts.
"""

import json
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from runtime.request import Request
from triton_repo.client_errors import PORT, JobError, address_of, job_error, status_of
from triton_repo.schema import Setting
from triton_repo.wire import content_of, input_tensors, inputs_of

Event = dict[str, Any]
OnProgress = Callable[[Event], None]
GRACE_S = 2.0  # after the deadline, so that the server can answer first
CONNECT_S = 10.0
SLICE_S = 3600.0  # longest single wait, because an endless one cannot be interrupted on all systems
KEEPALIVE_MS = 330_000  # servers treat pings more often than every five minutes as an attack


@dataclass(frozen=True, eq=False)
class Result:
    video: bytes
    event: Event  # the last one: seed, width, height, frames, fps, seconds, latents_sha256

    @property
    def seed(self) -> int:
        return int(self.event["seed"])


class WanClient:
    """A connection to a server. As a context manager it cancels unfinished jobs at the end.

    Args:
        url: host and port of the server's gRPC endpoint; the port defaults to 8001.
        model: name of the served model.

    Raises:
        UserError: the address is invalid.
    """

    def __init__(self, url: str = "localhost", model: str = "wan22") -> None:
        self.url, self.model = address_of(url), model
        self._jobs: set[Job] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for job in tuple(self._jobs):
            job.cancel()

    def submit(
        self,
        request: Request | Mapping[str, Setting | None],
        *,
        deadline_s: float = math.inf,
        priority: Literal[1, 2] = 2,
    ) -> "Job":
        """Send a job and return at once; a client can have several jobs.

        Args:
            request: the request, or inputs of ``schema.INPUTS`` by name; None means the model's default.
            deadline_s: seconds from now after which a waiting or running job is cancelled.
            priority: 1 runs before 2.

        Raises:
            UserError: an unknown setting, or an unreadable image file.
        """
        given = inputs_of(request) if isinstance(request, Request) else dict(request)
        job = Job(self.url, self.model, given, deadline_s, priority, self._jobs.discard)
        self._jobs.add(job)
        return job

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
        """Submit a job, follow its events and return the video.

        Args:
            prompt: description of the video.
            image: the image to start from, as encoded JPEG, PNG or WebP, or its file.
            on_progress: called with every event; an exception in it cancels the job.
            deadline_s: see :meth:`submit`.
            priority: see :meth:`submit`.
            settings: other inputs of ``schema.INPUTS``; None means the model's default.

        Raises:
            JobError: the server refused, failed or could not be reached, or the deadline passed.
            UserError: see :meth:`submit`.
        """
        given = {"prompt": prompt, "image": content_of(image), **settings}
        with self.submit(given, deadline_s=deadline_s, priority=priority) as job:
            for event in job.events():
                if on_progress is not None:
                    on_progress(event)
            return job.result()


class Job:
    """A job on a server: follow it with :meth:`events`, end it with :meth:`cancel`, wait for it with :meth:`result`.

    One thread follows a job; any thread may cancel it. As a context manager it cancels an unfinished job at the end.

    Attributes:
        id: the name of the job in the server's log and in its first event.
    """

    def __init__(
        self,
        url: str,
        model: str,
        settings: Mapping[str, Setting | None],
        deadline_s: float,
        priority: int,
        closed: "Callable[[Job], None]",
    ) -> None:
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException

        self.id, self.url, self.model = uuid.uuid4().hex, url, model
        self._deadline, self._closed = time.monotonic() + deadline_s, closed
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._result: Result | None = None
        self._error: JobError | None = None
        self._cancelled, self._is_open, self._lock = False, True, threading.Lock()
        options: dict[str, Any] = {"priority": priority, "request_id": self.id}
        limit: dict[str, Setting | None] = {}
        if math.isfinite(deadline_s):
            limit["deadline_ms"] = max(1, int(deadline_s * 1000))
            options["timeout"] = max(1, int(deadline_s * 1_000_000))
        inputs = input_tensors({**limit, **settings, "errors_as_events": True})
        alive = grpc.KeepAliveOptions(keepalive_time_ms=KEEPALIVE_MS, keepalive_permit_without_calls=False)
        self._client = grpc.InferenceServerClient(url, keepalive_options=alive)
        # tritonclient passes the keywords ``result`` and ``error``; other names would fail silently in its thread
        self._client.start_stream(
            callback=lambda result, error: self._answers.put((result, error)), headers={"triton_grpc_error": "true"}
        )
        # raises if the connection has already failed; the callback has received the reason
        with suppress(InferenceServerException):
            self._client.async_stream_infer(model, inputs, enable_empty_final_response=True, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(cancel=True)

    def events(self) -> Iterator[Event]:
        """Yield every event not read yet, as it arrives; the last one has the phase ``done``.

        Raises:
            JobError: the server refused, failed or was not reachable, the deadline passed, or the job was cancelled.
        """
        while self._result is None:
            if self._error is not None:
                raise self._error
            try:
                event = self._next()
            except JobError as error:
                self._error = error
            except BaseException:
                self._close(cancel=True)
                raise
            else:
                if event is not None:
                    yield event

    def result(self) -> Result:
        """Wait for the end of the job and return its result.

        Raises:
            JobError: see :meth:`events`.
        """
        for _ in self.events():
            pass
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Cancel the job, waiting or running, and return when the server knows. Does nothing for a finished job."""
        self._cancelled = True
        self._close(cancel=True)

    def _next(self) -> Event | None:
        """The next event; None for an answer without one."""
        result, error = self._answer()
        if error is not None:
            self._close(cancel=False)
            raise self._connection_error(error)
        is_last = result.get_response().parameters["triton_final_response"].bool_param
        if is_last:
            self._close(cancel=False)
        content = result.as_numpy("event")
        event: Event = {} if content is None else json.loads(content[0])
        phase = event.get("phase")
        if phase == "failed":
            raise job_error(event["code"], event["found"], event["expected"], event["remedy"])
        if phase == "done":
            self._result = Result(result.as_numpy("video").tobytes(), event)
        elif is_last:
            raise job_error("INTERNAL", "the server ended the stream without a video")
        return event and {**event, "preview": result.as_numpy("preview").tobytes()}

    def _answer(self) -> tuple[Any, Any]:
        while (left := self._deadline + GRACE_S - time.monotonic()) > 0:
            with suppress(queue.Empty):
                return self._answers.get(timeout=min(left, SLICE_S))
        self._close(cancel=True)
        raise job_error("DEADLINE_EXCEEDED", "no video before the deadline; the job is cancelled")

    def _close(self, *, cancel: bool) -> None:
        """End the stream once: cancel it, or else read it to its end."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._client.stop_stream(cancel_requests=cancel)
                self._client.close()
        self._closed(self)

    def _connection_error(self, error: Any) -> JobError:
        """The error for a failure of Triton or of the connection; the model's errors arrive as events."""
        found = str(error.message()).removeprefix(f"[request id: {self.id}] ").strip()
        status = status_of(error.status(), found)
        if self._cancelled or status == "CANCELLED":
            return job_error("CANCELLED", "the job was cancelled")
        if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED") and time.monotonic() > self._deadline:
            return job_error("DEADLINE_EXCEEDED", "no video before the deadline; the job is cancelled")
        if error.status() is not None and status != "INVALID_ARGUMENT" and not self._server_answers():
            found, expected = f"no answer from {self.url}", f"a server's gRPC port ({PORT} by default)"
            return job_error("UNAVAILABLE", found, expected, "is a server running? start one with wan-trt serve")
        if status == "NOT_FOUND":
            return job_error(status, found, "a model of this server", "name another with --model")
        return job_error(status, found)

    def _server_answers(self) -> bool:
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException

        with grpc.InferenceServerClient(self.url) as client, suppress(InferenceServerException):
            return bool(client.is_server_live(client_timeout=CONNECT_S))
        return False
