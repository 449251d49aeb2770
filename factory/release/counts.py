"""Counting what happened to the plan: the funnel, and acceptance per group with intervals. Pure, on Arrow tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from factory.quality.statistics import wilson
from factory.records import ACCEPTED, FAILED, OUTCOMES, REJECTED


@dataclass(frozen=True)
class Funnel:
    """planned = accepted + rejected (by reason) + failed (by reason) + waiting; `excess` samples are in no plan.
    by_call: after so many denoiser calls so many left, accepted and rejected."""

    planned: int
    accepted: int
    rejected: dict[str, int]
    failed: dict[str, int]
    calls_run: int | None = None
    calls_planned: int | None = None
    by_call: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())

    @property
    def made(self) -> int:
        """Samples with an outcome, whichever."""
        return self.accepted + self.num_rejected + self.num_failed

    @property
    def waiting(self) -> int:
        return max(0, self.planned - self.made)

    @property
    def excess(self) -> int:
        return max(0, self.made - self.planned)

    @property
    def calls_saved(self) -> float | None:
        """Share of the planned denoiser calls that early rejection spared."""
        if not self.calls_planned or self.calls_run is None:
            return None
        return 1.0 - self.calls_run / self.calls_planned


@dataclass(frozen=True)
class Rate:
    """`accepted` of `made` in one group, with its 95% Wilson interval."""

    group: str
    accepted: int
    made: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.accepted / self.made if self.made else 0.0


def funnel(samples: pa.Table | None, planned: int | None) -> Funnel:
    """The funnel of a samples table (outcome, reason and, if there, calls); without a plan, what was made counts."""
    counts: Counter[tuple[str, str]] = Counter()
    if samples is not None:
        grouped = samples.select(["outcome", "reason"]).group_by(["outcome", "reason"]).aggregate([([], "count_all")])
        for row in grouped.to_pylist():
            counts[row["outcome"], row["reason"] or ""] += row["count_all"]
    by = {outcome: _by_reason(counts, outcome) for outcome in OUTCOMES}
    accepted = sum(by[ACCEPTED].values())
    made = sum(counts.values())
    calls_run, calls_planned = _calls(samples)
    total = made if planned is None else planned
    return Funnel(total, accepted, by[REJECTED], by[FAILED], calls_run, calls_planned, _by_call(samples))


def _by_call(samples: pa.Table | None) -> list[tuple[int, int, int]]:
    if samples is None or "calls_run" not in samples.column_names:
        return []
    grouped = samples.group_by(["calls_run", "outcome"]).aggregate([([], "count_all")]).to_pylist()
    found = {(row["calls_run"], row["outcome"]): row["count_all"] for row in grouped if row["calls_run"]}
    return [(n, found.get((n, ACCEPTED), 0), found.get((n, REJECTED), 0)) for n in sorted({call for call, _ in found})]


def _by_reason(counts: Mapping[tuple[str, str], int], outcome: str) -> dict[str, int]:
    """Reasons of one outcome, most frequent first."""
    found = {reason: n for (o, reason), n in counts.items() if o == outcome}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _calls(samples: pa.Table | None) -> tuple[int | None, int | None]:
    if samples is None or not {"calls_run", "num_inference_steps"} <= set(samples.column_names):
        return None, None
    known = samples.filter(pc.is_valid(samples["calls_run"]))
    if not known.num_rows:
        return None, None
    return int(pc.sum(known["calls_run"]).as_py()), int(pc.sum(known["num_inference_steps"]).as_py() or 0)


def acceptance(samples: pa.Table, column: str, order: Sequence[str]) -> list[Rate]:
    """Acceptance per value of a column, in the given order, other values after; absent groups are left out."""
    made: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    grouped = samples.select([column, "outcome"]).group_by([column, "outcome"]).aggregate([([], "count_all")])
    for row in grouped.to_pylist():
        group = row[column] or "not stated"
        made[group] += row["count_all"]
        accepted[group] += row["count_all"] if row["outcome"] == ACCEPTED else 0
    groups = [g for g in order if g in made] + sorted(set(made) - set(order))
    return [_rate(g, accepted[g], made[g]) for g in groups]


def _rate(group: str, accepted: int, made: int) -> Rate:
    bounds = wilson(accepted, made)
    return Rate(group, accepted, made, bounds.low, bounds.high)
