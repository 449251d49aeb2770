"""Any OpenAI-compatible endpoint: images go as data URLs, answers come as text, and every refusal has a name.

The wire is the standard library's: one connection per request, a deadline over the whole of it, a limit on what is
read, no redirect followed (a bearer token would go along) and no proxy of the environment.
"""

from __future__ import annotations

import base64
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from factory import records
from factory.images import encode_png
from factory.models.captioners.answer import schema
from factory.models.captioners.protocol import Answer, Request
from factory.progress import Stopped
from factory.recipe import CaptionSection, HttpSection

MAX_ANSWER_BYTES = 4 << 20
_AGAIN = {408, 409, 425, 429}  # and every 5xx
_USELESS = {301, 302, 303, 307, 308, 401, 403, 404, 405}  # the request as a whole is wrong, whatever the image


@dataclass(frozen=True)
class Reply:
    """What came back over the wire."""

    status: int
    body: bytes
    retry_after: str | None = None


class Budget:
    """What was spent, against a cap. Thread-safe. A unit begins only if it will probably fit; see `begin`.

    `paid` are the tokens in and out of each answer that was paid for before.
    """

    def __init__(self, http: HttpSection, paid: Iterable[tuple[int, int]] = ()) -> None:
        self.http, self._lock = http, threading.Lock()
        self.spent = self._dearest = 0.0
        for tokens_in, tokens_out in paid:
            self.add(tokens_in, tokens_out)

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """The price of so many tokens, in the currency of the recipe's prices."""
        return (tokens_in * self.http.price_in + tokens_out * self.http.price_out) / 1e6

    def add(self, tokens_in: int, tokens_out: int) -> None:
        """One answer that was paid for."""
        with self._lock:
            price = self.cost(tokens_in, tokens_out)
            self.spent, self._dearest = self.spent + price, max(self._dearest, price)

    def begin(self, num_requests: int) -> None:
        """Raises Stopped if so many requests at the dearest price so far would pass the cap: a unit that is begun
        is paid for, and lost if it cannot be finished."""
        self._refuse_beyond(self.spent + num_requests * self._dearest)

    def check(self) -> None:
        """Raises Stopped if the cap is reached."""
        self._refuse_beyond(self.spent)

    def _refuse_beyond(self, wanted: float) -> None:
        cap = self.http.max_spend
        if cap is not None and (wanted > cap or self.spent >= cap):
            raise Stopped(
                f"captions stopped at caption.http.max_spend {cap:g}: {self.spent:.6g} is spent and what is next would "
                "pass it; raise it and run the same command, which goes on from here."
            )


