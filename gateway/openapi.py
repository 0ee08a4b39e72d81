"""``/openapi.json``, from the table of fields."""

from typing import Any

from gateway.fields import schema
from gateway.order import EXTENSION

ERROR = {"$ref": "#/components/schemas/Error"}
VIDEO = {"$ref": "#/components/schemas/Video"}
STATUSES = ["queued", "in_progress", "completed", "failed"]


def description() -> dict[str, Any]:
    body = {
        "required": True,
        "content": {kind: {"schema": schema()} for kind in ("application/json", "multipart/form-data")},
    }
    video, mp4 = _json("the video object", VIDEO), {"description": "the file", "content": {"video/mp4": {}}}
    one = "/v1/videos/{video_id}"
    return {
        "openapi": "3.1.0",
        "info": {"title": "wan-trt gateway", "version": "1", "description": "Videos from text and images."},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/videos": {
                "post": _operation("Ask for a video.", video, body, header="Idempotency-Key"),
                "get": _operation("List videos.", _json("a page"), query=("after", "limit", "order")),
            },
            "/v1/videos/sync": {"post": _operation("Ask for a video and wait for it.", mp4, body)},
            "/v1/videos/generations": {"post": _operation("The same for MLPerf's load generator.", _json("a video"))},
            one: {
                "get": _operation("How far a video is.", video),
                "delete": _operation("Delete a video in any state; a running job is stopped.", _json("deleted")),
            },
            f"{one}/cancel": {"post": _operation("End a job and keep its record.", video)},
            f"{one}/content": {"get": _operation("The file or a picture of it.", mp4, query=("variant",))},
            f"{one}/events": {
                "get": _operation(
                    "Server-sent events: status, progress, completed, failed.",
                    {"description": "events", "content": {"text/event-stream": {}}},
                    header="Last-Event-ID",
                )
            },
            "/v1/models": {"get": _operation("What can be asked for.", _json("a list"))},
            "/health": {"get": _operation("Alive.", _json("ok"))},
            "/ready": {"get": _operation("A server takes jobs.", _json("ready"))},
            "/metrics": {"get": _operation("Prometheus.", {"description": "metrics", "content": {"text/plain": {}}})},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error(), "Video": _video()},
        },
    }


def _operation(
    summary: str,
    answer: dict[str, Any],
    body: dict[str, Any] | None = None,
    query: tuple[str, ...] = (),
    header: str = "",
) -> dict[str, Any]:
    places = [("query", name) for name in query] + ([("header", header)] if header else [])
    given = [{"in": place, "name": name, "schema": {"type": "string"}} for place, name in places]
    responses = {"200": answer, "default": _json("an error", ERROR)}
    return {"summary": summary, "parameters": given, "responses": responses} | ({"requestBody": body} if body else {})


def _json(says: str, schema_of: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": says, "content": {"application/json": {"schema": schema_of or {"type": "object"}}}}


def _error() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    inner = {"type": "object", "properties": dict.fromkeys(("message", "type", "param", "code"), text)}
    return {"type": "object", "properties": {"error": inner}, "required": ["error"]}


def _video() -> dict[str, Any]:
    number, text = {"type": ["number", "null"]}, {"type": "string"}
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "status": {"enum": STATUSES},
            "progress": {"type": "integer", "minimum": 0, "maximum": 100},
            **dict.fromkeys(("created_at", "completed_at", "expires_at", "step", "steps", "queue_position"), number),
            **dict.fromkeys(("eta_seconds", "seconds_in_phase"), number),
            **dict.fromkeys(("phase", "prompt", "size", "seconds", "model", *EXTENSION), text),
            "expert": {"type": ["string", "null"]},
            "error": {"type": ["object", "null"]},
        },
        "required": ["id", "object", "status", "progress", "created_at"],
    }
