"""Around every request, whatever it comes to: its id, its headers, its place in the metrics."""

from __future__ import annotations

import secrets
import time
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from factory.gateway.metrics import Metrics

ID_HEADER = "Gate-Request-Id"  # beside any id of a proxy's, which a client may choose
_HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
}  # fmt: skip


def request_id_of(scope: Any) -> str:
    """The id that `Counted` gave a request: what its answer and its audit line share."""
    return str(scope["factory.request_id"])


class Counted:
    """paths: those that are counted by name; any other is `other`, so that a stranger makes no new series."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope["factory.request_id"] = secrets.token_hex(16)
        began, path = time.perf_counter(), scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[ID_HEADER] = scope["factory.request_id"]
                headers.update(_HEADERS)
                self._metrics.requests.labels(path, str(message["status"])).inc()
                self._metrics.seconds.labels(path).observe(time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, counting)
