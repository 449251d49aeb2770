"""What the lab measured, in the form the page shows it: worth, the gate's and the captioner's truth, near-copies.

The lab's dictionaries come in as they were written (see `factory.lab.worth`, `.truth` and `.lineage`); a value that
an experiment could not measure is None in them and stays None here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from factory.release import charts
from factory.release.counts import Rate
from factory.taxonomy import diagnosis_name

# Metric -> its name and which way is better, in the order shown.
METRICS: dict[str, tuple[str, str]] = {
    "auc": ("AUC", "higher is better"),
    "f1": ("F1", "higher is better"),
    "dice": ("Dice", "higher is better"),
    "false_negative_rate": ("Lesions missed", "lower is better"),
    "false_negative_rate_small": ("Small lesions missed", "lower is better"),
}
ARMS = {"real": "real only", "real_repeated": "real, repeated", "real_synthetic": "real + synthetic"}
TASKS = {"classify": "Classifier: benign or malignant", "segment": "Segmenter: the lesion's outline"}
_ATTRIBUTES = {
    "asymmetry": "asymmetry",
    "border_irregularity": "border irregularity",
    "color_count": "number of colours",
}
MEASUREMENTS = {
    "asymmetry": "Asymmetry (0 to 1)",
    "asymmetry_major": "Asymmetry across the major axis",
    "asymmetry_minor": "Asymmetry across the minor axis",
    "color_asymmetry": "Colour asymmetry (\N{GREEK CAPITAL LETTER DELTA}E)",
    "border_irregularity": "Border irregularity (0 for a disk)",
    "radial_variance": "Radial variance",
    "fractal_dimension": "Fractal dimension of the border",
    "abrupt_octants": "Eighths of the border that end abruptly",
    "color_count": "Number of colours",
    "relative_diameter": "Largest diameter / shorter side of the view",
    "diameter_mm": "Largest diameter (mm)",
}


@dataclass(frozen=True)
class Task:
    """One task's arms: rows of (arm, interval per metric), a chart per metric, and paired differences."""

    name: str
    not_run: str | None
    metrics: list[str]
    arms: list[tuple[str, list[dict[str, Any]]]]
    charts: list[tuple[str, str, Any]]
    differences: list[tuple[str, str, dict[str, Any]]]


@dataclass(frozen=True)
class ByDiagnosis:
    """One measurement over the diagnoses: a chart of medians with quartiles, the rows, melanoma against nevus."""

    title: str
    chart: Any
    rows: list[tuple[str, dict[str, Any]]]
    over: dict[str, Any] | None


def attributes_by_diagnosis(found: Mapping[str, Any] | None) -> list[ByDiagnosis]:
    """The measurements of lab/caption_attributes.json, in the order of the ABC."""
    attributes = (found or {}).get("attributes") or {}
    made = []
    for name, attribute in sorted(attributes.items(), key=lambda item: list(MEASUREMENTS).index(item[0])):
        rows = [(diagnosis_name(group), dict(values)) for group, values in attribute["by_diagnosis"].items()]
        dots = [charts.Dot(group, v["median"], v["lower_quartile"], v["upper_quartile"]) for group, v in rows]
        title = MEASUREMENTS[name]
        chart = charts.dot_rows(dots, f"{title}: median and quartiles by diagnosis")
        made.append(ByDiagnosis(title, chart, rows, attribute["melanoma_over_nevus"]))
    return made


def worth_tasks(worth: Mapping[str, Any] | None) -> list[Task]:
    """The tasks of lab/worth.json, in its own order of tasks."""
    tasks = (worth or {}).get("tasks") or {}
    return [_task(TASKS.get(name, name), found) for name, found in tasks.items()]


def _task(name: str, found: Mapping[str, Any]) -> Task:
    arms: Mapping[str, Any] = found.get("arms") or {}
    ordered = [arm for arm in ARMS if arm in arms] + [arm for arm in arms if arm not in ARMS]
    metrics = [m for m in METRICS if arms and all(isinstance(arms[arm].get(m), Mapping) for arm in arms)]
    rows = [(ARMS.get(arm, arm), [dict(arms[arm][m]) for m in metrics]) for arm in ordered]
    drawn = [
        (METRICS[m][0], METRICS[m][1], _chart(m, [(row, cells[i]) for row, cells in rows]))
        for i, m in enumerate(metrics)
    ]
    return Task(name, found.get("not_run"), metrics, rows, drawn, _differences(found.get("differences") or {}))


