"""Where synthetic rows come from: the real images they lie nearest to, and the licences of what they descend from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from factory import records
from factory.lab.intervals import proportion
from factory.lab.learners import pictures
from factory.quality.duplicates import dhash, near_copy_threshold, nearest, thumbnails
from factory.storage import Store

NEAR_COPIES, LICENCES = "lab/near_copies.json", "lab/licences.json"
TOP = 100  # pairs listed for a person to look at

Images = NDArray[np.uint8]
Floats = NDArray[Any]


def hashes(images: Images) -> Floats:
    """Perceptual hashes of images (N, S, S, 3), (N,) uint64."""
    return np.array([dhash(image) for image in images], dtype=np.uint64)


def nearest_real(
    store: Store,
    synthetic: pa.Table,
    real: pa.Table,
    *,
    image_size: int = 64,
    features: Callable[[Images], Floats] = thumbnails,
) -> dict[str, Any]:
    """`near_copies` of the accepted samples, written to lab/near_copies.json."""
    report = near_copies(synthetic, real, image_size=image_size, features=features)
    _write(store, NEAR_COPIES, report)
    return report


def near_copies(
    synthetic: pa.Table,
    real: pa.Table,
    *,
    image_size: int = 64,
    features: Callable[[Images], Floats] = thumbnails,
) -> dict[str, Any]:
    """Finds each accepted sample's nearest training image and flags near copies.

    A sample is flagged where its similarity to a training image is above what all but 0.1 % of training images have
    to an image of another group, by `features` (cosine) or by perceptual hash. `copies` in the answer is what
    `run_worth` takes. Raises ValueError if either side is empty or the real images are of one group.
    """
    training = real.filter(records.accepted("train"))
    own = pictures(training, "row_id", image_size)
    made = pictures(synthetic.filter(records.accepted()), "sample_id", image_size)
    if not len(own) or not len(made):
        raise ValueError(
            f"near copies must have images on both sides, got {len(own)} real and {len(made)} synthetic; "
            "ingest a corpus and synthesize samples first."
        )
    names, groups = _names(training, own.ids)
    pairs: list[dict[str, Any]] = [{"sample_id": name, "near_copy": False} for name in made.ids]
    by = {
        "features": _compare(pairs, "features", features(made.images), features(own.images), names, groups),
        "hash": _compare(pairs, "hash", hashes(made.images), hashes(own.images), names, groups),
    }
    pairs.sort(key=lambda pair: -pair["features"]["similarity"])
    flagged = [pair for pair in pairs if pair["near_copy"]]
    return {
        "num_synthetic": len(made), "num_real": len(own), "by": by,
        "near_copies": proportion(len(flagged), len(made)),
        "copies": {pair["sample_id"]: sorted({pair[kind]["record_id"] for kind in by}) for pair in flagged},
        "nearest_pairs": pairs[:TOP],
        "how": "Threshold: the 99.9th percentile of real images' similarity to their nearest of another group.",
    }  # fmt: skip


def _names(training: pa.Table, ids: list[str]) -> tuple[list[str], NDArray[np.str_]]:
    """The record ids and the groups of training rows, in the order of their row ids."""
    rows = {row["row_id"]: row for row in training.select(["row_id", "record_id", "group_id"]).to_pylist()}
    groups = np.array([rows[name]["group_id"] or name for name in ids])
    return [rows[name]["record_id"] or name for name in ids], groups


def _compare(
    pairs: list[dict[str, Any]], kind: str, made: Floats, own: Floats, names: list[str], groups: NDArray[np.str_]
) -> dict[str, Any]:
    """Adds each sample's nearest real image to its pair and flags it if above the threshold, which is returned."""
    threshold = near_copy_threshold(own, groups)
    found = nearest(made, own)
    above = found.similarity > np.float32(threshold)
    for pair, position, similarity, flag in zip(pairs, found.position, found.similarity, above, strict=True):
        pair[kind] = {"record_id": names[position], "similarity": float(similarity)}
        pair["near_copy"] |= bool(flag)
    return {"threshold": threshold, "flagged": int(above.sum())}


def parent_licences(store: Store, synthetic: pa.Table, real: pa.Table) -> dict[str, Any]:
    """Counts the licences that accepted samples descend from and writes lab/licences.json.

    `parents`: how many samples have a parent under each licence ("unknown" where a parent is not a real row).
    `training_split`: how many real images a generator fitted on the training split learned from, by licence; they
    bear on every sample of such a generator, with parents or without.
    """
    rows = real.select(["row_id", "record_id", "licence"]).to_pylist()
    licence_of = {row[key]: row["licence"] or "unknown" for row in rows for key in ("row_id", "record_id") if row[key]}
    lineages = [row or [] for row in synthetic.filter(records.accepted())["parents"].to_pylist()]
    counted = Counter(name for parents in lineages for name in {licence_of.get(p, "unknown") for p in parents})
    training = Counter(name or "unknown" for name in real.filter(records.accepted("train"))["licence"].to_pylist())
    report = {
        "parents": dict(sorted(counted.items())),
        "without_parents": sum(not parents for parents in lineages),
        "training_split": dict(sorted(training.items())),
    }
    _write(store, LICENCES, report)
    return report


def _name(row: dict[str, Any]) -> str:
    return str(row["record_id"] or row["row_id"])


def _write(store: Store, path: str, report: dict[str, Any]) -> None:
    store.replace(path, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())
