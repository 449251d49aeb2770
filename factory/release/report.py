"""The report: one self-contained HTML page on a run, with no request to anywhere.

`collect(run)` reads what is there, `build_report(inputs)` writes the page. Everything foreign is escaped, pictures and
charts are inline, and the page's own policy forbids scripts and fetches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa

from factory import taxonomy
from factory.images import read_png
from factory.quality.alarms import alarms
from factory.records import ACCEPTED, REJECTED
from factory.release import charts, counts, measured
from factory.release.collect import COMMANDS, ReportInputs, collect
from factory.release.corpus import facts, view
from factory.release.glossary import TERMS
from factory.release.pictures import Picture, data_uri, image_bytes, picture, words
from factory.release.provenance import Fit, as_store
from factory.run import Run
from factory.storage import Store

__all__ = ["ReportInputs", "build_report", "collect", "write_report"]

PAGE = "report/index.html"
TEMPLATES = Path(__file__).parent / "templates"
_SIDE = 5  # pictures per side of a side-by-side row


def build_report(inputs: ReportInputs) -> str:
    """The page as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "percent": percent, "words": words, "decimals": decimals} | view.FILTERS
    environment.globals |= {"diagnosis_name": taxonomy.diagnosis_name, "charts": charts} | view.GLOBALS
    return environment.get_template("report.html.j2").render(**_view(inputs))


def write_report(run: Run | Store | str | Path, weights: Sequence[Any] = ()) -> str:
    """Collect, build and put RUN/report/index.html in place, with what it says of the corpus as JSON beside it; the
    page's path relative to the run."""
    store = as_store(run)
    inputs = collect(store, weights)
    store.replace(facts.PATH, facts.to_json(inputs.corpus_facts))
    store.replace(PAGE, build_report(inputs).encode())
    return PAGE


def number(value: float | None) -> str:
    """1234567 -> `1,234,567`; None -> a dash."""
    return "\N{EN DASH}" if value is None else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """0.7931 -> `79.3%`."""
    return "\N{EN DASH}" if share is None else f"{100 * share:.1f}%"


def decimals(value: object, places: int = 3) -> str:
    """A measured number; a dash where there is none."""
    return f"{value:.{places}f}" if isinstance(value, (int, float)) else "\N{EN DASH}"


def _view(inputs: ReportInputs) -> dict[str, Any]:
    planned = None if inputs.plan is None else inputs.plan.num_rows
    funnel = counts.funnel(inputs.samples, planned)
    accepted, rejected = _samples_shown(inputs.shown)
    run = inputs.facts.uri
    return {
        "inputs": inputs, "facts": inputs.facts, "funnel": funnel, "segments": _segments(funnel),
        "rates": _rates(inputs.samples), "matrix": _matrix(inputs), "corpus": inputs.corpus_facts,
        "accepted": accepted, "rejected": rejected, "side_by_side": _side_by_side(inputs),
        "worth": inputs.worth or {}, "tasks": measured.worth_tasks(inputs.worth),
        "gate": measured.gate_truth(inputs.gate), "captions": measured.caption_truth(inputs.caption_accuracy),
        "by_diagnosis": measured.attributes_by_diagnosis(inputs.caption_attributes),
        "near_copies": measured.near_copies_of(inputs.near_copies),
        "fits": [_fit(fit) for fit in inputs.fits], "verdict": inputs.verdict, "terms": TERMS,
        "commands": {name: f"factory {verb} --run {run}" for name, verb in COMMANDS.items()},
        "alarms": alarms(inputs.samples, worth=inputs.worth) if inputs.samples is not None else [],
        "recipe_lines": _recipe_lines(inputs.facts.recipe), "metrics": measured.METRICS,
    }  # fmt: skip


def _segments(funnel: counts.Funnel) -> list[charts.Segment]:
    return [
        charts.Segment("accepted", funnel.accepted, "accepted"),
        charts.Segment("rejected", funnel.num_rejected, "rejected"),
        charts.Segment("failed", funnel.num_failed, "failed"),
        charts.Segment("not made yet", funnel.waiting, "waiting"),
    ]


def _rates(samples: pa.Table | None) -> list[tuple[str, list[counts.Rate]]]:
    if samples is None or not samples.num_rows:
        return []
    return [
        ("Diagnosis", [_named(rate) for rate in counts.acceptance(samples, "diagnosis", taxonomy.DIAGNOSES)]),
        ("Skin type", counts.acceptance(samples, "skin_type", taxonomy.SKIN_TYPES)),
    ]


def _named(rate: counts.Rate) -> counts.Rate:
    return replace(rate, group=taxonomy.diagnosis_name(rate.group))


@dataclass(frozen=True)
class Matrix:
    """Accepted of planned per diagnosis (rows) and skin type (columns)."""

    columns: list[str]
    rows: list[tuple[str, list[tuple[int, int]]]]