class HttpCaptioner:
    """`HttpCaptioner(section).ask(requests)`: answers of an endpoint, `concurrency` at once.

    408, 429, 5xx, timeouts, broken connections and answers that are no chat completion are tried again with
    exponential back-off, full jitter and Retry-After. Other 4xx are the request's own problem. Raises Stopped at the
    cap, where the endpoint refuses everybody (401, 403, 404, redirects), and after `give_up_after` requests in a row
    that came to nothing. `sleep` and `rng` are for tests.
    """

    name = "http"

    def __init__(
        self,
        section: CaptionSection,
        budget: Budget | None = None,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.section, self.http = section, section.http
        self.address = (section.model or "").rstrip("/") + "/chat/completions"
        self.digest = endpoint_digest(section)
        self.budget = budget or Budget(section.http)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **authorization(self.http)}
        self._sleep, self._rng = sleep, rng or random.Random()
        self._lock, self._failed_in_a_row, self._stopped = threading.Lock(), 0, ""

    def begin(self, num_requests: int) -> None:
        """Raises Stopped if a unit of so many requests should not be begun."""
        self._refuse_if_stopped()
        self.budget.begin(num_requests)

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order."""
        with ThreadPoolExecutor(max_workers=min(self.http.concurrency, max(1, len(requests)))) as pool:
            return list(pool.map(self._asked, requests))

    def _asked(self, request: Request) -> Answer:
        self._refuse_if_stopped()
        self.budget.check()
        body = json.dumps(self.body(request)).encode()
        reply: Reply | None = None
        problem, tokens_in, tokens_out = "", 0, 0
        for attempt in range(self.http.tries):
            if attempt:
                self._pause(attempt, reply)
            reply, problem = self._sent(body)
            if reply is None:
                continue
            if reply.status in _USELESS:
                self._stop(f"answered {reply.status} to every request; check caption.model and the token")
            if reply.status != 200:
                problem = f"http_{reply.status}"
                if reply.status in _AGAIN or reply.status >= 500:
                    continue
                break
            text, used_in, used_out = read_completion(reply.body)
            tokens_in, tokens_out = tokens_in + used_in, tokens_out + used_out
            self.budget.add(used_in, used_out)
            if text is not None:
                self._count(failed=False)
                return Answer(text, None, tokens_in, tokens_out)
            problem = "garbage"
            self.budget.check()
        self._count(failed=True, problem=problem)
        return Answer(None, problem, tokens_in, tokens_out)

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON of one chat completion."""
        image = "data:image/png;base64," + base64.b64encode(encode_png(request.image)).decode()
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": request.prompt}]
        found: dict[str, Any] = {
            "model": self.http.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.section.max_new_tokens,
            "temperature": 0,
        }
        if self.section.answer == "json":
            wanted = {"name": "lesion_description", "strict": True, "schema": schema()}
            found["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return found

    def _sent(self, body: bytes) -> tuple[Reply | None, str]:
        try:
            return post(self.address, body, self._headers, self.http.timeout_s), ""
        except TimeoutError:
            return None, "timeout"
        except (OSError, HTTPException):
            return None, "unreachable"

    def _pause(self, attempt: int, reply: Reply | None) -> None:
        """Full jitter under a doubling ceiling, and never less than what the endpoint asks for."""
        ceiling = min(self.http.max_wait_s, self.http.backoff_s * 2.0 ** (attempt - 1))
        asked = 0.0 if reply is None else retry_after_s(reply.retry_after)
        self._sleep(min(self.http.max_wait_s, max(self._rng.uniform(0, ceiling), asked)))

    def _count(self, failed: bool, problem: str = "") -> None:
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
            enough = self._failed_in_a_row >= self.http.give_up_after
        if enough:
            self._stop(f"came to nothing {self.http.give_up_after} times in a row, the last time {problem}; check it")

    def _stop(self, what: str) -> None:
        self._stopped = f"{self.address} {what}, then run the same command, which goes on from here."
        self._refuse_if_stopped()

    def _refuse_if_stopped(self) -> None:
        if self._stopped:
            raise Stopped(self._stopped)


def endpoint_digest(section: CaptionSection) -> str:
    """What stands for the weights of an endpoint, which are not seen: SHA-256 of its address and the model's name."""
    return records.digest("endpoint", (section.model or "").rstrip("/"), section.http.name)


def authorization(http: HttpSection) -> dict[str, str]:
    """The header with the bearer token. Raises ValueError where the variable that should hold it is empty."""
    if http.token_env is None:
        return {}
    token = os.environ.get(http.token_env, "").strip()
    if not token:
        raise ValueError(f"caption.http.token_env must name a variable that is set, got {http.token_env}; export it.")
    return {"Authorization": f"Bearer {token}"}


def read_completion(body: bytes) -> tuple[str | None, int, int]:
    """Text and the tokens in and out of a chat completion; the text is None where it is none."""
    try:
        found = json.loads(body)
        usage = found.get("usage") or {}
        used = tuple(max(0, int(usage.get(name) or 0)) for name in ("prompt_tokens", "completion_tokens"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None, 0, 0
    try:
        content = found["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None, *used  # type: ignore[return-value]
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return (content if isinstance(content, str) else None), *used  # type: ignore[return-value]


def retry_after_s(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 where it cannot be read."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value)) if value.strip().replace(".", "", 1).isdigit() else _until(value)
    except (ValueError, TypeError):
        return 0.0


def _until(date: str) -> float:
    return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())


def post(address: str, body: bytes, headers: dict[str, str], timeout_s: float) -> Reply:
    """One POST. Raises TimeoutError once `timeout_s` has passed, however slowly bytes still arrive, and OSError or
    HTTPException where the connection fails or more than `MAX_ANSWER_BYTES` come."""
    parts, deadline = urlsplit(address), time.monotonic() + timeout_s
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("POST", parts.path, body, headers)
        response = connection.getresponse()
        chunks, size = [], 0
        while chunk := response.read1(65536):
            size += len(chunk)
            if size > MAX_ANSWER_BYTES:
                raise HTTPException(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no whole answer in {timeout_s:g} s")
            if connection.sock is not None:
                connection.sock.settimeout(left)
            chunks.append(chunk)
        return Reply(response.status, b"".join(chunks), response.getheader("Retry-After"))
    finally:
        connection.close()