def _chart(metric: str, rows: list[tuple[str, dict[str, Any]]]) -> Any:
    """The arms' means on their intervals; a mean without an interval is a dot alone, and no mean is no row."""
    dots = [
        charts.Dot(
            name,
            v["mean"],
            v["mean"] if v.get("low") is None else v["low"],
            v["mean"] if v.get("high") is None else v["high"],
        )
        for name, v in rows
        if v.get("mean") is not None
    ]
    return charts.dot_rows(dots, f"{METRICS[metric][0]} per arm") if dots else ""


def _differences(found: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(what minus what, metric, interval with verdict)."""
    rows = []
    for pair, metrics in found.items():
        first, _, second = pair.partition(" - ")
        title = f"{ARMS.get(first, first)} minus {ARMS.get(second, second)}"
        rows += [(title, METRICS[m][0], dict(metrics[m])) for m in METRICS if isinstance(metrics.get(m), Mapping)]
    return rows


@dataclass(frozen=True)
class GateTruth:
    """The gate on planted faults: its rates, and for each fault (count, mean true IoU, good accepted, bad refused)."""

    rates: list[Rate]
    faults: list[tuple[str, int, float | None, Rate, Rate]]
    setting: Mapping[str, Any]
    base_precision: float | None


def gate_truth(gate: Mapping[str, Any] | None) -> GateTruth | None:
    """Of what `factory.lab.planted.gate_accuracy` returns."""
    if not gate:
        return None
    rates = [_rate(name, gate[name]) for name in ("precision", "recall", "specificity") if name in gate]
    faults = [
        (
            "none (exact mask)" if fault == "none" else f"mask {fault}", int(row["count"]), row.get("mean_true_iou"),
            _rate(fault, row["good_accepted"]), _rate(fault, row["bad_refused"]),
        )
        for fault, row in (gate.get("by_fault") or {}).items()
    ]  # fmt: skip
    return GateTruth(rates, faults, gate.get("setting") or {}, (gate.get("accept_everything") or {}).get("precision"))


def caption_truth(accuracy: Mapping[str, Any] | None) -> list[tuple[str, Rate | None, Mapping[str, Any]]]:
    """Of what `lab.caption_truth.captioner_accuracy` returns: (attribute, share that agrees, its other numbers)."""
    rows = []
    for name, title in _ATTRIBUTES.items():
        found = (accuracy or {}).get(name)
        if found:
            agrees = found.get("level_agreement") or found.get("exact")
            rows.append((title, _rate(title, agrees) if agrees else None, found))
    return rows


@dataclass(frozen=True)
class NearCopies:
    """Samples that are too near to a training image, with the interval, the thresholds and the nearest pairs."""

    rate: Rate
    thresholds: list[tuple[str, float]]
    pairs: list[dict[str, Any]]
    how: str


def near_copies_of(found: Mapping[str, Any] | None) -> NearCopies | None:
    """Of lab/near_copies.json."""
    if not found or "near_copies" not in found:
        return None
    thresholds = [(by, float(part["threshold"])) for by, part in (found.get("by") or {}).items()]
    pairs = [
        {
            "sample_id": pair["sample_id"], "record_id": pair["features"]["record_id"],
            "similarity": pair["features"]["similarity"], "near_copy": bool(pair.get("near_copy")),
        }
        for pair in found.get("nearest_pairs") or []
    ]  # fmt: skip
    return NearCopies(_rate("near-copies", found["near_copies"]), thresholds, pairs, str(found.get("how") or ""))


def _rate(group: str, share: Mapping[str, Any]) -> Rate:
    """A lab proportion (value, low, high, successes, trials) as a rate."""
    return Rate(group, int(share["successes"]), int(share["trials"]), float(share["low"]), float(share["high"]))
