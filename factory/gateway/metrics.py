"""What the service counts, as Prometheus text. A process has its own registry; several are series of their own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from factory.quality.alarms import rejected_too_often
from factory.records import REJECTED

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class RejectedTooOften:
    """The alarm of that name for each diagnosis that was asked about, worked out when the metrics are read."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str], tuple[int, int]] = {}

    def add(self, diagnosis: str | None, verdict: str) -> None:
        """A decision; one without a diagnosis is of none."""
        cell = (diagnosis or "",)
        rejected, judged = self._counts.get(cell, (0, 0))
        self._counts[cell] = rejected + (verdict == REJECTED), judged + 1

    def collect(self) -> Iterator[Metric]:
        raised = {alarm.where for alarm in rejected_too_often(self._counts)}
        gauge = GaugeMetricFamily(
            "factory_gate_rejected_too_often", "1: surely more than 40% of a diagnosis are rejected.",
            labels=["diagnosis"],
        )  # fmt: skip
        for (diagnosis,) in sorted(self._counts):
            gauge.add_metric([diagnosis], float(diagnosis in raised))
        yield gauge


class Metrics:
    """Requests by path and status, decisions by verdict and reason, alarms, latency, how many wait, sizes of calls."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "factory_gate_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.decisions = Counter(
            "factory_gate_decisions", "Verdicts by outcome and reason.", ["verdict", "reason"], registry=registry
        )
        self.refusals = Counter("factory_gate_refusals", "Refused requests by error.", ["error"], registry=registry)
        self.alarms = RejectedTooOften()
        registry.register(self.alarms)  # type: ignore[arg-type]
        self.seconds = Histogram(
            "factory_gate_request_seconds", "Seconds from a request's headers to its answer.", ["path"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("factory_gate_queue_depth", "Requests being read, decoded or judged.", registry=registry)
        self.iou = Histogram(
            "factory_gate_iou", "IoU that the intended mask is expected to have with the lesion.",
            buckets=[n / 10 for n in range(1, 11)], registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "factory_gate_call_size", "Requests that shared a call of the gate.", buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
