"""What synthetic samples are worth: to a classifier and to a segmenter, on real images they have not seen.

Three arms per task, seed and fold, all from the same initial weights:

    real             the real training folds, for `steps` steps
    real_repeated    the real training folds, for as many steps and images seen as real_synthetic
    real_synthetic   the same real rows and the synthetic ones; steps grow with the rows, so passes stay equal

The comparison that counts is real_synthetic against real_repeated: against `real`, more steps would pass for better
data. Folds are of groups (patient, lesion, near-duplicates), within the training split alone; what is held out is
always real. A synthetic row is left out of a fold if a parent of it, or a real image it copies, shares a group with
what that fold holds out.

Every cell (task, arm, seed, fold) is one file under lab/worth/cells, named by a digest of all that decides it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from factory import records
from factory.lab.intervals import cross_validated
from factory.lab.learners import TASKS, Pictures, Rows, Task, fit, pictures, predict
from factory.quality.statistics import wilson
from factory.recipe import WorthSection
from factory.storage import Store

CELLS, SUMMARY = "lab/worth/cells", "lab/worth.json"
REAL, REPEATED, SYNTHETIC = ARMS = ("real", "real_repeated", "real_synthetic")
# Synthetic rows per real row: DiffAug's gain levels off at three times, and steps grow with the rows.
MAX_RATIO = 3.0
# Part of every cell's digest; raised when the code changes what a cell would hold.
VERSION = 1
METRICS: dict[str, tuple[tuple[str, bool], ...]] = {  # name, whether higher is better
    "classify": (("auc", True), ("f1", True)),
    "segment": (("dice", True), ("false_negative_rate", False), ("false_negative_rate_small", False)),
}
HOW = (
    "Mean over seeds x folds. Intervals are 95 % t-intervals whose variance is inflated by (1/n + 1/(folds - 1)) "
    "because folds share training rows (Nadeau & Bengio 2003); plain_low and plain_high are without that. A false "
    "negative is a lesion with no predicted component of IoU >= 0.5; its Wilson interval counts every lesion once, "
    "with the misses averaged over seeds. Differences are paired by seed and fold. No correction for multiplicity. "
    "Small lesions are the smallest third of the real ones by share of the image (a proxy for millimetres)."
)
CLOSED_SET = (
    "Every image here is of the training split, so a generator that was fitted on that split has seen the held-out "
    "folds too: these are closed-set numbers. Only direct kin of a held-out row (parents and near copies) are left "
    "out of its fold."
)


@dataclass(frozen=True)
class Data:
    """Both kinds of rows as one set of pictures, the real ones first, and who is related to whom."""

    rows: Pictures
    num_real: int
    groups: list[str]  # of the real rows
    related: list[frozenset[str]]  # of the synthetic rows: groups of their parents and of what they copy
    small: float  # largest area share of the smallest third of the real lesions
    counts: dict[str, int]


@dataclass(frozen=True)
class Cell:
    """One network to fit and measure."""

    task: Task
    arm: str
    seed: int
    fold: int
    train: Rows
    held_out: Rows
    steps: int
    num_synthetic: int
    num_excluded: int


def run_worth(
    store: Store,
    real: pa.Table,
    synthetic: pa.Table,
    section: WorthSection,
    *,
    copies: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[str], None] = print,
    path: str | None = SUMMARY,
) -> dict[str, Any]:
    """Runs what is missing of the experiment and returns its summary, written to `path` unless that is None.

    real: corpus rows, of which only accepted ones of the training split are used. synthetic: samples, of which only
    accepted ones are. copies: real record ids that a synthetic row nearly copies, by sample id (see
    `lineage.nearest_real`). Raises ValueError if either side is empty.
    """
    data = _data(real, synthetic, section, copies or {})
    plans = {task.name: list(_cells(task, data, section)) for task in TASKS}
    total = sum(map(len, plans.values()))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in plans}
    for cell in (cell for plan in plans.values() for cell in plan):
        results[cell.task.name].append(_run_cell(store, cell, data, section))
        done = sum(map(len, results.values()))
        progress(f"worth: cell {done} of {total}, {_sentence(results[cell.task.name][-1])}")
    summary = _summary(results, data, section)
    if path is not None:
        store.replace(path, (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode())
    return summary


# ------------------------------------------------------------------------------------------------------ rows


def _data(real: pa.Table, synthetic: pa.Table, section: WorthSection, copies: Mapping[str, Sequence[str]]) -> Data:
    training = real.filter(records.accepted("train"))
    made = synthetic.filter(records.accepted())
    group_of = _groups(training)
    chosen = _subset(training, section.max_real)
    pair = pictures(chosen, "row_id", section.image_size), pictures(made, "sample_id", section.image_size)
    for side, found, remedy in zip(("real", "synthetic"), pair, ("ingest a corpus", "synthesize samples"), strict=True):
        if not len(found):
            raise ValueError(f"{side} must hold at least one accepted image, got none; {remedy} first.")
    related, unknown = _related(made, group_of, copies)
    shares = pair[0].masks.mean(axis=(1, 2))
    return Data(
        rows=pair[0] + pair[1],
        num_real=len(pair[0]),
        groups=[group_of[row] for row in pair[0].ids],
        related=[related[row] for row in pair[1].ids],
        small=float(np.quantile(shares[shares > 0], 1 / 3)) if shares.any() else 0.0,
        counts={
            "real_rows": len(pair[0]), "real_rows_left_out": len(training) - len(pair[0]),
            "real_groups": len({group_of[row] for row in pair[0].ids}), "synthetic_rows": len(pair[1]),
            "synthetic_rows_without_parents": sum(not parents for parents in made["parents"].to_pylist()),
            "unknown_parents": unknown,
        },
    )  # fmt: skip


def _groups(training: pa.Table) -> dict[str, str]:
    """The group of a real row by either of its ids; a row without one is a group of its own."""
    found = {}
    for row in training.select(["row_id", "record_id", "group_id"]).to_pylist():
        group = row["group_id"] or row["row_id"]
        found[row["row_id"]] = group
        if row["record_id"]:
            found[row["record_id"]] = group
    return found


def _subset(training: pa.Table, most: int) -> pa.Table:
    """At most so many rows, chosen by their ids, so that a larger number keeps the smaller choice."""
    order = sorted(range(len(training)), key=lambda i: records.digest("worth", training["row_id"][i].as_py()))
    return training.take(sorted(order[:most]))


def _related(
    made: pa.Table, group_of: Mapping[str, str], copies: Mapping[str, Sequence[str]]
) -> tuple[dict[str, frozenset[str]], int]:
    """Groups that each synthetic row must not meet in a held-out fold, and how many parents are not real rows here."""
    related, unknown = {}, 0
    for row in made.select(["sample_id", "parents"]).to_pylist():
        parents = list(row["parents"] or [])
        unknown += sum(parent not in group_of for parent in parents)
        kin = [*parents, *copies.get(row["sample_id"], ())]
        related[row["sample_id"]] = frozenset(group_of[name] for name in kin if name in group_of)
    return related, unknown


# ------------------------------------------------------------------------------------------------------ cells


def _cells(task: Task, data: Data, section: WorthSection) -> Iterator[Cell]:
    """Every cell of a task; none if its rows cannot be folded (see `_why_not`)."""
    if _why_not(task, data, section.folds):
        return
    for seed in range(section.seeds):
        for fold, (train, held_out) in enumerate(folds_of(task, data, section.folds, seed)):
            synthetic, excluded = usable_synthetic(task, data, train, held_out, seed)
            longer = math.ceil(section.steps * (len(train) + len(synthetic)) / len(train))
            for arm, rows, steps in (
                (REAL, train, section.steps),
                (REPEATED, train, longer),
                (SYNTHETIC, np.concatenate([train, synthetic]), longer),
            ):
                num = len(rows) - len(train)
                yield Cell(task, arm, seed, fold, rows, held_out, steps, num, excluded if arm == SYNTHETIC else 0)


def folds_of(task: Task, data: Data, folds: int, seed: int) -> list[tuple[Rows, Rows]]:
    """(training rows, held-out rows) of each fold: real rows the task can use, groups whole, classes alike."""
    from sklearn.model_selection import StratifiedGroupKFold

    rows = _real_rows(task, data)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    groups = [data.groups[row] for row in rows]
    return [(rows[a], rows[b]) for a, b in splitter.split(rows, data.rows.malignant[rows], groups)]


def usable_synthetic(task: Task, data: Data, train: Rows, held_out: Rows, seed: int) -> tuple[Rows, int]:
    """Synthetic rows that may teach beside `train`, at most MAX_RATIO per real row; how many were kin to the fold."""
    away = {data.groups[row] for row in held_out}
    rows = np.flatnonzero(task.usable(data.rows))
    rows = rows[rows >= data.num_real]
    free = np.array([row for row in rows if not data.related[row - data.num_real] & away], dtype=np.int64)
    excluded, most = len(rows) - len(free), int(MAX_RATIO * len(train))
    if len(free) > most:
        free = np.sort(np.random.default_rng([seed, 2]).permutation(free)[:most])
    return free, excluded


def _real_rows(task: Task, data: Data) -> Rows:
    rows = np.flatnonzero(task.usable(data.rows))
    return np.asarray(rows[rows < data.num_real])


def _why_not(task: Task, data: Data, folds: int) -> str | None:
    """Why the task cannot be cross-validated here, or None if it can."""
    rows = _real_rows(task, data)
    labels = data.rows.malignant[rows]
    needed = {0, 1} if task.name == "classify" else set(labels.tolist())
    groups = {label: len({data.groups[row] for row in rows[labels == label]}) for label in needed}
    if not len(rows):
        return "no real row has what it needs"
    if task.name == "classify" and min(groups.values()) < folds:
        return f"benign and malignant must each have at least {folds} groups, got {groups[0]} and {groups[1]}"
    total = len({data.groups[row] for row in rows})
    return None if total >= folds else f"there must be at least {folds} groups, got {total}"


def _run_cell(store: Store, cell: Cell, data: Data, section: WorthSection) -> dict[str, Any]:
    """The stored result of a cell; fitted and stored first if it is not there."""
    path = f"{CELLS}/{cell.task.name}-{cell.arm}-s{cell.seed}-f{cell.fold}-{_key(cell, data, section)[:16]}.json"
    if not store.exists(path):
        model = fit(cell.task, data.rows, cell.train, section, cell.steps, 1000 * cell.seed + cell.fold)
        metrics = cell.task.measure(predict(model, data.rows, cell.held_out), data.rows, cell.held_out, data.small)
        result = {
            "task": cell.task.name, "arm": cell.arm, "seed": cell.seed, "fold": cell.fold, "steps": cell.steps,
            "examples_seen": cell.steps * section.batch_size, "num_real": len(cell.train) - cell.num_synthetic,
            "num_synthetic": cell.num_synthetic, "num_excluded": cell.num_excluded,
            "num_held_out": len(cell.held_out), "metrics": metrics,
        }  # fmt: skip
        store.put_if_absent(path, (json.dumps(result, indent=2, sort_keys=True) + "\n").encode())
    found: dict[str, Any] = json.loads(store.read(path))
    return found


def _key(cell: Cell, data: Data, section: WorthSection) -> str:
    """A digest of all that decides a cell's result."""
    shown = [[data.rows.digests[row] for row in rows] for rows in (cell.train, cell.held_out)]
    return records.digest(
        VERSION, cell.task.name, cell.arm, cell.seed, cell.fold, cell.steps, section.batch_size, section.image_size,
        section.classifier if cell.task.name == "classify" else "", data.small, cell.num_excluded,
        records.digest(*shown[0]), records.digest(*shown[1]),
    )  # fmt: skip


