"""The client's errors if the server does not make a video: a stable status, and a line with the remedy."""

from typing import Literal, get_args
from urllib.parse import urlsplit

from wan22.errors import UserError

Status = Literal["INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL"]
PORT = 8001


class JobError(Exception):
    """The server did not make the video.

    Attributes:
        status: a stable code for the kind of failure.
        reason: the failure as found, expected and remedy.
    """

    def __init__(self, status: Status, reason: UserError) -> None:
        super().__init__(str(reason))
        self.status: Status = status
        self.reason = reason


def address_of(url: str) -> str:
    """The host and port of ``url``, which may have a scheme and lack the port.

    Raises:
        UserError: there is no host, the port is invalid, the scheme is encrypted, or there is a path.
    """
    expected = f"host and port of a server, such as localhost:{PORT}"
    try:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        host, port = parts.hostname, parts.port or PORT
    except ValueError:
        host, port, parts = None, 0, None
    if parts is None or not host or parts.scheme not in ("grpc", "http") or parts.path.strip("/"):
        raise UserError(f"server {url!r}", expected, "name the gRPC port of a server without TLS")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def status_of(code: str | None, message: str) -> Status:
    """The status for an error's code, or for its text: errors from Triton's queue have no code."""
    if code is not None:
        name = code.removeprefix("StatusCode.")
        return name if name in get_args(Status) else "INTERNAL"  # type: ignore[return-value]
    texts: dict[str, Status] = {"Exceeds maximum queue size": "UNAVAILABLE", "unknown model": "NOT_FOUND"}
    return next((status for text, status in texts.items() if text in message), "INVALID_ARGUMENT")


def job_error(status: Status, found: str, expected: str = "", remedy: str = "") -> JobError:
    remedies = {"INVALID_ARGUMENT": "change the request", "INTERNAL": "see the server's log"}
    reason = UserError(found, expected or "a video", remedy or remedies.get(status, "try again later"))
    return JobError(status, reason)
