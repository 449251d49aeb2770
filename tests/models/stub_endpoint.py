"""An OpenAI-compatible endpoint on loopback that misbehaves as it is told, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {
    "asymmetry": "low",
    "border_irregularity": "medium",
    "colors": ["dark-brown"],
    "description": "The mole is nearly symmetrical with moderately irregular borders; its color is dark brown.",
}


def good(text: str | None = None) -> tuple[int, dict[str, str], bytes]:
    """A chat completion of 100 tokens in and 20 out."""
    message = {"role": "assistant", "content": json.dumps(GOOD) if text is None else text}
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return 200, {}, json.dumps({"choices": [{"message": message}], "usage": usage}).encode()


class Endpoint:
    """`answer(image, nth)` decides the reply to the nth request (from 1) about an image, known by its data URL."""

    def __init__(self, answer: Callable[[str, int], tuple[int, dict[str, str], bytes] | float]) -> None:
        self.answer, self.lock = answer, threading.Lock()
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.address = ""

    def reply(self, body: dict[str, Any], token: str | None) -> tuple[int, dict[str, str], bytes] | float:
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        with self.lock:
            self.asked[image] += 1
            self.bodies.append(body)
            self.tokens.append(token)
            nth = self.asked[image]
        return self.answer(image, nth)


@contextlib.contextmanager
def serving(answer: Callable[[str, int], Any]) -> Iterator[Endpoint]:
    """The endpoint while it serves; its address goes up to /v1."""
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made = endpoint.reply(body, self.headers.get("Authorization"))
            with contextlib.suppress(OSError):
                if isinstance(made, float):  # drips so slowly that it never ends, though no read waits long
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    for _ in range(int(made / 0.05)):
                        time.sleep(0.05)
                        self.wfile.write(b" ")
                    return
                status, headers, data = made
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    endpoint.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