def _matrix(inputs: ReportInputs) -> Matrix | None:
    asked = inputs.plan if inputs.plan is not None else inputs.samples
    if asked is None or inputs.samples is None:
        return None
    planned = Counter(zip(asked["diagnosis"].to_pylist(), asked["skin_type"].to_pylist(), strict=True))
    accepted: Counter[tuple[str, str]] = Counter()
    for row in inputs.samples.select(["diagnosis", "skin_type", "outcome"]).to_pylist():
        accepted[row["diagnosis"], row["skin_type"]] += row["outcome"] == ACCEPTED
    columns = [t for t in taxonomy.SKIN_TYPES if any(key[1] == t for key in planned)]
    rows = [d for d in taxonomy.DIAGNOSES if any(key[0] == d for key in planned)]
    return Matrix(columns, [(d, [(accepted[d, t], planned[d, t]) for t in columns]) for d in rows])


def _samples_shown(shown: pa.Table | None) -> tuple[list[tuple[str, list[Picture]]], list[Picture]]:
    """Accepted pictures by diagnosis, and rejected ones whose pixels were kept."""
    by_diagnosis: dict[str, list[Picture]] = {}
    rejected = []
    for row in [] if shown is None else shown.to_pylist():
        figure = _sample(row)
        if figure is not None and row["outcome"] == ACCEPTED:
            by_diagnosis.setdefault(row["diagnosis"] or "not stated", []).append(figure)
        elif figure is not None and row["outcome"] == REJECTED:
            rejected.append(figure)
    return sorted(by_diagnosis.items()), rejected


def _sample(row: Mapping[str, Any]) -> Picture | None:
    data = image_bytes(row["image"])
    if data is None:
        return None
    what = f"{taxonomy.diagnosis_name(row['diagnosis'] or 'lesion')}, skin type {row['skin_type'] or 'not stated'}"
    refused = row["outcome"] == REJECTED
    iou = "no IoU" if row["iou"] is None else f"IoU {row['iou']:.2f}"
    return picture(
        data, image_bytes(row["mask"]),
        alt=f"synthetic image: {what}",
        caption=words(row["reason"]) if refused else f"type {row['skin_type'] or '?'}, {iou}",
        detail=f"{row['sample_id']}, seed {row['seed']}: {row['prompt'] or 'no prompt'}",
        note=f"{what}, {iou}" if refused else "",
    )  # fmt: skip


def _side_by_side(inputs: ReportInputs) -> list[dict[str, Any]]:
    """Rows of corpus and synthetic pictures for each diagnosis that has both."""
    if inputs.real is None or inputs.shown is None:
        return []
    ours: dict[str, list[Picture]] = {}
    for row in inputs.shown.to_pylist():
        figure = _sample(row) if row["outcome"] == ACCEPTED else None
        if figure is not None:
            ours.setdefault(row["diagnosis"], []).append(replace(figure, caption=_skin(row)))
    theirs: dict[str, list[Picture]] = {}
    sources: dict[str, set[str]] = {}
    for row in inputs.real.to_pylist():
        theirs.setdefault(row["diagnosis"], []).append(_corpus_picture(row))
        sources.setdefault(row["diagnosis"], set()).add(row["source"])
    both = [d for d in taxonomy.DIAGNOSES if d in ours and d in theirs]
    return [
        {
            "diagnosis": d,
            "sources": ", ".join(sorted(sources[d])),
            "corpus": theirs[d][:_SIDE],
            "synthetic": ours[d][:_SIDE],
        }
        for d in both
    ]


def _skin(row: Mapping[str, Any]) -> str:
    return f"type {row['skin_type']}" if row["skin_type"] else ""


def _corpus_picture(row: Mapping[str, Any]) -> Picture:
    data = image_bytes(row["image"])
    assert data is not None, "an accepted corpus row holds an image"
    name = taxonomy.diagnosis_name(row["diagnosis"] or "lesion")
    return picture(
        data, image_bytes(row["mask"]), alt=f"corpus image: {name}", caption=_skin(row),
        detail=f"{row['source']}/{row['source_id']}",
    )  # fmt: skip


def _fit(fit: Fit) -> dict[str, Any]:
    points = [(m["step"], m["loss"]) for m in fit.metrics if isinstance(m.get("loss"), (int, float)) and "step" in m]
    steps, losses = [float(s) for s, _ in points], [float(v) for _, v in points]
    return {
        "name": fit.name,
        "card": [(words(k), _value(v)) for k, v in fit.card.items() if isinstance(v, (int, float, str)) and v != ""],
        "curve": charts.loss_curve(steps, losses, f"loss of {fit.name} over steps"),
        "last": losses[-1] if losses else None,
        "grid": None if fit.grid is None else {"step": fit.grid[0], "uri": data_uri(read_png(fit.grid[1]), 1100)},
    }


def _value(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _recipe_lines(recipe: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested recipe as dotted names and values, in its own order."""
    lines: list[tuple[str, str]] = []
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            lines += _recipe_lines(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines
