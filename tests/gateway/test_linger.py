"""A client that is still sending when it is refused reads the refusal, and one that never stops is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gateway_client import files, lesion, listening, sent_slowly
from starlette.testclient import TestClient

from factory.gateway.app import Gateway
from factory.gateway.linger import Lingering

TOKEN = "b1946ac92492d2347c6235b4d2611184"
BIG = 3_000_000  # bytes: more than what lies in a connection's buffers on its way
WHOLE = [b"Content-Type: application/json", b"Content-Length: %d" % BIG, b"Authorization: Bearer " + TOKEN.encode()]


def other(lines: list[bytes], old: bytes, new: bytes) -> list[bytes]:
    return [new if line == old else line for line in lines]


@contextlib.contextmanager
def busy(port: int, gateway: Gateway) -> Iterator[None]:
    """All places taken, by a request whose body does not come."""
    head = b"POST /v1/validate HTTP/1.1\r\nHost: gate\r\n" + b"\r\n".join(WHOLE) + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(head)
        while gateway._waiting == 0:
            time.sleep(0.01)
        yield


@pytest.fixture
def gateway(make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch) -> Gateway:
    monkeypatch.setenv("FACTORY_GATE_TOKEN", TOKEN)
    return make_gateway(max_waiting=1, max_body_bytes=2 * BIG, drain_s=3.0)


def test_a_429_is_read_by_a_client_that_is_still_sending(gateway: Gateway) -> None:
    with listening(gateway) as port, busy(port, gateway):
        for lines in (WHOLE, [*WHOLE, b"Connection: close"]):
            status, headers, said = sent_slowly(port, lines, BIG)
            assert (status, said["error"]) == (429, "busy")
            assert headers["retry-after"] == "1" and headers["connection"] == "close"
        with ThreadPoolExecutor(8) as clients:  # more of them at once than may wait
            found = list(clients.map(lambda _: sent_slowly(port, WHOLE, BIG), range(8)))
        assert [status for status, _, _ in found] == [429] * 8


@pytest.mark.parametrize(
    ("path", "lines", "status", "error"),
    [
        ("/v1/validate", WHOLE[:2], 401, "token"),
        ("/v1/validate", other(WHOLE, WHOLE[0], b"Content-Type: text/plain"), 415, "content_type"),
        ("/v1/validate", other(WHOLE, WHOLE[1], b"Content-Length: %d" % (3 * BIG)), 413, "body_too_large"),
        ("/v1/nothing", WHOLE, 404, "no_path"),
        ("/metrics", WHOLE, 405, "no_method"),
    ],
)
def test_other_refusals_before_the_body_are_read_too(
    gateway: Gateway, path: str, lines: list[bytes], status: int, error: str
) -> None:
    with listening(gateway) as port:
        got, headers, said = sent_slowly(port, lines, BIG, path)
        assert (got, said["error"], headers["connection"]) == (status, error, "close")


def test_a_client_that_sends_for_ever_is_cut_off_in_time(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTORY_GATE_TOKEN", TOKEN)
    chunk = b"%x\r\n" % 1000 + bytes(1000) + b"\r\n"
    head = b"POST /v1/validate HTTP/1.1\r\nHost: gate\r\nTransfer-Encoding: chunked\r\n\r\n"
    with (
        listening(make_gateway(drain_s=0.5)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
    ):
        began = time.monotonic()
        sock.sendall(head)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() < began + 20:
                sock.sendall(chunk)
                time.sleep(0.02)
        assert 0.4 < time.monotonic() - began < 5


def test_a_client_that_says_nothing_more_is_left_in_time(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTORY_GATE_TOKEN", TOKEN)
    with listening(make_gateway(drain_s=0.5)) as port:
        began = time.monotonic()
        assert sent_slowly(port, WHOLE[:2], 0)[0] == 401
        assert 0.4 < time.monotonic() - began < 5


def test_an_answer_after_the_whole_body_keeps_its_connection(make_gateway: Callable[..., Gateway]) -> None:
    with TestClient(make_gateway().app()) as client:
        assert "connection" not in client.post("/v1/validate", files=files(*lesion())).headers
        broken = client.post("/v1/validate", content=b"{", headers={"Content-Type": "application/json"})
        assert broken.status_code == 400 and "connection" not in broken.headers
        assert "connection" not in client.get("/healthz").headers


# ------------------------------------------------------------------------------------------------- without a socket

PIECE = 2**16


class Endless:
    """A body without an end, and what was sent to its client."""

    def __init__(self, pause: asyncio.Event | None = None) -> None:
        self.read, self.sent, self.pause = 0, list[dict[str, Any]](), pause

    async def receive(self) -> dict[str, Any]:
        if self.pause is not None:
            await self.pause.wait()
        self.read += PIECE
        return {"type": "http.request", "body": bytes(PIECE), "more_body": True}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def refusing(scope: Any, receive: Any, send: Any) -> None:
    body = json.dumps({"error": "busy"}).encode()
    await send({"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


SCOPE = {"type": "http", "headers": [(b"transfer-encoding", b"chunked")]}


def test_the_answer_goes_first_and_no_more_is_read_than_the_bound_nor_kept() -> None:
    most, client = 64 * 2**20, Endless()
    tracemalloc.start()
    try:
        asyncio.run(Lingering(refusing, most, 60.0, 1)(dict(SCOPE), client.receive, client.send))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert client.read == most and peak < 2**20
    assert [message.get("more_body", False) for message in client.sent] == [False, True, False]
    assert client.sent[1]["body"] and not client.sent[2]["body"]


def test_no_more_bodies_are_dropped_at_once_than_the_bound_and_the_next_is_closed_at_once() -> None:
    async def three() -> list[Endless]:
        pause = asyncio.Event()
        app, clients = Lingering(refusing, PIECE, 60.0, 2), [Endless(pause) for _ in range(3)]
        tasks = [asyncio.create_task(app(dict(SCOPE), each.receive, each.send)) for each in clients]
        await asyncio.sleep(0.05)
        assert [task.done() for task in tasks] == [False, False, True]
        pause.set()
        await asyncio.gather(*tasks)
        later = Endless()
        await app(dict(SCOPE), later.receive, later.send)
        return [*clients, later]

    found = asyncio.run(three())
    assert [client.read for client in found] == [PIECE, PIECE, 0, PIECE]
    assert all(len(client.sent) >= 2 and not client.sent[-1].get("more_body", False) for client in found)
