"""Alarms: what the gate's own numbers say when something is wrong, looked at as often as one likes.

    rejected_too_often   surely more than 40% of a cell's samples are rejected, and surely more than it was planned with
    extra_calls          a sample was paid more calls of the network than it was planned with
    scores_drift         overlaps of later samples are distributed otherwise than those of earlier ones

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
LEVEL = 0.05  # of false alarms of a kind, over all looks and cells
MOST_REJECTED = 0.4
FIRST_LOOK = 256  # samples, of which the later half is compared with the earlier
LEAST_DRIFT = 0.1  # of the distribution functions; less is no one's concern, however sure


@dataclass(frozen=True)
class Alarm:
    """kind: as above; where: the cell, or all; text: one sentence with the numbers; value: what it is about."""

    kind: str
    where: str
    text: str
    value: float


def alarms(
    samples: pa.Table, planned: Mapping[tuple[Any, ...], float] | None = None, cell: Sequence[str] = CELL
) -> list[Alarm]:
    """Of samples in the order of their making, with COLUMNS. planned: the acceptance that a cell was planned with,
    where it is known; a rare cell that was planned at 70% rejection is no alarm at 70%. cell: the columns that name
    one."""
    return [*_rejected(samples, cell, planned or {}), *_extra_calls(samples), *_drift(samples)]


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


def _rejected(samples: pa.Table, names: Sequence[str], planned: Mapping[tuple[Any, ...], float]) -> list[Alarm]:
    judged = samples.filter(pc.not_equal(samples["outcome"], records.FAILED))
    judged = judged.append_column("bad", pc.cast(pc.equal(judged["outcome"], records.REJECTED), pa.int64()))
    cells = judged.group_by(list(names)).aggregate([("bad", "sum"), ("bad", "count")]).to_pylist()
    found = []
    for row in sorted(cells, key=lambda row: [str(row[name]) for name in names]):
        key, rejected, trials = tuple(row[name] for name in names), row["bad_sum"], row["bad_count"]
        allowed = max(MOST_REJECTED, 1 - planned.get(key, 1.0))
        least = surely_above(rejected, trials, LEVEL / len(cells))
        if least > allowed:
            text = f"{rejected} of {trials} rejected, surely above {least:.1%}, where {allowed:.0%} is expected at most"
            found.append(Alarm("rejected_too_often", " ".join(map(str, key)), text, least))
    return found


def _extra_calls(samples: pa.Table) -> list[Alarm]:
    extra = pc.sum(pc.greater(samples["calls_run"], samples["num_inference_steps"])).as_py()
    if not extra:
        return []
    text = f"{extra} samples took more calls than planned; a verdict must cost none of its own"
    return [Alarm("extra_calls", "all", text, float(extra))]


def _drift(samples: pa.Table) -> list[Alarm]:
    overlaps = samples["iou"].drop_null().to_numpy()
    overlaps, look, count = overlaps[np.isfinite(overlaps)], 1, FIRST_LOOK
    while count <= len(overlaps):
        earlier, later = overlaps[: count // 2], overlaps[count // 2 : count]
        test = stats.ks_2samp(earlier, later, method="asymp")
        if test.statistic > LEAST_DRIFT and test.pvalue < LEVEL / 2**look:
            text = (
                f"overlaps of the samples {count // 2} to {count} are not those before: median {np.median(later):.3f} "
                f"after {np.median(earlier):.3f}, largest difference of their distributions {test.statistic:.2f}"
            )
            return [Alarm("scores_drift", "all", text, float(test.statistic))]
        look, count = look + 1, 2 * count
    return []
