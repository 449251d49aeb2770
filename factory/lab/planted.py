"""How well a gate finds faults that were planted in masks, on pictures whose true mask is known.

A pair is good if the mask that is shown has an IoU above 0.7 with the true one, whatever was done to it: a mask shifted
by a pixel is still a good mask. 65 of 100 pairs are good and 35 are bad, with strengths of every kind of fault on both
sides, so that no kind gives itself away. Pairs within a stated margin of 0.7 are not drawn, since on the line either
answer is right. Phantoms are of renderer settings that training did not use (`phantom.HELD_OUT`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from factory import phantom, records
from factory.lab.intervals import mean_of_two, proportion
from factory.quality.overlap import iou
from factory.quality.thresholds import fit_thresholds

Mask = NDArray[np.bool_]
Verdict = tuple[str, str | None, float | None]  # outcome, reason, the gate's own IoU
Validate = Callable[[NDArray[np.uint8], NDArray[np.bool_]], Sequence[Verdict]]


class Share(NamedTuple):
    """Of all pairs: so many with this fault that are good, and so many that are bad."""

    good: float
    bad: float


GOOD_IOU, MARGIN, MAX_MARGIN = 0.7, 0.05, 0.25
MIX: dict[str, Share] = {
    "none": Share(0.35, 0.0), "shifted": Share(0.1, 0.08), "scaled": Share(0.1, 0.08), "torn": Share(0.1, 0.08),
    "swapped": Share(0.0, 0.11),
}  # fmt: skip
SKIN_GROUPS = {"I-II": (1, 2), "III-IV": (3, 4), "V-VI": (5, 6)}
_BATCH = 64
_BINS = 10  # of the calibration error, of equal numbers of pairs


@dataclass(frozen=True)
class Planted:
    """One pair for the gate: a picture, the mask it is shown with, and what is true of it."""

    image: NDArray[np.uint8]
    mask: Mask
    fault: str
    true_iou: float
    area: float  # of the true lesion, as a share of the image
    skin_type: int | None = None  # Fitzpatrick's, 1 to 6

    @property
    def good(self) -> bool:
        return self.true_iou > GOOD_IOU


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
    found = {fault: _by_fault(fault, planted, verdicts) for fault in ("none", *_FAULTS)}
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


def cases_of(mix: Mapping[str, Share], seed: int, count: int) -> list[tuple[str, bool]]:
    """Fault of each pair and whether it is to be good: the mix's shares as nearly as whole numbers allow (largest
    remainder), shuffled."""
    shares = {(name, good): share[not good] for name, share in mix.items() for good in (True, False)}
    unknown = sorted(set(mix) - {"none", *_FAULTS})
    if unknown or not mix or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(
            f"mix must give shares to some of none, {', '.join(_FAULTS)}, got {dict(mix)}; name each with its share."
        )
    if shares.get(("none", False), 0) > 0:
        raise ValueError(f"mix must have no bad pairs without a fault, got {mix['none'].bad}; give them to a fault.")
    exact = {case: count * share / sum(shares.values()) for case, share in shares.items()}
    whole = {case: int(number) for case, number in exact.items()}
    rest = sorted(exact, key=lambda case: whole[case] - exact[case])[: count - sum(whole.values())]
    cases = [case for case in exact for _ in range(whole[case] + (case in rest))]
    return [cases[i] for i in np.random.default_rng([seed, 3]).permutation(count)]


def plant(
    seed: int, index: int, fault: str, good: bool, size: int, margin: float,
    settings: phantom.PhantomSettings = phantom.HELD_OUT,
) -> Planted:  # fmt: skip
    """Phantom `index` with a fault in its mask, on the asked side of the line."""
    rng = np.random.default_rng([seed, index, 4])
    drawn = phantom.draw(seed, index, size, settings=settings)
    true = np.asarray(drawn.mask, dtype=bool)
    mask = spoilt(rng, true, fault, good, lambda: _another(rng, size, seed, settings), margin)
    return Planted(drawn.image, mask, fault, float(iou(mask, true)), float(true.mean()), int(drawn.skin_type))


def plant_real(
    seed: int, pairs: Sequence[tuple[NDArray[np.uint8], Mask]], mix: Mapping[str, Share] = MIX, margin: float = MARGIN
) -> Iterator[Planted]:
    """The same faults in the masks of real pictures, (H, W, 3) and (H, W); a swapped mask is another picture's."""
    for index, ((image, true), (fault, good)) in enumerate(zip(pairs, cases_of(mix, seed, len(pairs)), strict=True)):
        rng = np.random.default_rng([seed, index, 4])

        def other(rng: np.random.Generator = rng, true: Mask = true) -> Mask:
            found = pairs[int(rng.integers(len(pairs)))][1]
            return _resized(found, true.shape)

        mask = spoilt(rng, true, fault, good, other, margin)
        yield Planted(image, mask, fault, float(iou(mask, true)), float(true.mean()))


