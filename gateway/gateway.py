"""What the routes share: who asks, which model is meant, accepting a job, waiting for it, ending it."""

import asyncio
import hashlib
import ipaddress
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers
from starlette.requests import Request

from gateway.api_error import ApiError, invalid, not_found
from gateway.body import read_body
from gateway.claims import Claims
from gateway.content import Pictures
from gateway.extension import wants_extension, with_extended_prompt
from gateway.hub import Hub
from gateway.jobs import Accepted, Job, Jobs, Key
from gateway.keys import Keys
from gateway.metrics import GatewayMetrics
from gateway.order import Latents, Order, make_order
from gateway.served import ServedModel
from gateway.store import Store
from gateway.workers import Workers
from runtime.extend import Endpoint

T = TypeVar("T")
VIDEO_ID = re.compile(r"video_[0-9a-f]{32}")
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
LOOK_S = 1.0  # at jobs that other gateways run
ENDED_LOOK_S = 0.05
MODELS_FRESH_S = 2.0
CHECKS_AT_A_TIME = 2  # each may decode an image
EXTENSIONS_AT_A_TIME = 16  # each waits for a language model


@dataclass(frozen=True)
class Options:
    image_hosts: frozenset[str] = frozenset()  # whose images may be fetched
    any_model: bool = False  # unknown names of models mean the default one
    cancel_within_s: float = 5.0  # what a DELETE waits for
    latents: Latents = field(default_factory=Latents)  # that requests may name
    extend: Endpoint | None = None  # the language model that may rewrite prompts
    tells_paths: bool = False  # the benchmark's answer names the file, not its address
    most_body_bytes: int = 64 * 2**20
    body_within_s: float = 60.0


