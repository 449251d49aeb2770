"""What is sent to a gateway in tests, and how its answers are read."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from factory.gateway.app import Gateway
from factory.gateway.gather import Judged
from factory.gateway.model import ImageGate
from factory.gateway.pair import Pair
from factory.gateway.server import bound, server

SIZE = 32


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({"quality": 95} if kind != "PNG" else {}))
    return out.getvalue()


def lesion(side: int = 48, radius: float = 0.3, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A dark disk on skin, (side, width, 3) uint8, and where it is, (side, width) bool."""
    rows, columns = np.mgrid[:side, : width or side]
    mask = (rows - side / 2) ** 2 + (columns - (width or side) / 2) ** 2 < (radius * side) ** 2
    image = np.where(mask[..., None], (90, 60, 50), (220, 180, 160)).astype(np.uint8)
    return image, mask


def files(image: np.ndarray, mask: np.ndarray, kind: str = "PNG") -> dict[str, tuple[str, bytes, str]]:
    """As `files=` of a client's form."""
    return {
        "image": ("image", encoded(image, kind), "image/png"),
        "mask": ("mask", encoded(mask.astype(np.uint8) * 255), "image/png"),
    }


def as_json(image: np.ndarray, mask: np.ndarray, **more: Any) -> dict[str, Any]:
    sent = {name: base64.b64encode(data).decode() for name, (_, data, _) in files(image, mask).items()}
    return sent | more


def judge_with(gate: ImageGate) -> Callable[[Sequence[Pair]], Any]:
    async def judge(pairs: Sequence[Pair]) -> list[Judged]:
        return await asyncio.to_thread(gate, [p.image for p in pairs], [p.mask for p in pairs])

    return judge


@contextmanager
def listening(gateway: Gateway, tls: tuple[str | None, str | None] = (None, None), **guards: float) -> Iterator[int]:
    """The gateway's port on loopback, served by uvicorn in a thread."""
    sock = bound("127.0.0.1", 0)
    serving = server(gateway.app(), "127.0.0.1", 0, *tls, **guards)
    thread = threading.Thread(target=lambda: asyncio.run(serving.serve([sock])))
    thread.start()
    while not serving.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield sock.getsockname()[1]
    finally:
        serving.should_exit = serving.force_exit = True
        thread.join(10)
        sock.close()
        assert not thread.is_alive()


def sent_slowly(
    port: int, headers: Sequence[bytes], size: int, path: str = "/v1/validate", pieces: int = 40
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of what is answered to a client that reads when it has sent all of its body, in half a
    second. A reset meanwhile is an error here, as it is to most clients."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(b"\r\n".join([b"POST %s HTTP/1.1" % path.encode(), b"Host: gate", *headers]) + b"\r\n\r\n")
        for _ in range(pieces if size else 0):
            sock.sendall(bytes(size // pieces))
            time.sleep(0.5 / pieces)
        found = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = found.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split(" ")[1]), fields, json.loads(body)


def problem(response: Any, status: int, error: str) -> dict[str, Any]:
    """The refusal, if it is that one in the form that every refusal has."""
    assert response.status_code == status, response.text
    found: dict[str, Any] = json.loads(response.content)
    assert set(found) == {"error", "message", "request_id"} and found["error"] == error, found
    assert found["message"][0].isupper() and found["message"].endswith(".") and len(found["request_id"]) == 32
    return found
