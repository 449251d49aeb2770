"""How alike two images are in detail, once one is laid over the other.

A `Placement` says roughly where b lies on a. An affine map improves on it (ECC, Evangelidis and Psarakis 2008); then
what a narrow Gaussian leaves of both is correlated over all of the overlap, which no two photographs of even one
lesion share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from factory.quality.copies.frames import INVERSE, MATRICES, VIEW_SIDE, Grey
from factory.quality.skin_tone import from_corners

Floats = NDArray[Any]

_SIGMA = 3.0  # px; what a Gaussian of this width keeps is no detail
_LEAST_CONTRAST, _LEAST_TOLD = 1.0, 100  # grey levels, and places that have them
_MOST_STRETCH = 1.3  # by which the alignment may change what the frames said
_PATCH = 11  # px of the side of the places that are compared
_TUBE, _TUBE_EDGE = 48, 10  # grey levels of a vignette; px of its edge, which is left out
_MARGIN = 4  # px of the overlap's edge that do not count
_LEAST_OVERLAP = 0.2  # of the smaller image
_LEAST_ALIKE = 0.4  # the whole correlation below which no alignment is tried: 98% of right placements have more
# Copies are in place after a few steps; what is none uses all of them, for nothing.
_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 12, 1e-4)
_ECC_BLUR = 5  # px
_LOOK = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


class Placement(NamedTuple):
    """b's frame (3,) is a's frame (3,), as `Description.frames` has them, under one of the 8 symmetries."""

    frame_a: Floats
    frame_b: Floats
    symmetry: int


def likeness(a: Grey, b: Grey, placements: Iterable[Placement], enough: float = 1.0) -> float:
    """How far two images, as `view` shows them (H, W), agree in detail where they overlap, at the best placement: 1 the
    same photograph, 0 no relation. Once a placement reaches `enough`, the rest are not tried."""
    best = 0.0
    for placement in placements:
        best = max(best, _at(a, b, placement))
        if best >= enough:
            break
    return best


def _at(a: Grey, b: Grey, placement: Placement) -> float:
    side_a = side_b = float(VIEW_SIDE)
    coarser = np.sqrt(abs(np.linalg.det(_between(a, b, placement, side_a, side_b)[:, :2])))
    # Both at one resolution, that of the one which shows more of the scene: else the other has detail that it lacks.
    side_a, side_b = (side_a, side_b / coarser) if coarser > 1 else (side_a * coarser, side_b)
    first, second = _sized(a, side_a), _sized(b, side_b)
    place = _between(a, b, placement, side_a, side_b)
    covered, laid = _seen(second, place, first), _laid(second, place, first)
    seen = covered > 0
    if seen.sum() < _LEAST_OVERLAP * min(first.size, second.size):
        return 0.0
    if _correlation(first[seen], laid[seen]) < _LEAST_ALIKE:
        return 0.0
    tubes = _vignette(first), _vignette(second)
    refined = _aligned(first, laid, covered, place)
    return max(_agreement(first, second, tubes, there) for there in (place, refined) if there is not None)


def _sized(grey: Grey, side: float) -> Floats:
    """(H, W) float32 with a short side of about `side` px."""
    return np.asarray(cv2.resize(grey.astype(np.float32), _size(grey, side), interpolation=cv2.INTER_AREA))


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / max(float(np.sqrt((a @ a) * (b @ b))), 1e-6))


def _size(grey: Grey, side: float) -> tuple[int, int]:
    """Width and height of an image whose short side is to be `side`."""
    grown = side / min(grey.shape)
    return max(1, round(grey.shape[1] * grown)), max(1, round(grey.shape[0] * grown))


def _between(a: Grey, b: Grey, placement: Placement, side_a: float, side_b: float) -> Floats:
    """(2, 3): from pixels of a to those of b, both at these short sides, if b's frame is a's under the symmetry."""
    frame_a, frame_b = placement.frame_a * side_a, placement.frame_b * side_b
    half_a, half_b = (
        np.full(2, frame[2]) if frame[2] > 0 else np.array(_size(grey, side)) / 2
        for frame, grey, side in ((frame_a, a, side_a), (frame_b, b, side_b))
    )
    turn = np.diag(half_b) @ MATRICES[INVERSE[placement.symmetry]] @ np.diag(1 / half_a)
    # Frames count from the edge of the first pixel, warps from its middle.
    shift = frame_b[:2] - 0.5 - turn @ (frame_a[:2] - 0.5)
    return np.concatenate([turn, shift[:, None]], axis=1)


def _laid(image: Floats, place: Floats, on: Floats) -> Floats:
    return np.asarray(cv2.warpAffine(image, place, on.shape[::-1], flags=_LOOK))


def _seen(image: Floats, place: Floats, on: Floats) -> NDArray[np.uint8]:
    """Where an image that is laid on another covers it."""
    return np.asarray(_laid(np.ones_like(image), place, on) > 0.99, dtype=np.uint8)


def _aligned(first: Floats, laid: Floats, seen: NDArray[np.uint8], place: Floats) -> Floats | None:
    """The place improved by ECC; None where it finds none, or one that the frames would not allow."""
    warp: Floats = np.eye(2, 3, dtype=np.float32)
    try:
        _, warp = cv2.findTransformECC(first, laid, warp, cv2.MOTION_AFFINE, _STEPS, seen, _ECC_BLUR)
    except cv2.error:  # it has no solution where one image is flat, or they share nothing
        return None
    stretch = np.linalg.svd(warp[:, :2], compute_uv=False)
    if stretch[0] > _MOST_STRETCH or stretch[1] < 1 / _MOST_STRETCH:
        return None
    return place @ np.vstack([warp, [0, 0, 1]])


def _agreement(first: Floats, second: Floats, tubes: tuple[Floats, Floats], place: Floats) -> float:
    """The median of the local correlations of two images' detail, wherever there is any. The edge of a vignette is
    left out: all photographs through one lens share it."""
    seen = _seen(second, place, first)
    edge = np.ones((2 * _MARGIN + 1,) * 2, np.uint8)
    inside = cv2.erode(seen, edge, borderType=cv2.BORDER_CONSTANT, borderValue=1) > 0
    if inside.sum() < _LEAST_OVERLAP * min(first.size, second.size) / 2:
        return 0.0
    inside &= (tubes[0] == 0) & (_laid(tubes[1], place, first) == 0)
    a, b = _detail(first), _detail(_laid(second, place, first))
    mean_a, mean_b = _local(a), _local(b)
    power_a, power_b = _local(a * a) - mean_a**2, _local(b * b) - mean_b**2
    contrast = np.sqrt(np.maximum(power_a * power_b, 0))
    correlation = ((_local(a * b) - mean_a * mean_b) / np.maximum(contrast, 1e-3))[inside]
    told = correlation[contrast[inside] > _LEAST_CONTRAST]
    return float(np.median(told)) if len(told) >= _LEAST_TOLD else 0.0


def _vignette(grey: Floats) -> Floats:
    """1 on the dark around the view and on its edge, 0 elsewhere."""
    return from_corners(grey < _TUBE, 2 * _TUBE_EDGE + 1).astype(np.float32)


def _detail(grey: Floats) -> Floats:
    return np.asarray(grey - cv2.GaussianBlur(grey, (0, 0), _SIGMA))


def _local(values: Floats) -> Floats:
    return np.asarray(cv2.blur(values, (_PATCH, _PATCH)))