def _sentence(result: Mapping[str, Any]) -> str:
    names = {"classify": ("auc", "f1"), "segment": ("dice",)}[result["task"]]
    shown = ", ".join(f"{name} {result['metrics'][name]:.3f}" for name in names if result["metrics"][name] is not None)
    return f"{result['task']} {result['arm']} seed {result['seed']} fold {result['fold']}: {shown}"


# ------------------------------------------------------------------------------------------------------ summary


def _summary(results: Mapping[str, list[dict[str, Any]]], data: Data, section: WorthSection) -> dict[str, Any]:
    return {
        "tasks": {task.name: _task_summary(task, results[task.name], data, section) for task in TASKS},
        "counts": data.counts, "section": section.model_dump(), "how": HOW, "notes": [CLOSED_SET],
    }  # fmt: skip


def _task_summary(task: Task, results: list[dict[str, Any]], data: Data, section: WorthSection) -> dict[str, Any]:
    if not results:
        return {"not_run": _why_not(task, data, section.folds)}
    arms = {arm: [result for result in results if result["arm"] == arm] for arm in ARMS}
    return {
        "arms": {arm: _arm_summary(task.name, cells, section.folds) for arm, cells in arms.items()},
        "differences": {
            f"{SYNTHETIC} - {other}": _differences(task.name, arms[SYNTHETIC], arms[other], section.folds)
            for other in (REPEATED, REAL)
        },
    }


