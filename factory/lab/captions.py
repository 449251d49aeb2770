"""Captioners compared on the same images: what they agree on, how long they talk, what fails, time and cost.

None of this needs a truth. Agreement is between captioners, so two that make one mistake agree; what raters think of
the captions is measured in `factory.lab.reviews`.

A captions table (`records.CAPTIONS`) may have more columns, and each is used if it is there: `asymmetry_level` and
`border_level` (words of `taxonomy.LEVELS`, else they follow from the numbers), `findings` (what a validator found
wrong, a list of words), `seconds` (of one caption) and `cost` (of one caption, in the currency of who bills it).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from factory import records, taxonomy
from factory.lab.agreement import alpha_interval, pairwise_agreement
from factory.lab.intervals import proportion
from factory.prompts import Attributes, unsupported_measurements
from factory.quality.statistics import Interval, bootstrap

Rows = dict[str, dict[str, Any]]  # record_id -> row

NEEDS = ("record_id", "caption", "asymmetry", "border_irregularity", "colors", "outcome", "reason")
FINDINGS, SECONDS, COST = "findings", "seconds", "cost"
LEVEL_COLUMNS = {"asymmetry": "asymmetry_level", "border_irregularity": "border_level"}


def compare(captions: Mapping[str, pa.Table], record_ids: Sequence[str] | None = None, seed: int = 0) -> dict[str, Any]:
    """What captioners say of the same images, as JSON-ready numbers; shares have Wilson intervals, all at 95 %.

    captions: backend -> its table. record_ids: the images compared, by default those that every table has a row of.
    `backends` holds each one's outcomes, length in words, findings, seconds and cost; `agreement`, null with fewer than
    two backends, holds per attribute what `agreement.Alpha` names: ordinal alpha for the words of asymmetry and
    border, nominal alpha for whether each colour is named, and the mean Jaccard index of the colour sets over pairs of
    backends with a bootstrap over images. What a table does not state is None. Raises ValueError if there is no
    backend, a column or an image is absent, or two rows are of one image.
    """
    if not captions:
        raise ValueError("captions must hold at least one backend's table, got none; run `factory caption` first.")
    by_backend = {name: _rows(name, table) for name, table in captions.items()}
    shared = sorted(set.intersection(*(set(rows) for rows in by_backend.values())))
    ids = shared if record_ids is None else list(record_ids)
    if not ids:
        raise ValueError(
            f"captions must share at least one image, got none that {', '.join(by_backend)} share; caption the same "
            "corpus with each."
        )
    for name, rows in by_backend.items():
        absent = [record_id for record_id in ids if record_id not in rows]
        if absent:
            raise ValueError(
                f"captions of {name} must have a row for each image compared, got none of {absent[0]}; caption the "
                "same corpus with each."
            )
    columns = {name: set(table.column_names) for name, table in captions.items()}
    return {
        "num_images": len(ids),
        "backends": {
            name: _backend([rows[i] for i in ids], columns[name]) for name, rows in by_backend.items()
        },
        "agreement": _agreement(list(by_backend), [[rows[i] for i in ids] for rows in by_backend.values()], ids, seed),
    }  # fmt: skip


def _rows(name: str, table: pa.Table) -> Rows:
    missing = sorted(set(NEEDS) - set(table.column_names))
    if missing:
        raise ValueError(f"captions of {name} must have the column {missing[0]}; caption the images again.")
    used = [c for c in (*NEEDS, *LEVEL_COLUMNS.values(), FINDINGS, SECONDS, COST) if c in table.column_names]
    rows = table.select(used).to_pylist()
    by_id = {row["record_id"]: row for row in rows}
    if len(by_id) != len(rows):
        raise ValueError(
            f"captions of {name} must have one row per image, got {len(rows)} rows of {len(by_id)}; give each "
            "captioner a table of its own."
        )
    return by_id


def as_stated(table: pa.Table, price_in: float = 0.0, price_out: float = 0.0) -> pa.Table:
    """Captions of a model with its own words of the ABC in place of what was measured beside them, ready to compare.

    price_in, price_out: of a million tokens, from which each caption's `cost` follows; without prices none is told.
    Measured captions, which state what was measured, are returned as they are.
    """
    by_model = pc.is_valid(table["model_digest"])
    if not pc.any(by_model).as_py():
        return table
    words = {"asymmetry": "stated_asymmetry", "border_irregularity": "stated_border_irregularity"}
    for attribute, column in words.items():
        place = table.schema.get_field_index(attribute)
        measured = pc.if_else(by_model, pa.scalar(None, pa.float32()), table[attribute])
        table = table.set_column(place, attribute, measured).append_column(LEVEL_COLUMNS[attribute], table[column])
    stated = pc.if_else(by_model, table["stated_colors"], table["colors"])
    table = table.set_column(table.schema.get_field_index("colors"), "colors", stated)
    if price_in or price_out:
        used = [pc.fill_null(table[name], 0) for name in ("tokens_in", "tokens_out")]
        cost = pc.add(pc.multiply(used[0], price_in / 1e6), pc.multiply(used[1], price_out / 1e6))
        table = table.append_column(COST, pc.if_else(by_model, cost, pa.scalar(None, pa.float64())))
    return table


def of_images(table: pa.Table, record_ids: Sequence[str]) -> pa.Table:
    """The rows of these images alone, so that a table on a million others need not become rows of Python."""
    return table.filter(pc.is_in(table["record_id"], pa.array(record_ids, pa.string())))


# ------------------------------------------------------------------------------------------------- one backend


def _backend(rows: Sequence[Mapping[str, Any]], columns: set[str]) -> dict[str, Any]:
    made = [row for row in rows if row["outcome"] == records.ACCEPTED and row["caption"]]
    lost = Counter(str(row["reason"] or "no caption") for row in rows if row not in made)
    sizes = [row for row in made if unsupported_measurements(row["caption"])]
    return {
        "captioned": proportion(len(made), len(rows)),
        "failures": dict(sorted(lost.items())),
        "words": _quartiles([len(row["caption"].split()) for row in made]),
        "sizes_stated": proportion(len(sizes), len(made)),
        "findings": _findings(made) if FINDINGS in columns else None,
        "seconds": _quartiles([row.get(SECONDS) for row in rows]),
        "cost": _quartiles([row.get(COST) for row in rows]),
    }


def _quartiles(values: Sequence[float | None]) -> dict[str, float | int] | None:
    """Minimum, quartiles, maximum, mean and number of what is stated; None if nothing is."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    least, low, median, high, most = (float(v) for v in np.quantile(known, [0, 0.25, 0.5, 0.75, 1]))
    return {
        "min": least, "lower_quartile": low, "median": median, "upper_quartile": high, "max": most,
        "mean": float(np.mean(known)), "num": len(known),
    }  # fmt: skip


