"""What surrounds every request: an id, a limit of its body's size and of the time that it may take to arrive.

What is not HTTP never becomes a request: :class:`Protocol` refuses it in the shape of all other errors.
"""

import asyncio
import resource
import secrets
import time
from operator import attrgetter

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.api_error import ApiError

HEAD_WITHIN_S = 30.0  # for a request's head to arrive
FILES_KEPT = 400  # of those that a process may open: for the database, videos, servers, and connections of one moment
BACKLOG = 128  # connections that are taken in one moment
DRAINED = 4  # times the limit: what is read and thrown away, so that the client reads the answer


class Outer:
    """The outermost layer of the application.

    Args:
        app: what it surrounds.
        most_bytes: of a body.
        within_s: for a body to arrive.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, within_s: float) -> None:
        self._app, self._most, self._within_s = app, most_bytes, within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}".encode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        body = _Body(receive, self._most, self._within_s)
        await self._app(scope, body.receive, send_named)


class Protocol(H11Protocol):
    """Neither connections that send nothing, nor those that send a head byte by byte, keep others out for long.

    A request's head has some seconds to arrive. When so many connections are open that files of the gateway itself may
    soon not be, a new one takes the place of the one that has been waiting for a request for longest.
    """

    _since, _head = 0.0, None  # when it began to wait for a request, and the end of that

    @property
    def waits(self) -> bool:
        """True outside of a request and its answer."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FILES_KEPT
        here = [each for each in self.connections if not each.transport.is_closing()]
        if len(here) > most > 0:
            waiting = [each for each in here if isinstance(each, Protocol) and each.waits]  # this one is among them
            min(waiting, key=attrgetter("_since")).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.waits:
            self._unset()
        elif self._head is None:
            self._wait()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def _wait(self) -> None:
        self._since = self.loop.time()
        self._head = self.loop.call_later(HEAD_WITHIN_S, self.transport.abort)

    def _unset(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP and close the connection; uvicorn itself answers with plain text."""
        answer = ApiError(400, "invalid_http", f"{msg.rstrip('.').lower()} | expected HTTP/1.1").response()
        events = (
            h11.Response(status_code=400, headers=[*answer.raw_headers, (b"connection", b"close")]),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Body:
    def __init__(self, receive: Receive, most_bytes: int, within_s: float) -> None:
        self._receive, self._most = receive, most_bytes
        self._until, self._seen, self._whole = time.monotonic() + within_s, 0, False

    async def receive(self) -> Message:
        """The next message. Raises ApiError for a body that is too large or too slow."""
        if self._whole:
            return await self._receive()
        message = await self._next()
        if self._seen > self._most:
            while not self._whole and self._seen < DRAINED * self._most:
                await self._next()
            raise ApiError(413, "too_large", f"a body over {self._most} bytes | expected at most that")
        return message

    async def _next(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._until - time.monotonic()))
        except TimeoutError:
            headers = {"connection": "close", "x-should-retry": "false"}
            raise ApiError(408, "timeout", "the body did not arrive in time", headers=headers) from None
        self._seen += len(message.get("body", b""))
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message
