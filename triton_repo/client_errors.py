"""What a client says when a server does not make its video: a stable status, and a line with what to do about it."""

from typing import Literal, get_args
from urllib.parse import urlsplit

from wan22.errors import UserError

Status = Literal["INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL"]
PORT = 8001


class JobError(Exception):
    """The server did not make the video.

    Attributes:
        status: what kind of no it was, a stable code.
        reason: the same in the parts of a line of the command.
    """

    def __init__(self, status: Status, reason: UserError) -> None:
        super().__init__(str(reason))
        self.status: Status = status
        self.reason = reason


def address_of(url: str) -> str:
    """Host and port of ``url``, which may have a scheme and no port.

    Raises:
        UserError: no host, a port that is none, a scheme with encryption, or a path.
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
    """The code of an error; what Triton refuses before a model sees it has a text alone."""
    if code is not None:
        name = code.removeprefix("StatusCode.")
        return name if name in get_args(Status) else "INTERNAL"  # type: ignore[return-value]
    texts: dict[str, Status] = {"Exceeds maximum queue size": "UNAVAILABLE", "unknown model": "NOT_FOUND"}
    return next((status for text, status in texts.items() if text in message), "INVALID_ARGUMENT")


def job_error(status: Status, found: str, expected: str = "", remedy: str = "") -> JobError:
    remedies = {"INVALID_ARGUMENT": "ask for something else", "INTERNAL": "see the server's log"}
    reason = UserError(found, expected or "a video", remedy or remedies.get(status, "try again later"))
    return JobError(status, reason)
