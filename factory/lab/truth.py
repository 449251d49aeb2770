"""What only phantoms can tell: how true the captions are, and how well the gate finds faults that were planted.

The gate is shown phantoms of renderer settings that training did not use (`phantom.HELD_OUT`), each with a mask that
is either exact or spoilt. A pair is good if the planted mask has an IoU above 0.7 with the true one, whatever was
done to it: a mask shifted by a pixel is still a good mask. Pairs within a stated margin of 0.7 are not drawn, since
on the line either answer is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from factory import phantom, records
from factory.lab.intervals import mean_of_two, proportion
from factory.quality.overlap import iou

Mask = NDArray[np.bool_]
Verdict = tuple[str, str | None, float | None]  # outcome, reason, the gate's own IoU
Validate = Callable[[NDArray[np.uint8], NDArray[np.bool_]], Sequence[Verdict]]

GOOD_IOU, MARGIN, MAX_MARGIN = 0.7, 0.05, 0.25
MIX: dict[str, float] = {"none": 0.4, "shifted": 0.15, "scaled": 0.15, "swapped": 0.15, "torn": 0.15}
_BATCH = 64


# ------------------------------------------------------------------------------------------------------ captions


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
        found[name] = _agreement(np.array(pairs, dtype=np.float64).reshape(-1, 2))
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


def _agreement(pairs: NDArray[np.float64]) -> dict[str, Any]:
    """Of (said, true) pairs; the correlation is null where either side does not vary."""
    from scipy.stats import spearmanr

    if not len(pairs):
        return {"num_records": 0, "spearman": None, "mean_absolute_error": None, "bias": None}
    error = pairs[:, 0] - pairs[:, 1]
    varies = all(len(np.unique(side)) > 1 for side in pairs.T)
    return {
        "num_records": len(pairs),
        "spearman": float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic) if varies else None,
        "mean_absolute_error": float(np.abs(error).mean()),
        "bias": float(error.mean()),
    }


def _mean_jaccard(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Shared colours over all colours named by either, a mean over the records."""
    sets = [(set(row["colors"]), set(row["true_colors"])) for row in rows if row["colors"] and row["true_colors"]]
    return float(np.mean([len(a & b) / len(a | b) for a, b in sets])) if sets else None


# ------------------------------------------------------------------------------------------------------ the gate


@dataclass(frozen=True)
class Planted:
    """One pair for the gate: an unseen phantom, the mask it is shown with, and what is true of it."""

    image: NDArray[np.uint8]
    mask: Mask
    fault: str
    true_iou: float
    area: float  # of the true lesion, as a share of the image

    @property
    def good(self) -> bool:
        return self.true_iou > GOOD_IOU


def gate_accuracy(
    validate: Validate,
    seed: int,
    count: int,
    *,
    size: int = 128,
    mix: Mapping[str, float] = MIX,
    margin: float = MARGIN,
) -> dict[str, Any]:
    """The gate's precision and recall on planted faults, with Wilson intervals, and how each fault fared.

    validate: images (N, H, W, 3) uint8 and masks (N, H, W) bool -> (outcome, reason, IoU) of each. A positive is an
    accepted pair: precision is the share of good ones among the accepted, recall the share of accepted ones among the
    good, specificity the share of refused ones among the bad. Precision depends on the mix; `accept_everything` is
    what a gate that refuses nothing would score.
    """
    if count < 1 or not 0 <= margin <= MAX_MARGIN:
        raise ValueError(
            f"count must be at least 1 and margin from 0 to {MAX_MARGIN}, got {count} and {margin}; "
            "draw more pairs, nearer to the line."
        )
    planted = [plant(seed, index, fault, size, margin) for index, fault in enumerate(faults_of(mix, seed, count))]
    verdicts = _judged(validate, planted)
    return {
        **_rates(planted, verdicts),
        "by_fault": {fault: _by_fault(fault, planted, verdicts) for fault in mix},
        "by_size": _by_size(planted, verdicts),
        "reasons": _reasons(verdicts),
        "gate_iou": _agreement(_iou_pairs(planted, verdicts)),
        "accept_everything": {"precision": proportion(sum(p.good for p in planted), count)["value"], "recall": 1.0},
        "setting": {
            "count": count, "seed": seed, "size": size, "mix": dict(mix), "margin": margin, "good_iou": GOOD_IOU,
            "renderer": "phantom.HELD_OUT, which no fit uses",
        },
    }  # fmt: skip


