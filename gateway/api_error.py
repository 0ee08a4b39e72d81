"""Errors in the shape that clients of ``/v1/videos`` read, for every failure of the gateway and its web framework."""

from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
LONGEST_WAIT_S = 120  # the clients' own limit: they ignore a longer Retry-After and ask again at once
MAX_MESSAGE = 600  # characters; a request may contain much more


@dataclass
class ApiError(Exception):
    """An answer other than success. ``message`` is for people: one line, without paths of this machine."""

    status: int
    code: str  # stable
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> JSONResponse:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message if len(self.message) <= MAX_MESSAGE else self.message[:MAX_MESSAGE] + "…"
        error = {"message": _utf8(message), "type": kind, "param": self.param and _utf8(self.param), "code": self.code}
        return JSONResponse({"error": error}, self.status, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        """With what makes the official clients repeat the request, or not."""
        headers: dict[str, Any] = dict(self.headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
            headers["x-should-retry"] = "true" if self.retry_after_s <= LONGEST_WAIT_S else "false"
        elif self.status in (409, 501):
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["www-authenticate"] = 'Bearer realm="wan-trt"'
        return headers


def _utf8(text: str) -> str:
    """``text`` with halves of surrogates, which JSON's escapes can have, as escapes."""
    return text.encode(errors="backslashreplace").decode()


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, message, param)


def not_found(what: str = "video") -> ApiError:
    return ApiError(404, "not_found", f"no such {what}", "video_id" if what == "video" else None)
