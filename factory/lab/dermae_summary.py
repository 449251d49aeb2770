"""DerMAE's table from its cells: means with intervals over seeds, paired differences, and the text that is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from factory.lab.intervals import over_seeds
from factory.recipe import DermaeSection

METRICS = ("accuracy", "macro_f1", "balanced_accuracy")
NETWORKS = ("large", "base", "small")
# Each factor: the cell's field, what is compared with what, and its name.
FACTORS = (
    ("data", "real_synthetic", "real", "real + synthetic over real"),
    ("start", "mae", "given", "MAE over the given start"),
    ("taught", True, False, "taught over alone"),
)
HOW = (
    "Mean over seeds with 95% t-intervals. Seeds differ in initial weights, order and crops; the test images are the "
    "same, so the intervals do not hold what other test images would say. Differences are paired by seed and averaged "
    "over the cells that differ in nothing else. No correction for multiplicity. All fits of one kind take equally "
    "many steps, every class is shown equally often, and the last weights are tested: nothing is chosen on test "
    "images. F1 is the mean over the classes that the test images show."
)
NOTES = (
    "The test images are the corpus's own; those of another clinic may be harder.",
    "A network that is no ViT has no pre-training of its own: MAE is there its teacher's start.",
    "Only a small CNN stays under one GFLOP at 224 px; the operations of each network are in the table.",
)
SHARED = "All seeds share one pre-training, whose own spread the intervals leave out."


def summary_of(
    cells: Sequence[Mapping[str, Any]],
    not_run: Mapping[tuple[str, str, bool], str],
    networks: Mapping[str, Mapping[str, Any]],
    counts: Mapping[str, int],
    section: DermaeSection,
) -> dict[str, Any]:
    """The table as plain data: `rows` (24), `differences`, `networks`, `counts`, and how to read them."""
    rows = []
    for network in NETWORKS:
        for data in ("real", "real_synthetic"):
            for start in ("given", "mae"):
                for taught in (False, True):
                    which = {"network": network, "data": data, "start": start, "taught": taught}
                    rows.append(which | _row(cells, which, not_run.get((network, start, taught))))
    return {
        "rows": rows, "differences": _differences(cells), "networks": dict(networks), "counts": dict(counts),
        "section": section.model_dump(mode="json"), "how": HOW,
        "notes": [*NOTES, *([] if section.pretrain_each_seed else [SHARED])],
    }  # fmt: skip


def _row(cells: Sequence[Mapping[str, Any]], which: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    if reason is not None:
        return {"not_run": reason}
    own = [cell["metrics"] for cell in cells if all(cell[name] == value for name, value in which.items())]
    return {name: over_seeds([metrics[name] for metrics in own], (0.0, 1.0)) for name in METRICS}


def _differences(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The effect of each factor on each network, with a verdict that an interval clear of zero alone can give."""
    found = []
    for network in NETWORKS:
        own = {_key(cell): cell["metrics"] for cell in cells if cell["network"] == network}
        for field, high, low, title in FACTORS:
            by_seed: dict[int, list[Mapping[str, float]]] = {}
            for cell in (cell for cell in cells if cell["network"] == network and cell[field] == high):
                other = own.get(_key({**cell, field: low}))
                if other is not None:
                    gain = {name: cell["metrics"][name] - other[name] for name in METRICS}
                    by_seed.setdefault(cell["seed"], []).append(gain)
            if not by_seed:
                continue
            row: dict[str, Any] = {"network": network, "factor": field, "title": title}
            for name in METRICS:
                means = [sum(gain[name] for gain in gains) / len(gains) for gains in by_seed.values()]
                row[name] = over_seeds(means, (-1.0, 1.0))
                row[name]["verdict"] = _verdict(row[name])
            found.append(row)
    return found


def _key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return cell["data"], cell["start"], cell["taught"], cell["seed"]


def _verdict(found: Mapping[str, Any]) -> str:
    if found["low"] is None or found["low"] <= 0 <= found["high"]:
        return "no difference shown"
    return "better" if found["low"] > 0 else "worse"


def table_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table as lines of text."""
    lines = []
    for row in summary["rows"]:
        about = summary["networks"][row["network"]]
        start = "MAE" if row["start"] == "mae" else about["given"]
        data = "real + synthetic" if row["data"] == "real_synthetic" else "real"
        name = (
            f"{row['network']:<6}{about['model']:<23} {data:<16} {start:<8} {'taught' if row['taught'] else 'alone':<6}"
        )
        if "not_run" in row:
            lines.append(f"{name}  {row['not_run']}")
        else:
            lines.append(f"{name}  accuracy {_text(row['accuracy'])}  macro-F1 {_text(row['macro_f1'])}")
    for row in summary["differences"]:
        said = row["macro_f1"]
        name = f"{row['network']:<6}{summary['networks'][row['network']]['model']:<23}"
        lines.append(f"{name} {row['title']:<27} macro-F1 {_text(said, '+')}  {said['verdict']}")
    return lines


def _text(found: Mapping[str, Any], sign: str = "") -> str:
    if found["mean"] is None:
        return "not measured"
    if found["low"] is None:
        return f"{found['mean']:{sign}.3f}"
    return f"{found['mean']:{sign}.3f} ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"