TRIES = 1000


def spoilt(
    rng: np.random.Generator, true: Mask, fault: str, good: bool, other: Callable[[], Mask], margin: float
) -> Mask:
    """The true mask with a fault of random strength, drawn again until it lies on the asked side of the line and not
    near it. Of a lesion that no strength brings there (a few pixels know few overlaps) the nearest found is taken."""
    if fault == "none":
        return true
    nearest, distance = true, np.inf
    for _ in range(TRIES):
        mask = _FAULTS[fault](rng, true, other)
        past = (float(iou(mask, true)) - GOOD_IOU) * (1 if good else -1)
        if not mask.any():
            continue
        if past >= margin:
            return mask
        if margin - past < distance:
            nearest, distance = mask, margin - past
    return nearest


def _shifted(rng: np.random.Generator, true: Mask, other: Callable[[], Mask]) -> Mask:
    """Moved by up to 0.9 lesion radii; what leaves the image is lost."""
    radius, angle = np.sqrt(true.sum() / np.pi), rng.uniform(0, 2 * np.pi)
    step = rng.uniform(0.05, 0.9) * radius * np.array([np.cos(angle), np.sin(angle)])
    return _warped(true, np.array([[1, 0, step[0]], [0, 1, step[1]]]))


def _scaled(rng: np.random.Generator, true: Mask, other: Callable[[], Mask]) -> Mask:
    """Shrunk or grown about its centroid, by a factor of up to 1.7."""
    factor = np.exp(rng.choice([-1, 1]) * rng.uniform(0.05, np.log(1.7)))
    y, x = (float(axis.mean()) for axis in np.nonzero(true))
    return _warped(true, np.array([[factor, 0, x * (1 - factor)], [0, factor, y * (1 - factor)]]))


def _swapped(rng: np.random.Generator, true: Mask, other: Callable[[], Mask]) -> Mask:
    """The mask of another lesion, as it lies."""
    return other()


def _another(rng: np.random.Generator, side: int, seed: int, settings: phantom.PhantomSettings) -> Mask:
    other = phantom.draw_attributes(seed + 1, int(rng.integers(2**31)), settings=settings)
    points = (other.contour * other.radius + np.array(other.centre)) * side
    canvas = np.zeros((side, side), np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas.astype(bool)


def _torn(rng: np.random.Generator, true: Mask, other: Callable[[], Mask]) -> Mask:
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


_FAULTS: dict[str, Callable[[np.random.Generator, Mask, Callable[[], Mask]], Mask]] = {
    "shifted": _shifted, "scaled": _scaled, "swapped": _swapped, "torn": _torn,
}  # fmt: skip


def _warped(true: Mask, matrix: NDArray[np.float64]) -> Mask:
    height, width = true.shape
    return np.asarray(cv2.warpAffine(true.astype(np.float32), matrix, (width, height), flags=cv2.INTER_LINEAR) > 0.5)


def _resized(mask: Mask, shape: tuple[int, ...]) -> Mask:
    return np.asarray(cv2.resize(mask.astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST), bool)


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
