"""Faults planted in masks whose true shape is known: pairs of a picture and a mask, good ones and bad ones.

A pair is good if the mask that is shown has an IoU above 0.7 with the true one, whatever was done to it: a mask shifted
by a pixel is still a good mask. 65 of 100 pairs are good and 35 are bad, with strengths of every kind of fault on both
sides, so that no kind gives itself away. Pairs within a stated margin of 0.7 need not be drawn, since on the line
either answer is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from factory import phantom
from factory.quality.overlap import iou

Mask = NDArray[np.bool_]


class Share(NamedTuple):
    """Of all pairs: so many with this fault that are good, and so many that are bad."""

    good: float
    bad: float


GOOD_IOU, MARGIN, MAX_MARGIN = 0.7, 0.05, 0.25
MIX: dict[str, Share] = {
    "none": Share(0.35, 0.0), "shifted": Share(0.1, 0.08), "scaled": Share(0.1, 0.08), "torn": Share(0.1, 0.08),
    "swapped": Share(0.0, 0.11),
}  # fmt: skip


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


def cases_of(mix: Mapping[str, Share], seed: int, count: int) -> list[tuple[str, bool]]:
    """Fault of each pair and whether it is to be good: the mix's shares as nearly as whole numbers allow (largest
    remainder), shuffled."""
    shares = {(name, good): share[not good] for name, share in mix.items() for good in (True, False)}
    unknown = sorted(set(mix) - {"none", *FAULTS})
    if unknown or not mix or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(
            f"mix must give shares to some of none, {', '.join(FAULTS)}, got {dict(mix)}; name each with its share."
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
        mask = FAULTS[fault](rng, true, other)
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


FAULTS: dict[str, Callable[[np.random.Generator, Mask, Callable[[], Mask]], Mask]] = {
    "shifted": _shifted, "scaled": _scaled, "swapped": _swapped, "torn": _torn,
}  # fmt: skip


def _warped(true: Mask, matrix: NDArray[np.float64]) -> Mask:
    height, width = true.shape
    return np.asarray(cv2.warpAffine(true.astype(np.float32), matrix, (width, height), flags=cv2.INTER_LINEAR) > 0.5)


def _resized(mask: Mask, shape: tuple[int, ...]) -> Mask:
    return np.asarray(cv2.resize(mask.astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST), bool)