def faults_of(mix: Mapping[str, float], seed: int, count: int) -> list[str]:
    """The fault of each pair: the mix's shares as nearly as whole numbers allow (largest remainder), shuffled."""
    unknown = sorted(set(mix) - {"none", *_FAULTS})
    if unknown or not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise ValueError(
            f"mix must give shares to some of none, {', '.join(_FAULTS)}, got {dict(mix)}; name each with its share."
        )
    exact = {fault: count * share / sum(mix.values()) for fault, share in mix.items()}
    whole = {fault: int(number) for fault, number in exact.items()}
    rest = sorted(mix, key=lambda fault: whole[fault] - exact[fault])[: count - sum(whole.values())]
    faults = [fault for fault in mix for _ in range(whole[fault] + (fault in rest))]
    return [faults[i] for i in np.random.default_rng([seed, 3]).permutation(count)]


def plant(seed: int, index: int, fault: str, size: int, margin: float) -> Planted:
    """Phantom `index` with a fault in its mask, of random strength, drawn again while its true IoU is near 0.7."""
    rng = np.random.default_rng([seed, index, 4])
    drawn = phantom.draw(seed, index, size, settings=phantom.HELD_OUT)
    true = np.asarray(drawn.mask, dtype=bool)
    while True:  # every fault's strengths reach far below the line, so this ends
        mask = true if fault == "none" else _FAULTS[fault](rng, true, seed)
        overlap = float(iou(mask, true))
        if mask.any() and abs(overlap - GOOD_IOU) >= margin:
            return Planted(drawn.image, mask, fault, overlap, float(true.mean()))


def _shifted(rng: np.random.Generator, true: Mask, seed: int) -> Mask:
    """Moved by up to 0.9 lesion radii; what leaves the image is lost."""
    radius, angle = np.sqrt(true.sum() / np.pi), rng.uniform(0, 2 * np.pi)
    step = rng.uniform(0.05, 0.9) * radius * np.array([np.cos(angle), np.sin(angle)])
    return _warped(true, np.array([[1, 0, step[0]], [0, 1, step[1]]]))


def _scaled(rng: np.random.Generator, true: Mask, seed: int) -> Mask:
    """Shrunk or grown about its centroid, by a factor of up to 1.7."""
    factor = np.exp(rng.choice([-1, 1]) * rng.uniform(0.05, np.log(1.7)))
    y, x = (float(axis.mean()) for axis in np.nonzero(true))
    return _warped(true, np.array([[factor, 0, x * (1 - factor)], [0, factor, y * (1 - factor)]]))


