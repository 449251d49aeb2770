"""What captions measured, by diagnosis: are melanomas more asymmetric and more colourful than nevi?

The ABCD rule was made to tell melanomas from nevi, so on real lesions its measurements should differ between the two.
How far they do says something of the measuring; it is no diagnosis, and nothing is dropped for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from factory import records, taxonomy
from factory.lab.intervals import proportion
from factory.quality.statistics import auc

# Columns of the captions that hold one number per image, in the order they are shown.
NUMBERS: tuple[str, ...] = (
    "asymmetry", "asymmetry_major", "asymmetry_minor", "color_asymmetry", "border_irregularity", "radial_variance",
    "fractal_dimension", "abrupt_octants", "color_count", "relative_diameter", "diameter_mm",
)  # fmt: skip
ILL, WELL = "melanoma", "nevus"


def by_diagnosis(captions: pa.Table, corpus: pa.Table) -> dict[str, Any]:
    """Quartiles of each measurement and the share with each colour by diagnosis, JSON-ready.

    captions: rows of `records.CAPTIONS`; corpus: `record_id` and `diagnosis`. `attributes` maps a column to
    `by_diagnosis` (quartiles and number) and `melanoma_over_nevus`: the chance that a melanoma's value is above a
    nevus's (AUC, ties half) with its 95 % interval, None without both. An image that failed, or that has no diagnosis,
    is counted in `left_out`; a diagnosis is listed in the vocabulary's order.
    """
    of = dict(zip(corpus["record_id"].to_pylist(), corpus["diagnosis"].to_pylist(), strict=True))
    columns = ["record_id", "outcome", "colors", *NUMBERS]
    rows = captions.select(columns).to_pylist()
    groups: dict[str, list[dict[str, Any]]] = {}
    left_out = {"failed": 0, "without a diagnosis": 0, "not measured": 0}
    for row in rows:
        diagnosis = of.get(row["record_id"])
        if row["outcome"] == records.FAILED:
            left_out["failed"] += 1
        elif row["asymmetry"] is None:
            left_out["not measured"] += 1
        elif diagnosis is None:
            left_out["without a diagnosis"] += 1
        else:
            groups.setdefault(diagnosis, []).append(row)
    ordered = {name: groups[name] for name in taxonomy.ALL_DIAGNOSES if name in groups}
    return {
        "num_images": sum(map(len, ordered.values())),
        "left_out": {why: count for why, count in left_out.items() if count},
        "diagnoses": {name: len(found) for name, found in ordered.items()},
        "attributes": {name: found for name in NUMBERS if (found := _attribute(name, ordered)) is not None},
        "colors": {
            color: {
                name: proportion(sum(color in (row["colors"] or ()) for row in found), len(found))
                for name, found in ordered.items()
            }
            for color in taxonomy.COLORS
        },
    }


def _attribute(name: str, groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    values = {group: [float(row[name]) for row in rows if row[name] is not None] for group, rows in groups.items()}
    known = {group: np.asarray(found) for group, found in values.items() if found}
    if not known:
        return None
    both = ILL in known and WELL in known
    return {
        "by_diagnosis": {group: _quartiles(found) for group, found in known.items()},
        "melanoma_over_nevus": auc(known[ILL], known[WELL])._asdict() if both else None,
    }


def _quartiles(values: Any) -> dict[str, float | int]:
    low, median, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"lower_quartile": low, "median": median, "upper_quartile": high, "num": int(values.size)}
