"""How well a gate finds faults that were planted in masks, on pictures whose true mask is known.

Pairs are those of `quality/faults.py`, but for a margin around the line between good and bad. Phantoms are of renderer
settings that training did not use (`phantom.HELD_OUT`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factory import phantom, records
from factory.lab.intervals import mean_of_two, proportion
from factory.quality.faults import FAULTS, GOOD_IOU, MARGIN, MAX_MARGIN, MIX, Planted, Share, cases_of, plant
from factory.quality.thresholds import fit_thresholds

Verdict = tuple[str, str | None, float | None]  # outcome, reason, the IoU that the gate judges by
Validate = Callable[[NDArray[np.uint8], NDArray[np.bool_]], Sequence[Verdict]]


SKIN_GROUPS = {"I-II": (1, 2), "III-IV": (3, 4), "V-VI": (5, 6)}
_BATCH = 64
_BINS = 10  # of the calibration error, of equal numbers of pairs


def gate_accuracy(
    validate: Validate,
    seed: int,
    count: int,
    *,
    size: int = 128,
    mix: Mapping[str, Share] = MIX,
    margin: float = MARGIN,
) -> dict[str, Any]:
    """`accuracy` on `count` phantoms that no fit has seen, with how they were drawn."""
    if count < 1 or not 0 <= margin <= MAX_MARGIN:
        raise ValueError(
            f"count must be at least 1 and margin from 0 to {MAX_MARGIN}, got {count} and {margin}; "
            "draw more pairs, nearer to the line."
        )
    cases = enumerate(cases_of(mix, seed, count))
    return accuracy(validate, (plant(seed, index, *case, size, margin) for index, case in cases)) | {
        "setting": {
            "count": count, "seed": seed, "size": size, "mix": {name: list(share) for name, share in mix.items()},
            "margin": margin, "good_iou": GOOD_IOU, "renderer": "phantom.HELD_OUT, which no fit uses",
        },
    }  # fmt: skip


def fitted_theta(validate: Validate, seed: int, count: int, *, size: int = 128) -> list[list[float]]:
    """`gate.theta_by_area` for a gate, by `quality/thresholds.py`, on `count` pairs of phantoms as the renderer draws
    them: not those that the gate is judged on, with seeds that no fit uses."""
    cases = enumerate(cases_of(MIX, seed, count))
    pairs = (plant(seed, index, *case, size, MARGIN, phantom.DEFAULT) for index, case in cases)
    planted, verdicts = _judged(validate, pairs)
    known = [(v[2], p.good, float(p.mask.mean())) for p, v in zip(planted, verdicts, strict=True) if v[2] is not None]
    return fit_thresholds(*zip(*known, strict=True))


def accuracy(validate: Validate, pairs: Iterable[Planted]) -> dict[str, Any]:
    """The gate's precision and recall on planted faults, with Wilson intervals, and how each fault fared.

    validate: images (N, H, W, 3) uint8 and masks (N, H, W) bool -> (outcome, reason, IoU) of each; images of one size
    come together. A positive is an accepted pair: precision is the share of good ones among the accepted, recall the
    share of accepted ones among the good, specificity the share of refused ones among the bad. Precision depends on the
    mix; `accept_everything` is what a gate that refuses nothing would score.
    """
    planted, verdicts = _judged(validate, pairs)
    found = {fault: _by_fault(fault, planted, verdicts) for fault in ("none", *FAULTS)}
    overlaps = _iou_pairs(planted, verdicts)
    return {
        **_rates(planted, verdicts),
        "by_fault": {fault: row for fault, row in found.items() if row["count"]},
        "by_size": _by_size(planted, verdicts),
        "by_skin": _by_skin(planted, verdicts),
        "reasons": _reasons(verdicts),
        "gate_iou": agreement(overlaps) | {"calibration_error": calibration_error(overlaps)},
        "accept_everything": {"precision": _share(sum(p.good for p in planted), len(planted)), "recall": 1.0},
    }


def _share(part: int, whole: int) -> float | None:
    return proportion(part, whole)["value"]


def _judged(validate: Validate, pairs: Iterable[Planted]) -> tuple[list[Planted], list[Verdict]]:
    """All pairs with their verdicts; of one size, and so many, at once."""
    planted, verdicts, part = list[Planted](), list[Verdict](), list[Planted]()

    def judge() -> None:
        found = validate(np.stack([pair.image for pair in part]), np.stack([pair.mask for pair in part]))
        if len(found) != len(part):
            raise ValueError(
                f"validate must give one verdict per pair, got {len(found)} for {len(part)}; return them in order."
            )
        planted.extend(part)
        verdicts.extend(found)
        part.clear()

    for pair in pairs:
        if part and (len(part) == _BATCH or part[-1].image.shape != pair.image.shape):
            judge()
        part.append(pair)
    if part:
        judge()
    return planted, verdicts


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


def calibration_error(pairs: NDArray[np.float64]) -> float | None:
    """Of (said, true) pairs: how far what is said lies from what is true on average, a mean over bins of equal numbers
    of pairs in the order of what is said. None without pairs."""
    if not len(pairs):
        return None
    bins = np.array_split(pairs[np.argsort(pairs[:, 0], kind="stable")], min(_BINS, len(pairs)))
    return float(sum(len(part) * abs(part[:, 0].mean() - part[:, 1].mean()) for part in bins) / len(pairs))


def _by_skin(planted: Sequence[Planted], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The rates by group of skin types, of the pairs where they are known."""
    groups = {
        name: [i for i, pair in enumerate(planted) if pair.skin_type in types] for name, types in SKIN_GROUPS.items()
    }
    return {
        name: _rates([planted[i] for i in part], [verdicts[i] for i in part]) for name, part in groups.items() if part
    }


def _reasons(verdicts: Sequence[Verdict]) -> dict[str, int]:
    named = [verdict[1] for verdict in verdicts if verdict[1] is not None]
    return {reason: named.count(reason) for reason in sorted(set(named))}


def agreement(pairs: NDArray[np.float64]) -> dict[str, Any]:
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
