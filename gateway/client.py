"""A client of a gateway in the standard library alone: ask for a video, follow it, fetch it, end it."""

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from wan22.errors import UserError, shortened
from wan22.quantities import human_bytes

ENDED = ("completed", "failed")
POLL_S = (0.2, 5.0)  # the shortest and the longest wait, whatever the gateway proposes
BACK_S = 60.0  # for a gateway that does not answer
MOST_JSON_BYTES, MOST_BYTES = 4 * 2**20, 4 * 2**30  # of an answer, and of a video
LONGEST_S = 3600.0  # of an answer, as of events while a job runs
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


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
        timeout_s: without a byte of an answer, and for all of one in JSON.

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
        self, method: str, path: str, fields: Mapping[str, Any] | None = None, *,
        headers: Mapping[str, str] = NO_HEADERS, most_bytes: int = MOST_BYTES, within_s: float = LONGEST_S,
    ) -> tuple[bytes, Mapping[str, str]]:  # fmt: skip
        """The body of an answer and its headers. Raises RefusedError, also for one that is too large or too slow."""
        sent, body = {**self._headers, **headers}, None
        if fields is not None:
            body, sent["content-type"] = json.dumps(fields).encode(), "application/json"
        connection = self._kind(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, self._path + path, body, sent)
            sock, until = connection.sock, time.monotonic() + within_s
            answer, content = connection.getresponse(), bytearray()
            while chunk := answer.read1(2**16):
                content += chunk
                if len(content) > most_bytes:
                    raise OSError(f"an answer of more than {human_bytes(most_bytes)}")
                if (left := until - time.monotonic()) <= 0:
                    raise TimeoutError(f"no whole answer within {within_s:g} s")
                sock.settimeout(min(self._timeout_s, left))
            if answer.length:
                raise OSError(f"an answer that lacks {human_bytes(answer.length)}")
        except http.client.IncompleteRead:
            raise RefusedError(0, "no_answer", f"{self.url}: an answer that was cut off") from None
        except http.client.HTTPException:  # whose text may be any bytes of the answer
            raise RefusedError(0, "no_answer", f"{self.url}: an answer that is not HTTP") from None
        except OSError as error:
            why = " ".join(f"{error or type(error).__name__}".split())
            raise RefusedError(0, "no_answer", f"{self.url}: {shortened(why, 200)}") from None
        finally:
            connection.close()
        if not 200 <= answer.status < 300:
            raise _refused(answer.status, bytes(content), answer.headers.get("retry-after", ""))
        return bytes(content), {name.lower(): value for name, value in answer.headers.items()}

    def _object(
        self, method: str, path: str, fields: Mapping[str, Any] | None = None, headers: Mapping[str, str] = NO_HEADERS
    ) -> tuple[dict[str, Any], Mapping[str, str]]:
        """The JSON object of an answer, and its headers. Raises RefusedError, also for an answer that is none."""
        content, answered = self.ask(
            method, path, fields, headers=headers, most_bytes=MOST_JSON_BYTES, within_s=self._timeout_s
        )
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        self._require(isinstance(found, dict), "JSON")
        return found, answered

    def _require(self, right: object, what: str) -> None:
        if not right:
            raise RefusedError(0, "wrong_answer", f"{self.url}: an answer without {what}; is this a gateway?")

    def models(self) -> list[dict[str, Any]]:
        found = self._object("GET", "/v1/models")[0].get("data")
        self._require(isinstance(found, list) and all(map(_is_model, found)), "models")
        return list(found or ())

    def create(self, fields: Mapping[str, Any], idempotency_key: str) -> dict[str, Any]:
        """The new video; the same one for a repeated key."""
        made = self._object("POST", "/v1/videos", fields, {"idempotency-key": idempotency_key})[0]
        named = made.get("id")
        self._require(isinstance(named, str) and re.fullmatch(r"[\w.-]{1,200}", named, re.ASCII), "the id of a video")
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
                video, headers = self._object("GET", f"/v1/videos/{video_id}")
                self._require(_is_video(video), "a video")
            except RefusedError as error:
                if 0 < error.status < 500 or time.monotonic() - heard > BACK_S:
                    raise
            else:
                heard = time.monotonic()
                if on_change is not None:
                    on_change(video)
                if video["status"] in ENDED:
                    return dict(video)
                proposed = headers.get("openai-poll-after-ms", "")
                wait_s = int(proposed) / 1000 if re.fullmatch("[0-9]{1,9}", proposed) else 1.0
            time.sleep(min(POLL_S[1], max(POLL_S[0], wait_s)))

    def content(self, video_id: str, variant: str = "video") -> bytes:
        content, headers = self.ask("GET", f"/v1/videos/{video_id}/content?variant={variant}")
        self._require(not headers.get("content-type", "").startswith(("text/", "application/json")), "a file")
        return content

    def delete(self, video_id: str) -> None:
        self.ask("DELETE", f"/v1/videos/{video_id}")


def _is_model(each: object) -> bool:
    return (
        isinstance(each, dict)
        and isinstance(each.get("id"), str)
        and isinstance(each.get("aliases"), list)
        and isinstance(each.get("ready_servers"), int)
    )


def _is_video(found: Mapping[str, Any]) -> bool:
    error = found.get("error")
    told = isinstance(error, dict) and all(isinstance(error.get(name), str) for name in ("message", "code"))
    return isinstance(found.get("status"), str) and (told or found["status"] != "failed")


def _refused(status: int, content: bytes, retry_after: str) -> RefusedError:
    try:
        error = json.loads(content)["error"]
        code, message = str(error["code"]), shortened(" ".join(str(error["message"]).split()), 600)
    except (ValueError, KeyError, TypeError, RecursionError):
        code, message = "error", f"status {status}"
    return RefusedError(status, code, message, float(retry_after) if re.fullmatch("[0-9]{1,5}", retry_after) else 1.0)
