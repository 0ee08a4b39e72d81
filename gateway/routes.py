"""The routes of ``/v1/videos``."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.api_error import ApiError, invalid, not_found
from gateway.content import Deliverable, deliver
from gateway.gateway import Gateway, in_thread
from gateway.jobs import Job, Key
from gateway.video_object import event_object, poll_after_ms, video_object

Handler = Callable[[Gateway, Request, Key], Awaitable[Response]]
PAGE, MOST_PAGE = 20, 100
VARIANTS = ("video", "thumbnail", "spritesheet", "preview")
UNSUPPORTED = ("edits", "extensions", "characters")  # of OpenAI's API, as remix: they take videos
BEAT_S = 15.0  # between comments that keep a stream of events open
LOOK_S = 1.0


def routes(gateway: Gateway) -> list[Route]:
    def route(path: str, method: str, handler: Handler) -> Route:
        async def handle(request: Request) -> Response:
            return await handler(gateway, request, await gateway.key(request))

        handle.__name__ = handler.__name__
        return Route(path, handle, methods=[method])

    one = "/v1/videos/{video_id}"
    return [
        route("/v1/videos", "POST", create),
        route("/v1/videos", "GET", list_videos),
        route("/v1/videos/sync", "POST", create_and_wait),
        route("/v1/videos/generations", "POST", generate),
        *(route(f"/v1/videos/{name}", "POST", unsupported) for name in UNSUPPORTED),
        route(f"{one}/remix", "POST", unsupported),
        route(one, "GET", retrieve),
        route(one, "DELETE", delete),
        route(f"{one}/cancel", "POST", cancel),
        route(f"{one}/content", "GET", content),
        route(f"{one}/events", "GET", follow),
    ]


async def create(gateway: Gateway, request: Request, key: Key) -> Response:
    accepted = await gateway.accept(key, await gateway.values(request), request.headers.get("idempotency-key"))
    return await _answer(gateway, accepted.job)


async def retrieve(gateway: Gateway, request: Request, key: Key) -> Response:
    return await _answer(gateway, await gateway.job(request, key))


async def _answer(gateway: Gateway, job: Job) -> Response:
    wait = await in_thread(gateway.jobs.wait, job) if job["status"] == "queued" else None
    after_ms = poll_after_ms(job)
    headers = {"cache-control": "no-store"} | ({"openai-poll-after-ms": str(after_ms)} if after_ms else {})
    return JSONResponse(video_object(job, wait), headers=headers)


async def list_videos(gateway: Gateway, request: Request, key: Key) -> Response:
    asked = dict(request.query_params)
    if unknown := next((name for name in asked if name not in ("after", "limit", "order")), None):
        raise invalid(
            unknown[:80], f"unknown parameter {unknown[:80]!r} | expected after, limit, order", "unknown_field"
        )
    limit, order = asked.get("limit", str(PAGE)), asked.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and int(limit) <= MOST_PAGE):
        raise invalid("limit", f"limit {limit[:20]!r} | expected 0 to {MOST_PAGE}")
    if order not in ("asc", "desc"):
        raise invalid("order", f"order {order[:20]!r} | expected asc or desc")
    found, more = await in_thread(gateway.jobs.page, key, asked.get("after"), int(limit), order)
    ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]} if found else {"first_id": None, "last_id": None}
    data = [video_object(job) for job in found]
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": more})


async def delete(gateway: Gateway, request: Request, key: Key) -> Response:
    job = await gateway.job(request, key)
    await gateway.delete(job["id"], key)
    return JSONResponse({"id": job["id"], "object": "video.deleted", "deleted": True})


async def cancel(gateway: Gateway, request: Request, key: Key) -> Response:
    job = await gateway.job(request, key)
    cancelled = await gateway.cancel(job["id"], key)
    if cancelled is None:
        raise not_found()
    return await _answer(gateway, cancelled)


async def unsupported(_gateway: Gateway, request: Request, _key: Key) -> Response:
    what = request.url.path.rpartition("/")[2]
    message = f"{what} takes a video, which these models do not | expected POST /v1/videos with a prompt or an image"
    raise ApiError(400, "unsupported_operation", message)


# -- waiting for the video


async def create_and_wait(gateway: Gateway, request: Request, key: Key) -> Response:
    job = await _attend(gateway, request, key, await gateway.values(request))
    return await _deliver(gateway, request, job, {"x-video-id": job["id"]})


async def generate(gateway: Gateway, request: Request, key: Key) -> Response:
    """What MLPerf's load generator calls: the defaults and the answer are the benchmark's."""
    body = await gateway.body(request)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise invalid(None, "the body is not JSON", "invalid_json") from None
    if not isinstance(given, dict):
        raise invalid(None, "the body is not a JSON object", "invalid_json")
    from gateway.mlperf import benchmark_values

    values, wants_path = benchmark_values(given, await gateway.model(None))
    job = await _attend(gateway, request, key, values)
    if wants_path:
        path = gateway.store.path(json.loads(job["result"])["file"]) if gateway.options.tells_paths else None
        return JSONResponse({"video_id": job["id"], "video_path": path or f"/v1/videos/{job['id']}/content"})
    video = await in_thread(_whole, gateway, job)
    return JSONResponse({"video_id": job["id"], "video_bytes": base64.b64encode(video).decode()})


async def _attend(gateway: Gateway, request: Request, key: Key, values: dict[str, Any]) -> Job:
    """Accept a job and wait for its video; a client that goes away cancels it.

    Raises:
        ApiError: the job failed.
    """
    accepted = await gateway.accept(key, values, request.headers.get("idempotency-key"), attended=True)
    job_id = accepted.job["id"]
    gone = asyncio.ensure_future(_disconnected(request))
    ended = asyncio.ensure_future(gateway.ended(job_id, key))
    try:
        await asyncio.wait((gone, ended), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            if accepted.is_new:
                await gateway.cancel(job_id, key)
            raise ApiError(499, "cancelled", "the client has gone")
        job = ended.result()
    except asyncio.CancelledError:
        if accepted.is_new:
            await asyncio.shield(gateway.cancel(job_id, key))
        raise
    finally:
        gone.cancel()
        ended.cancel()
    if job is None:
        raise not_found()
    if job["status"] == "failed":
        status = {"invalid_request": 400, "timeout": 504}.get(job["error_code"], 500)
        headers = {"x-should-retry": "false", "x-video-id": job_id}
        raise ApiError(status, job["error_code"], job["error_message"], headers=headers)
    return job


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- the video


async def content(gateway: Gateway, request: Request, key: Key) -> Response:
    job = await gateway.job(request, key)
    variant = request.query_params.get("variant", "video")
    if variant not in VARIANTS:
        raise invalid("variant", f"variant {variant[:40]!r} | expected one of {', '.join(VARIANTS)}")
    if variant == "preview":
        picture = await in_thread(gateway.jobs.preview, job["id"])
        if picture is None:
            raise ApiError(404, "preview_not_ready", "no preview | ask for one with preview, and wait for two steps")
        return Response(picture, media_type="image/jpeg", headers={"cache-control": "private, no-cache"})
    if variant == "video":
        return await _deliver(gateway, request, job, {})
    reader = await in_thread(_reader, gateway, job)
    try:
        picture = await in_thread(gateway.pictures.picture, job["id"], variant, reader)
    finally:
        reader.close()
    return Response(picture, media_type="image/webp", headers={"cache-control": "private, max-age=3600"})


async def _deliver(gateway: Gateway, request: Request, job: Job, headers: dict[str, str]) -> Response:
    reader = await in_thread(_reader, gateway, job)
    result = json.loads(job["result"])
    suffix = job["media_type"].partition("/")[2]
    what = Deliverable(result["size_bytes"], result["sha256"], job["media_type"], f"{job['id']}.{suffix}")
    answer = deliver(request, what, reader)
    timing = f"job;dur={1000 * result['event']['seconds']:.0f}"
    for name, value in {**headers, "server-timing": timing}.items():
        answer.headers[name] = value
    return answer


def _reader(gateway: Gateway, job: Job) -> Any:
    """The open file of a job. Raises ApiError 404 if it is not there yet, or no longer."""
    if job["status"] == "failed":
        raise ApiError(404, job["error_code"], f"the job failed: {job['error_message']}")
    if job["status"] != "completed":
        raise ApiError(404, "video_not_ready", f"the video is {job['status']} | try again when it is completed")
    reader = gateway.store.open(json.loads(job["result"])["file"]) if job["result"] else None
    if reader is None:
        raise ApiError(404, "expired", "the video is no longer kept")
    return reader


def _whole(gateway: Gateway, job: Job) -> bytes:
    reader = _reader(gateway, job)
    try:
        return bytes(reader.read(0, reader.size_bytes))
    finally:
        reader.close()


# -- events


async def follow(gateway: Gateway, request: Request, key: Key) -> Response:
    """Server-sent events of a job, from the one after ``Last-Event-ID``; the stream ends with the job."""
    job = await gateway.job(request, key)
    last = request.headers.get("last-event-id", "")
    of, _, number = last.rpartition(":")
    if last and (of != job["id"] or not (number.isascii() and number.isdigit() and len(number) < 10)):
        raise invalid("Last-Event-ID", "Last-Event-ID | expected the id of an event of this video")
    if job["status"] in ("completed", "failed") and int(number or -1) >= job["events"]:
        return Response(status_code=204)  # ends the attempts of a browser's EventSource
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_events(gateway, job["id"], key, int(number or 0)), 200, headers, "text/event-stream")


async def _events(gateway: Gateway, job_id: str, key: Key, seen: int) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    spoke_at, position = loop.time(), None
    with gateway.hub.watch(job_id) as watch:
        while True:
            job = await in_thread(gateway.jobs.get, job_id, key)
            if job is None:
                yield _event("deleted", "", {"id": job_id, "object": "video.deleted", "deleted": True})
                return
            ended = job["status"] in ("completed", "failed")
            if job["status"] == "queued":
                wait = await in_thread(gateway.jobs.wait, job)
                if wait.position != position:
                    position, spoke_at = wait.position, loop.time()
                    yield _event("status", "", video_object(job, wait))
            for event in await in_thread(gateway.jobs.events_after, job_id, seen):
                seen, spoke_at = event["number"], loop.time()
                if event["kind"] not in ("completed", "failed"):
                    yield _event(event["kind"], f"{job_id}:{seen}", event_object(job_id, json.loads(event["data"])))
            if ended:
                yield _event(job["status"], f"{job_id}:{job['events']}", video_object(job))
                return
            if loop.time() - spoke_at > BEAT_S:
                spoke_at = loop.time()
                yield ": waiting\n\n"
            await watch.change(LOOK_S)


def _event(kind: str, event_id: str, data: dict[str, Any]) -> str:
    named = f"id: {event_id}\n" if event_id else ""
    return f"{named}event: {kind}\ndata: {json.dumps(data)}\n\n"
