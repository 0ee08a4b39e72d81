"""A client of a gateway in the standard library alone: ask for a video, follow it, fetch it, end it."""

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from wan22.errors import UserError

ENDED = ("completed", "failed")
POLL_S = (0.2, 5.0)  # the shortest and the longest wait, whatever the gateway proposes
BACK_S = 60.0  # for a gateway that does not answer


@dataclass
class RefusedError(Exception):
    """The gateway's answer, other than success. ``status`` is 0 if there was none."""

    status: int
    code: str
    message: str
    retry_after_s: float = 1.0

    def __str__(self) -> str:
        return self.message


class GatewayClient:
    """Requests to a gateway, each over a connection of its own, so threads may share it.

    Args:
        url: its address, as http://localhost:8080.
        key: sent as a bearer token; empty for none.
        timeout_s: without a byte of an answer.

    Raises:
        UserError: the address is none.
    """

    def __init__(self, url: str, key: str = "", timeout_s: float = 60.0) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host, port, parts = "", None, urlsplit("")
        if parts.scheme not in ("http", "https") or not host or parts.username is not None or parts.query:
            raise UserError(f"gateway {url!r}", "an address such as http://localhost:8080", "correct it")
        if not key.isascii() or not key.isprintable():
            raise UserError("a key with a line break or other than ASCII", "one key", "set it again")
        self.url, self._host, self._port = url, host, port
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s

    def ask(
        self, method: str, path: str, fields: Mapping[str, Any] | None = None, **headers: str
    ) -> tuple[bytes, Mapping[str, str]]:
        """The body of an answer and its headers. Raises RefusedError."""
        sent, body = self._headers | {name.replace("_", "-"): value for name, value in headers.items()}, None
        if fields is not None:
            body, sent["content-type"] = json.dumps(fields).encode(), "application/json"
        connection = self._kind(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, self._path + path, body, sent)
            answer = connection.getresponse()
            content = answer.read()
        except http.client.HTTPException:  # whose text may be any bytes of the answer
            raise RefusedError(0, "no_answer", f"{self.url}: an answer that is not HTTP") from None
        except OSError as error:
            raise RefusedError(0, "no_answer", f"{self.url}: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if not 200 <= answer.status < 300:
            raise _refused(answer.status, content, answer.headers.get("retry-after", ""))
        return content, {name.lower(): value for name, value in answer.headers.items()}

    def models(self) -> list[dict[str, Any]]:
        return list(json.loads(self.ask("GET", "/v1/models")[0])["data"])

    def create(self, fields: Mapping[str, Any], idempotency_key: str) -> dict[str, Any]:
        """The new video; the same one for a repeated key."""
        made: dict[str, Any] = json.loads(self.ask("POST", "/v1/videos", fields, idempotency_key=idempotency_key)[0])
        return made

    def follow(self, video_id: str, on_change: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Ask again and again until the video is completed or failed; ``on_change`` gets every answer.

        Raises:
            RefusedError: the gateway was silent for a minute, or there is no such video.
        """
        heard = time.monotonic()
        while True:
            wait_s = 1.0
            try:
                content, headers = self.ask("GET", f"/v1/videos/{video_id}")
            except RefusedError as error:
                if 0 < error.status < 500 or time.monotonic() - heard > BACK_S:
                    raise
            else:
                heard, video = time.monotonic(), json.loads(content)
                if on_change is not None:
                    on_change(video)
                if video["status"] in ENDED:
                    return dict(video)
                wait_s = float(headers.get("openai-poll-after-ms", "1000")) / 1000
            time.sleep(min(POLL_S[1], max(POLL_S[0], wait_s)))

    def content(self, video_id: str, variant: str = "video") -> bytes:
        return self.ask("GET", f"/v1/videos/{video_id}/content?variant={variant}")[0]

    def delete(self, video_id: str) -> None:
        self.ask("DELETE", f"/v1/videos/{video_id}")


def _refused(status: int, content: bytes, retry_after: str) -> RefusedError:
    try:
        error = json.loads(content)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "error", f"status {status}"
    return RefusedError(status, code, message, float(retry_after) if retry_after.isdecimal() else 1.0)
