"""An answer that comes before its request's body has ended is read by the client, and not overtaken by a reset.

A server that closes a connection while bytes of the client lie unread, or still come, answers them with a reset, and a
client that is sending then never reads what it was told (RFC 9112, section 9.6). So the answer goes out whole at once,
with `Connection: close`, and before the connection is closed what is left of the body is read and dropped: so many
bytes, so many seconds and so many requests at once, and nothing of it is kept.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Lingering:
    """The application, with its early answers made to be read. most_bytes, seconds: of one body; most_at_once: requests
    whose bodies are dropped, the next early answer's connection is closed without."""

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float, most_at_once: int) -> None:
        self._app, self._most_bytes, self._seconds = app, most_bytes, seconds
        self._most_at_once, self._at_once = most_at_once, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        body = _Body(receive)

        async def lingering(message: Message) -> None:
            if body.ended:
                return await send(message)
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            if message["type"] != "http.response.body" or message.get("more_body", False):
                return await send(message)
            await send({**message, "more_body": True})  # Content-Length tells the client that this is all
            await self._drop(body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, body.receive, lingering)

    async def _drop(self, body: _Body) -> None:
        """Reads until the body ends, the client hangs up or a bound is reached."""
        if self._at_once >= self._most_at_once:
            return
        self._at_once += 1
        try:
            async with asyncio.timeout(self._seconds):
                left = self._most_bytes
                while left > 0 and not body.ended:
                    left -= len((await body.receive()).get("body", b""))
        except TimeoutError:
            pass
        finally:
            self._at_once -= 1


class _Body:
    """A request's messages, and whether the last of them has come."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.ended = receive, False

    async def receive(self) -> Message:
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
