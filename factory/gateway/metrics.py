"""What the service counts, as Prometheus text. A process has its own registry; several are series of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Requests by path and status, decisions by verdict and reason, latency, how many wait, sizes of calls."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "factory_gate_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.decisions = Counter(
            "factory_gate_decisions", "Verdicts by outcome and reason.", ["verdict", "reason"], registry=registry
        )
        self.refusals = Counter("factory_gate_refusals", "Refused requests by error.", ["error"], registry=registry)
        self.seconds = Histogram(
            "factory_gate_request_seconds", "Seconds from a request's headers to its answer.", ["path"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("factory_gate_queue_depth", "Requests being read, decoded or judged.", registry=registry)
        self.iou = Histogram(
            "factory_gate_iou", "IoU of the intended mask with what the segmenter finds.",
            buckets=[n / 10 for n in range(1, 11)], registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "factory_gate_call_size", "Requests that shared a call of the gate.", buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
