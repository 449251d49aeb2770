"""The application on a socket of this machine: uvicorn, with the bounds that it does not have by itself.

A connection that has not sent whole headers after a while is closed, headers have a size, connections a number.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, ClassVar

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES, HEADERS_S, REQUEST_S, MAX_CONNECTIONS, SHUTDOWN_S = 16_384, 10.0, 120.0, 512, 30
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class GuardedProtocol(H11Protocol):
    """headers_s: for a request's headers to be complete; request_s: from there until the client has taken its answer;
    max_connections: at once, the next is answered 503."""

    headers_s: ClassVar[float] = HEADERS_S
    request_s: ClassVar[float] = REQUEST_S
    max_connections: ClassVar[int] = MAX_CONNECTIONS
    _deadline: asyncio.TimerHandle | None = None
    _begun: object = None  # the request that the deadline is of; None: headers

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.write(_FULL)
            transport.close()
        else:
            self._arm(None, self.headers_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._arm(None, self.headers_s)
        else:
            self._arm(self.cycle, self.request_s)

    def connection_lost(self, error: Exception | None) -> None:
        self._disarm()
        super().connection_lost(error)

    def on_response_complete(self) -> None:
        self._disarm()  # an idle connection has uvicorn's own limit
        super().on_response_complete()

    def _arm(self, begun: object, seconds: float) -> None:
        """Bytes that go on coming do not lengthen it."""
        if self._deadline is None or self._begun is not begun:
            self._disarm()
            self._deadline, self._begun = self.loop.call_later(seconds, self.transport.abort), begun

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free. Raises ValueError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ValueError(f"--port must be free on {host}, got {port} ({error.strerror}); choose another.") from error
    return sock


def server(
    app: ASGIApp, host: str, port: int, tls_cert: str | None = None, tls_key: str | None = None, **guards: float
) -> uvicorn.Server:
    """A server of the application; `.run(sockets)` serves until SIGINT or SIGTERM and lets what is begun finish.

    guards: `headers_s` and `max_connections` of `GuardedProtocol` where they are to be others.
    """
    config = uvicorn.Config(
        app, host=host, port=port, http=type("Guarded", (GuardedProtocol,), guards), ws="none", lifespan="off",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES, access_log=False, log_level="error", server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S, ssl_certfile=tls_cert, ssl_keyfile=tls_key, proxy_headers=False,
    )  # fmt: skip
    return uvicorn.Server(config)