@dataclass
class Gateway:
    jobs: Jobs
    claims: Claims
    store: Store
    keys: Keys
    workers: Workers
    hub: Hub
    metrics: GatewayMetrics
    options: Options = field(default_factory=Options)
    draining: bool = False
    pictures: Pictures = field(default_factory=Pictures)
    _models: dict[str, ServedModel] = field(default_factory=dict)
    _models_at: float = 0.0
    _limiters: dict[str, CapacityLimiter] = field(default_factory=dict)

    async def key(self, request: Request) -> Key:
        """Who asks. Raises ApiError without a valid key; or without keys at all, for what a page of others sends."""
        given = request.headers.get("authorization")
        key = self.keys.check(given) if self.keys.is_fresh else await in_thread(self.keys.check, given)
        if not key.id:
            _check_own_page(request.headers)
        return key

    async def models(self) -> dict[str, ServedModel]:
        """The models that can be asked for, the default one first: that of a ready server."""
        if time.monotonic() - self._models_at > MODELS_FRESH_S or not self._models:
            self._models = self.workers.models() | await in_thread(self.claims.known_models)
            self._models_at = time.monotonic()
        return self._models

    async def model(self, name: str | None) -> ServedModel:
        """Raises ApiError for an unknown name, or while no server has been seen."""
        models = await self.models()
        if not models:
            raise ApiError(503, "no_server", "no server is ready yet | try again later", retry_after_s=10)
        default = next(iter(models.values()))
        if name is None:
            return default
        found = next((model for model in models.values() if name in model.aliases), None)
        if found is None and not self.options.any_model:
            raise invalid("model", f"model {name[:80]!r} | expected one of {', '.join(models)}", "model_not_found")
        return found or default

    async def values(self, request: Request) -> dict[str, Any]:
        body = await self.body(request)
        return await in_thread(read_body, request.headers.get("content-type", ""), body)

    async def body(self, request: Request) -> bytes:
        """Raises ApiError for one that is compressed."""
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            message = f"Content-Encoding {encoding[:40]} | expected a body as it is"
            raise ApiError(415, "unsupported_media_type", message)
        return await request.body()

    async def accept(
        self, key: Key, values: Mapping[str, Any], header: str | None = None, *, attended: bool = False
    ) -> Accepted:
        """Check the request, write its job down, and tell the workers; in this order."""
        if self.draining:
            raise ApiError(503, "server_shutdown", "the gateway is ending", retry_after_s=30)
        idempotency_key = _idempotency_key(header, values.get("task_id"))
        digest = await in_thread(_digest, values)
        if idempotency_key is not None:
            job = await in_thread(self.jobs.repeated, key, idempotency_key, digest)
            if job is not None:
                return Accepted(job, is_new=False)
        model, endpoint = await self.model(values.get("model")), self.options.extend
        wanted = wants_extension(values, endpoint)
        order = await self._order(values, model)
        if wanted and endpoint is not None:  # what cannot be made, or has no room, does not leave the gateway
            await in_thread(self.jobs.check_room, order, key)
            extend = partial(with_extended_prompt, values, order, endpoint, model.limits.max_prompt_bytes)
            values = await to_thread.run_sync(extend, limiter=self._limiter("extensions", EXTENSIONS_AT_A_TIME))
            order = await self._order(values, model)
        accepted = await in_thread(self.jobs.add, order, key, digest, idempotency_key, attended=attended)
        self.workers.wake()
        return accepted

    async def _order(self, values: Mapping[str, Any], model: ServedModel) -> Order:
        make = partial(make_order, values, model, self.options.image_hosts, self.options.latents)
        return await to_thread.run_sync(make, limiter=self._limiter("checks", CHECKS_AT_A_TIME))

    def _limiter(self, name: str, most: int) -> CapacityLimiter:
        return self._limiters.setdefault(name, CapacityLimiter(most))  # needs a running loop

    async def job(self, request: Request, key: Key) -> Job:
        """The job of the request's path. Raises ApiError 404 for others' and impossible ones."""
        job_id = request.path_params["video_id"]
        job = await in_thread(self.jobs.get, job_id, key) if VIDEO_ID.fullmatch(job_id) else None
        if job is None:
            raise not_found()
        return job

    async def ended(self, job_id: str, key: Key) -> Job | None:
        """Wait until the job has ended; None if it is deleted."""
        with self.hub.watch(job_id) as watch:
            while True:
                job = await in_thread(self.jobs.get, job_id, key)
                if job is None or job["status"] in ("completed", "failed"):
                    return job
                await watch.change(LOOK_S)

    async def cancel(self, job_id: str, key: Key) -> Job | None:
        """Cancel, and wait a bounded time until its server is free of it."""
        job = await in_thread(self.jobs.cancel, job_id, key)
        if job is not None:
            await self._stopped(job)
        return job

    async def delete(self, job_id: str, key: Key) -> None:
        """Delete a job in any state. Raises ApiError 404 if there is none."""
        job = await in_thread(self.jobs.delete, job_id, key)
        if job is None:
            raise not_found()
        await self._stopped(job)
        if job["result"]:
            await in_thread(self.store.remove, json.loads(job["result"])["file"])
        await in_thread(self.jobs.remove, job_id)

    async def _stopped(self, job: Job) -> None:
        """Stop a job that somebody works on, and wait a bounded time for it; the rest happens in the background."""
        self.hub.changed(job["id"])
        if not job["worker"]:
            return
        started = time.monotonic()
        await in_thread(self.workers.end, job["id"])
        while time.monotonic() - started < self.options.cancel_within_s:
            if not await in_thread(self.jobs.is_held, job["id"]):
                self.metrics.cancelled(time.monotonic() - started)
                return
            await asyncio.sleep(ENDED_LOOK_S)


def _check_own_page(headers: Headers) -> None:
    """Refuse what a browser sends for a page of another host, which nothing else keeps from making jobs."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        foreign = origin is not None and urlsplit(origin).netloc != host
    except ValueError:
        name, foreign = "", True
    if foreign or not (name == "localhost" or _is_address(name)):  # a name could be made to lead here
        message = "a request of another page, or under another name than localhost | expected keys for that"
        raise ApiError(403, "cross_origin", f"{message}: wan-trt gateway key add")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def in_thread(call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    return await to_thread.run_sync(partial(call, *arguments, **named))


def _idempotency_key(header: str | None, task_id: str | None) -> str | None:
    if header is not None and task_id is not None and header != task_id:
        raise invalid("task_id", "task_id and Idempotency-Key differ | expected one of the two", "conflicting_fields")
    given = header if header is not None else task_id
    if given is not None and not IDEMPOTENCY_KEY.fullmatch(given):
        name = "Idempotency-Key" if header is not None else "task_id"
        raise invalid(name, f"{name} | expected 1 to 255 visible ASCII characters")
    return given


def _digest(values: Mapping[str, Any]) -> str:
    """A hash of the request, the same for JSON and forms."""

    def hashed(value: Any) -> str:
        return f"image {hashlib.sha256(value).hexdigest()}"

    text = json.dumps({k: v for k, v in values.items() if k != "task_id"}, sort_keys=True, default=hashed)
    return hashlib.sha256(text.encode()).hexdigest()
