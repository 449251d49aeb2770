"""Alarms: what the gate's own numbers say when something is wrong, looked at as often as one likes.

    rejected_too_often   surely more than 40% of a cell's samples are rejected, and surely more than it was planned with
    extra_calls          a sample was paid more calls of the network than it was planned with
    scores_drift         IoUs of later samples are distributed otherwise than those of earlier ones
    small_not_found      the gate accepts as it should, and still a network that was taught with the samples surely
                         misses nearly as many small lesions as without (of a worth experiment, where one was run)

DiffAug rejects 35%, and states above 40% as the sign of a generator that draws past its masks. A bound that holds at
one look does not hold at the best of many. The share of a cell is bounded for all looks at once, by the mixture
martingale of Robbins (1970, Ann. Math. Statist. 41) with a uniform prior and Ville's inequality; drift is tested at
doubling numbers of samples alone, each look with half of the error that is left. What is allowed is shared by cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import optimize, special, stats

from factory import records

COLUMNS = ("diagnosis", "skin_type", "outcome", "iou", "calls_run", "num_inference_steps")  # of samples
CELL = ("diagnosis", "skin_type")
KINDS = ("rejected_too_often", "extra_calls", "scores_drift", "small_not_found")
Cell = tuple[Any, ...]
LEVEL = 0.05  # of false alarms of a kind, over all looks and cells
MOST_REJECTED = 0.4
FIRST_LOOK = 256  # samples, of which the later half is compared with the earlier
LEAST_GAIN = 0.05  # of the share of small lesions that are missed; an interval that reaches it says nothing
LEAST_DRIFT = 0.1  # of the distribution functions; less is no one's concern, however sure


@dataclass(frozen=True)
class Alarm:
    """kind: as above; where: the cell, or all; text: one sentence with the numbers; value: what it is about."""

    kind: str
    where: str
    text: str
    value: float


def alarms(
    samples: pa.Table,
    planned: Mapping[Cell, float] | None = None,
    cell: Sequence[str] = CELL,
    worth: Mapping[str, Any] | None = None,
) -> list[Alarm]:
    """Of samples in the order of their making, with COLUMNS. planned: the acceptance that a cell was planned with,
    where it is known; a rare cell that was planned at 70% rejection is no alarm at 70%. cell: the columns that name
    one. worth: what `lab/worth.py` found of them."""
    rejected = rejected_too_often(_by_cell(samples, cell), planned)
    small = [] if rejected else _small_not_found(worth or {})
    return [*rejected, *_extra_calls(samples), *_drift(samples), *small]


def surely_above(successes: int, trials: int, level: float = LEVEL) -> float:
    """A lower bound of a proportion that holds at all looks at once, with an error of `level`."""
    if successes == 0:
        return 0.0
    failures = trials - successes
    mixture = special.betaln(successes + 1, failures + 1)

    def surplus(share: float) -> float:
        """How far the evidence against this share is above what is allowed, as logarithms."""
        return float(mixture - special.xlogy(successes, share) - special.xlog1py(failures, -share) + math.log(level))

    top = successes / trials - 1e-12 if failures else 1.0
    if surplus(top) > 0:
        return top
    return float(optimize.brentq(surplus, 1e-12, top)) if surplus(1e-12) > 0 else 0.0


def rejected_too_often(
    counts: Mapping[Cell, tuple[int, int]], planned: Mapping[Cell, float] | None = None
) -> list[Alarm]:
    """counts: rejected and judged samples of each cell."""
    found = []
    for cell, (rejected, trials) in sorted(counts.items(), key=lambda item: [str(word) for word in item[0]]):
        allowed = max(MOST_REJECTED, 1 - (planned or {}).get(cell, 1.0))
        least = surely_above(rejected, trials, LEVEL / len(counts))
        if least > allowed:
            text = f"{rejected} of {trials} rejected, surely above {least:.1%}, where {allowed:.0%} is expected at most"
            found.append(Alarm("rejected_too_often", " ".join(map(str, cell)), text, least))
    return found


def _by_cell(samples: pa.Table, names: Sequence[str]) -> dict[Cell, tuple[int, int]]:
    judged = samples.filter(pc.not_equal(samples["outcome"], records.FAILED))
    judged = judged.append_column("bad", pc.cast(pc.equal(judged["outcome"], records.REJECTED), pa.int64()))
    cells = judged.group_by(list(names)).aggregate([("bad", "sum"), ("bad", "count")]).to_pylist()
    return {tuple(row[name] for name in names): (row["bad_sum"], row["bad_count"]) for row in cells}


def _small_not_found(worth: Mapping[str, Any]) -> list[Alarm]:
    """Of the paired difference to real images that were shown as often."""
    task, missed = (worth.get("tasks") or {}).get("segment") or {}, "false_negative_rate_small"
    found = ((task.get("differences") or {}).get("real_synthetic - real_repeated") or {}).get(missed) or {}
    control = ((task.get("arms") or {}).get("real_repeated") or {}).get(missed) or {}
    if any(found.get(name) is None for name in ("mean", "low", "high")) or control.get("mean") == 0:
        return []
    mean, low, high = (float(found[name]) for name in ("mean", "low", "high"))
    if low <= -LEAST_GAIN:
        return []
    what = "small lesions missed with the samples less without"
    text = f"{what}: {mean:.3f} ({low:.3f} to {high:.3f}), surely no gain of {LEAST_GAIN:g}; look at their masks"
    return [Alarm("small_not_found", "all", text, mean)]


def _extra_calls(samples: pa.Table) -> list[Alarm]:
    extra = pc.sum(pc.greater(samples["calls_run"], samples["num_inference_steps"])).as_py()
    if not extra:
        return []
    text = f"{extra} samples took more calls than planned; a verdict must cost none of its own"
    return [Alarm("extra_calls", "all", text, float(extra))]


def _drift(samples: pa.Table) -> list[Alarm]:
    stated = samples["iou"].drop_null().to_numpy()
    stated, look, count = stated[np.isfinite(stated)], 1, FIRST_LOOK
    while count <= len(stated):
        earlier, later = stated[: count // 2], stated[count // 2 : count]
        test = stats.ks_2samp(earlier, later, method="asymp")
        if test.statistic > LEAST_DRIFT and test.pvalue < LEVEL / 2**look:
            text = (
                f"IoUs of the samples {count // 2} to {count} are not those before: median {np.median(later):.3f} "
                f"after {np.median(earlier):.3f}, largest difference of their distributions {test.statistic:.2f}"
            )
            return [Alarm("scores_drift", "all", text, float(test.statistic))]
        look, count = look + 1, 2 * count
    return []