def _swapped(rng: np.random.Generator, true: Mask, seed: int) -> Mask:
    """The mask of another lesion, as it lies."""
    other = phantom.draw_attributes(seed + 1, int(rng.integers(2**31)), settings=phantom.HELD_OUT)
    points = (other.contour * other.radius + np.array(other.centre)) * true.shape[0]
    canvas = np.zeros(true.shape, np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas.astype(bool)


def _torn(rng: np.random.Generator, true: Mask, seed: int) -> Mask:
    """A part torn off along a ragged line: what remains is a share of 0.1 to 0.97 of the lesion."""
    rows, columns = np.nonzero(true)
    angle = rng.uniform(0, 2 * np.pi)
    along, across = np.cos(angle), np.sin(angle)
    depth = columns * along + rows * across
    width = columns * -across + rows * along
    ragged = 0.15 * np.sqrt(len(rows)) * np.sin(width * rng.uniform(0.1, 0.5) + rng.uniform(0, 2 * np.pi))
    depth = depth + rng.uniform(0, 1) * ragged
    kept = depth <= np.quantile(depth, rng.uniform(0.1, 0.97))
    mask = np.zeros_like(true)
    mask[rows[kept], columns[kept]] = True
    return mask


_FAULTS: dict[str, Callable[[np.random.Generator, Mask, int], Mask]] = {
    "shifted": _shifted, "scaled": _scaled, "swapped": _swapped, "torn": _torn,
}  # fmt: skip


def _warped(true: Mask, matrix: NDArray[np.float64]) -> Mask:
    side = true.shape[0]
    return np.asarray(cv2.warpAffine(true.astype(np.float32), matrix, (side, side), flags=cv2.INTER_LINEAR) > 0.5)


def _judged(validate: Validate, planted: Sequence[Planted]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for start in range(0, len(planted), _BATCH):
        part = planted[start : start + _BATCH]
        found = validate(np.stack([pair.image for pair in part]), np.stack([pair.mask for pair in part]))
        if len(found) != len(part):
            raise ValueError(
                f"validate must give one verdict per pair, got {len(found)} for {len(part)}; return them in order."
            )
        verdicts.extend(found)
    return verdicts


def _iou_pairs(planted: Sequence[Planted], verdicts: Sequence[Verdict]) -> NDArray[np.float64]:
    """(the gate's IoU, the true one) where the gate states one."""
    pairs = [(v[2], p.true_iou) for p, v in zip(planted, verdicts, strict=True) if v[2] is not None]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def _rates(planted: Sequence[Planted], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Precision, recall, specificity and balanced accuracy over these pairs, and the table they come from."""
    good = np.array([pair.good for pair in planted], dtype=bool)
    accepted = np.array([verdict[0] == records.ACCEPTED for verdict in verdicts], dtype=bool)
    hits, right = int((good & accepted).sum()), int((~good & ~accepted).sum())
    num_good, num_bad = int(good.sum()), int((~good).sum())
    low, high = mean_of_two((hits, num_good), (right, num_bad))
    both = num_good and num_bad
    return {
        "precision": proportion(hits, int(accepted.sum())),
        "recall": proportion(hits, num_good),
        "specificity": proportion(right, num_bad),
        "balanced_accuracy": {
            "value": (hits / num_good + right / num_bad) / 2 if both else None, "low": low, "high": high,
        },
        "table": {
            "good_accepted": hits, "good_refused": num_good - hits,
            "bad_accepted": num_bad - right, "bad_refused": right,
        },
    }  # fmt: skip


def _by_fault(fault: str, planted: Sequence[Planted], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    pairs = [(p, v) for p, v in zip(planted, verdicts, strict=True) if p.fault == fault]
    good = sum(p.good for p, _ in pairs)
    kept = [sum(v[0] == records.ACCEPTED for p, v in pairs if p.good == side) for side in (True, False)]
    return {
        "count": len(pairs),
        "mean_true_iou": float(np.mean([p.true_iou for p, _ in pairs])) if pairs else None,
        "good_accepted": proportion(kept[0], good),
        "bad_refused": proportion(len(pairs) - good - kept[1], len(pairs) - good),
    }


def _by_size(planted: Sequence[Planted], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The rates in thirds of the true lesion's area, because an IoU threshold is hardest on small lesions."""
    order = np.argsort([pair.area for pair in planted], kind="stable")
    found = {}
    for name, part in zip(("small", "medium", "large"), np.array_split(order, 3), strict=True):
        if len(part):
            rates = _rates([planted[i] for i in part], [verdicts[i] for i in part])
            found[name] = rates | {"largest_area": planted[part[-1]].area}
    return found


def _reasons(verdicts: Sequence[Verdict]) -> dict[str, int]:
    named = [verdict[1] for verdict in verdicts if verdict[1] is not None]
    return {reason: named.count(reason) for reason in sorted(set(named))}
