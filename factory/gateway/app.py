"""The ASGI application: what is asked of a request, in order, and what is answered.

    token -> room in the queue -> content type -> body under a cap and a time limit -> fields -> pixels -> the gate
    -> audit line -> answer

What is cheap comes first, so that a stranger costs a comparison and a body that is dropped as it comes. No image,
prompt or token is logged or put into an error.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from factory import images
from factory.gateway import openapi
from factory.gateway.audit import AuditLog
from factory.gateway.body import content_kind, fields_of, read_body
from factory.gateway.counted import Counted, request_id_of
from factory.gateway.gather import Gather, Judge, Judged
from factory.gateway.linger import Lingering
from factory.gateway.metrics import CONTENT_TYPE, Metrics
from factory.gateway.pair import Pair, pair_of
from factory.gateway.refusal import ClientGone, Refusal
from factory.gateway.settings import Settings, token_of

logger = logging.getLogger(__name__)

VALIDATE, READY_S = "/v1/validate", 2.0  # seconds for the gate to name its digests
Ready = Callable[[], Awaitable[dict[str, str]]]


class Gateway:
    """The service around a gate. judge: pairs to answers; ready: the gate's digests, or an exception while it has none;
    size: px of the working short side; multiple: what its sides are multiples of. Raises as `token_of` does."""

    def __init__(self, judge: Judge, ready: Ready, size: int, multiple: int, settings: Settings) -> None:
        self.settings, self.size, self.multiple = settings, size, multiple
        self._ready, self._token = ready, token_of(settings)
        self.metrics = Metrics()
        self._gather = Gather(judge, settings.gather_s, settings.max_batch, settings.max_calls)
        self._gather.sizes = self.metrics.batch.observe
        self._audit = None if settings.audit is None else AuditLog(settings.audit)
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._waiting = 0
        self._document = openapi.document(settings, self._token is not None)

    def app(self) -> ASGIApp:
        """The application to serve."""
        routes = [
            Route(VALIDATE, self.validate, methods=["POST"]),
            Route("/healthz", self.healthz), Route("/readyz", self.readyz), Route("/metrics", self.metrics_text),
            Route("/openapi.json", self.openapi), Route("/", self.page),
        ]  # fmt: skip
        handlers: dict[Any, Any] = {Refusal: self._refused, ClientGone: self._gone, 404: self._path, 405: self._method}
        counted = Counted(
            Starlette(routes=routes, exception_handlers=handlers), self.metrics, {route.path for route in routes}
        )
        limits = self.settings
        return Lingering(counted, limits.max_body_bytes, limits.drain_s, limits.max_draining)

    async def validate(self, request: Request) -> Response:
        """One pair in, one verdict out; whatever else is answered is a `Refusal`."""
        self._check_token(request)
        with self._place():
            kind = content_kind(request.headers.get("content-type"), request.headers.get("content-encoding"))
            body = await read_body(request.receive, request.headers.get("content-length"), self.settings)
            pair = await self._in_thread(
                lambda: pair_of(fields_of(body, kind), self.settings, self.size, self.multiple)
            )
            judged = await self._judged(pair)
            answer = await self._in_thread(lambda: _answer(pair, judged))
            self._record(request, pair, judged)
            return JSONResponse(answer)

    async def healthz(self, request: Request) -> Response:
        """This process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """The gate behind it answers too."""
        try:
            model = await asyncio.wait_for(self._ready(), READY_S)
        except Exception:  # whatever keeps it from answering, it is not ready
            raise Refusal(503, "not_ready", "The gate must answer, but does not yet; try again later.") from None
        return JSONResponse({"status": "ready", "model": model})

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def page(self, request: Request) -> Response:
        """The OpenAPI document for people."""
        return HTMLResponse(openapi.page(self._document))

    # ------------------------------------------------------------------------------------------------- the steps

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        wanted, got = self._token.encode(), given.strip().encode("utf-8", "replace")
        if not hmac.compare_digest(got, wanted) or scheme.lower() != "bearer":
            raise Refusal(401, "token", "Authorization must be `Bearer TOKEN` with the gate's token; send it.")

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among those that may wait, or 429."""
        most = self.settings.max_waiting
        if self._waiting >= most:
            raise Refusal(429, "busy", f"At most {most} requests may wait, and as many do; try again later.")
        self._waiting += 1
        self.metrics.waiting.set(self._waiting)
        try:
            yield
        finally:
            self._waiting -= 1
            self.metrics.waiting.set(self._waiting)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    async def _judged(self, pair: Pair) -> Judged:
        try:
            return await asyncio.wait_for(self._gather(pair), self.settings.answer_s)
        except TimeoutError:
            raise Refusal(503, "slow_gate", "The gate did not answer in time; try again later.") from None
        except Exception as error:  # a dead or overloaded replica: the client may send the same again
            logger.error("the gate failed a call: %s", type(error).__name__)
            raise Refusal(503, "no_gate", "The gate did not answer; try again later.") from None

    def _record(self, request: Request, pair: Pair, judged: Judged) -> None:
        """No verdict leaves that the audit log does not hold."""
        said = {
            "verdict": judged.verdict, "reason": judged.reason, "iou": judged.iou, "theta": judged.theta,
            "scores": judged.scores, "model": judged.model,
        }  # fmt: skip
        try:
            if self._audit is not None:
                self._audit.write(request_id=request_id_of(request.scope), **said, **pair.facts)
        except OSError as error:
            logger.error("the audit log cannot be written: %s", error)
            sentence = "The decision could not be recorded, so it is not given; try again later."
            raise Refusal(503, "no_audit", sentence) from None
        self.metrics.decisions.labels(judged.verdict, judged.reason or "").inc()
        self.metrics.alarms.add(pair.facts["diagnosis"], judged.verdict)
        if judged.iou is not None:
            self.metrics.iou.observe(judged.iou)

    # ------------------------------------------------------------------------------------------------- refusals

    async def _refused(self, request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        self.metrics.refusals.labels(refusal.error).inc()
        headers = {}
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if refusal.status in (429, 503):
            headers["Retry-After"] = str(self.settings.retry_after_s)
        said = {"error": refusal.error, "message": str(refusal), "request_id": request_id_of(request.scope)}
        return JSONResponse(said, refusal.status, headers)

    async def _gone(self, request: Request, gone: Exception) -> Response:
        return await self._refused(request, Refusal(400, "hung_up", "The body must be complete; send all of it."))

    async def _path(self, request: Request, error: Exception) -> Response:
        return await self._refused(
            request, Refusal(404, "no_path", "The path must be one of the page at /; see there.")
        )

    async def _method(self, request: Request, error: Any) -> Response:
        allowed = (error.headers or {}).get("Allow", "GET")
        refusal = Refusal(405, "no_method", f"The method must be one of {allowed} here; use that.")
        response = await self._refused(request, refusal)
        response.headers["Allow"] = allowed
        return response


def _answer(pair: Pair, judged: Judged) -> dict[str, Any]:
    """What the client gets; the mask at the size that it sent."""
    found = images.resized(judged.found, pair.width, pair.height)
    return {
        "verdict": judged.verdict, "reason": judged.reason, "iou": judged.iou, "theta": judged.theta,
        "scores": judged.scores, "mask": base64.b64encode(images.encode_mask(found)).decode(), "model": judged.model,
    }  # fmt: skip