def _findings(made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of captions with any finding, and with each."""
    named = [set(row[FINDINGS] or ()) for row in made]
    each = Counter(finding for row in named for finding in row)
    return {
        "any": proportion(sum(map(bool, named)), len(made)),
        "each": {finding: proportion(each[finding], len(made)) for finding in sorted(each)},
    }


# --------------------------------------------------------------------------------------------------- agreement


def _agreement(names: list[str], rows: list[list[dict[str, Any]]], ids: list[str], seed: int) -> dict[str, Any] | None:
    """rows: (backends, images)."""
    if len(names) < 2:
        return None
    found: dict[str, Any] = {}
    for attribute, column in LEVEL_COLUMNS.items():
        ranks = [[_rank(row, attribute, column) for row in of] for of in rows]
        found[attribute] = {
            "alpha": alpha_interval(ranks, "ordinal", seed=seed).as_json(),
            "equal": pairwise_agreement(ranks, names),
        }
    sets = [[_colors(row) for row in of] for of in rows]
    found["colors"] = {
        "mean_jaccard": _interval(_jaccard(sets, ids, seed)),
        "each": {color: _color(color, sets, names, seed) for color in taxonomy.COLORS},
    }
    return found


def _rank(row: Mapping[str, Any], attribute: str, column: str) -> float:
    """0, 1 or 2 for low, medium or high; NaN where the caption says nothing of it."""
    if row["outcome"] != records.ACCEPTED:
        return math.nan
    word = row.get(column)
    if word is None and row[attribute] is not None:
        values = {"asymmetry": 0.0, "border_irregularity": 0.0, attribute: float(row[attribute])}
        word = getattr(Attributes(**values, colors=()), column)
    return float(taxonomy.LEVELS.index(taxonomy.check(word, taxonomy.LEVELS, column))) if word else math.nan


def _colors(row: Mapping[str, Any]) -> set[str] | None:
    """The colours named; None where nothing is said of colours."""
    if row["outcome"] != records.ACCEPTED or not row["colors"]:
        return None
    return set(row["colors"])


def _color(color: str, sets: list[list[set[str] | None]], names: list[str], seed: int) -> dict[str, Any]:
    named = [[math.nan if s is None else float(color in s) for s in of] for of in sets]
    return {
        "alpha": alpha_interval(named, "nominal", seed=seed).as_json(),
        "named": {
            name: proportion(sum(v == 1 for v in of), sum(not math.isnan(v) for v in of))
            for name, of in zip(names, named, strict=True)
        },
    }


def _jaccard(sets: list[list[set[str] | None]], ids: list[str], seed: int) -> Interval | None:
    """Shared colours over all colours named by either, a mean over pairs of backends and images."""
    pairs = [
        (ids[i], len(a & b) / len(a | b))
        for first, second in combinations(sets, 2)
        for i, (a, b) in enumerate(zip(first, second, strict=True))
        if a is not None and b is not None
    ]
    if not pairs:
        return None
    groups, values = zip(*pairs, strict=True)
    return bootstrap(lambda shares: float(shares.mean()), groups, np.array(values), seed=seed)


def _interval(found: Interval | None) -> dict[str, float | int] | None:
    return None if found is None else dict(found._asdict())
