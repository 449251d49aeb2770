"""What only phantoms can tell of captions: how true they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from factory import phantom, records
from factory.lab.intervals import proportion
from factory.lab.planted import agreement


def captioner_accuracy(corpus: pa.Table, captions: pa.Table) -> dict[str, Any]:
    """How near the captions' attributes come to what the phantoms know of themselves.

    Per attribute: Spearman's rank correlation, mean absolute error and bias (caption minus truth) over the captioned
    records with a truth, and for those with levels the share of equal levels, with the phantom's own edges. Colours
    are also compared as sets. Raises ValueError if no caption has a truth to be held to.
    """
    rows = _joined(corpus, captions)
    if not rows:
        raise ValueError("captions must have true attributes to be held to, got none; use a phantom corpus.")
    found: dict[str, Any] = {"num_records": len(rows)}
    for name in ("asymmetry", "border_irregularity", "color_count"):
        pairs = [(row[name], row[f"true_{name}"]) for row in rows if row[name] is not None]
        found[name] = agreement(np.array(pairs, dtype=np.float64).reshape(-1, 2))
    for name, cuts in (("asymmetry", phantom.ASYMMETRY_LEVELS), ("border_irregularity", phantom.BORDER_LEVELS)):
        known = [row for row in rows if row[name] is not None]
        same = sum(phantom.level(row[name], cuts) == phantom.level(row[f"true_{name}"], cuts) for row in known)
        found[name]["level_agreement"] = proportion(same, len(known))
    counted = [row for row in rows if row["color_count"] is not None]
    exact = sum(row["color_count"] == row["true_color_count"] for row in counted)
    found["color_count"]["exact"] = proportion(exact, len(counted))
    found["colors"] = {"mean_jaccard": _mean_jaccard(rows)}
    return found


def _joined(corpus: pa.Table, captions: pa.Table) -> list[dict[str, Any]]:
    columns = ["true_asymmetry", "true_border_irregularity", "true_color_count", "true_colors"]
    truth = {row["record_id"]: row for row in corpus.select(["record_id", *columns]).to_pylist()}
    said = captions.select(
        ["record_id", "asymmetry", "border_irregularity", "color_count", "colors", "outcome"]
    ).to_pylist()
    joined = [row | truth.get(row["record_id"], {}) for row in said if row["outcome"] == records.ACCEPTED]
    return [row for row in joined if row.get("true_asymmetry") is not None]


def _mean_jaccard(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Shared colours over all colours named by either, a mean over the records."""
    sets = [(set(row["colors"]), set(row["true_colors"])) for row in rows if row["colors"] and row["true_colors"]]
    return float(np.mean([len(a & b) / len(a | b) for a, b in sets])) if sets else None