def _arm_summary(task: str, cells: list[dict[str, Any]], folds: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: cross_validated(
            [value for value in (_metric(cell, name) for cell in cells) if value is not None], folds, (0.0, 1.0)
        )
        for name, _ in METRICS[task]
    }
    if task == "segment":
        seeds = len({cell["seed"] for cell in cells})
        for kind in ("", "_small"):
            missed, lesions = (sum(c["metrics"][name + kind] for c in cells) / seeds for name in ("missed", "lesions"))
            bounds = wilson(round(missed), round(lesions))
            found[f"false_negative_rate{kind}"] |= {
                "pooled": missed / lesions if lesions else None, "lesions": lesions,
                "wilson_low": bounds.low, "wilson_high": bounds.high,
            }  # fmt: skip
    for name in ("steps", "examples_seen", "num_real", "num_synthetic", "num_excluded"):
        found[name] = sum(cell[name] for cell in cells) / len(cells)
    return found


def _differences(task: str, treated: list[dict[str, Any]], control: list[dict[str, Any]], folds: int) -> dict[str, Any]:
    """Paired by seed and fold, with a verdict that an interval clear of zero alone can give."""
    found = {}
    for name, higher_is_better in METRICS[task]:
        pairs = [(_metric(a, name), _metric(b, name)) for a, b in zip(treated, control, strict=True)]
        found[name] = cross_validated([a - b for a, b in pairs if a is not None and b is not None], folds, (-1.0, 1.0))
        found[name]["verdict"] = _verdict(found[name], higher_is_better)  # type: ignore[assignment]
    return found


def _verdict(difference: Mapping[str, Any], higher_is_better: bool) -> str:
    low, high = difference["low"], difference["high"]
    if low is None or low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == higher_is_better else "worse"


def _metric(cell: Mapping[str, Any], name: str) -> float | None:
    """A cell's value of a metric; null where the cell has nothing to measure it on."""
    metrics = cell["metrics"]
    if not name.startswith("false_negative_rate"):
        value: float | None = metrics[name]
        return value
    kind = name.removeprefix("false_negative_rate")
    return metrics["missed" + kind] / metrics["lesions" + kind] if metrics["lesions" + kind] else None
