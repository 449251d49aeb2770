"""The gate's policy: scores in, one verdict out. Total and ordered, so a rejected sample has exactly one reason.

    non_finite          a score is NaN or infinite
    empty_mask          score_area < min_area
    full_mask           score_area > max_area
    low_iou             the IoU (`gate.calibrated` says which) is below the threshold of that lesion's size
    far_boundary        score_hausdorff_px > max_hausdorff_px
    implausible_shape   score_solidity < min_solidity, score_holes > max_holes or score_shape > max_shape_distance
    changed_background  score_background_psnr < min_background_psnr
    faint_edge          score_edge_contrast < min_edge_contrast

A rule whose score was not computed or whose bound is null is skipped, and of an early estimate the last four are not
asked. The last two need pixels, and are asked of what was decoded. The IoU threshold is that of the lesion's stratum in
`theta_by_area`, if it was fitted; else `min_iou`, or what a disk of the lesion's area keeps when it is shifted by
`shift_tolerance` of the image's side, if that is less: a fixed threshold on a coarse raster rejects small lesions by
geometry alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import cv2
import numpy as np

from factory.images import Mask
from factory.recipe import GateSection
from factory.records import ACCEPTED, REJECTED

Stage = Literal["final", "checkpoint"]
REASONS: tuple[str, ...] = (
    "non_finite", "empty_mask", "full_mask", "low_iou", "far_boundary", "implausible_shape", "changed_background",
    "faint_edge",
)  # fmt: skip


def decide(scores: Mapping[str, float | None], section: GateSection, stage: Stage = "final") -> tuple[str, str | None]:
    """The outcome and, when rejected, its one reason.

    `scores` holds `iou` and the columns of `records.SCORES`; missing and None are the same. At a checkpoint the
    overlap is `score_latent_iou` and may be `checkpoint_slack` below the threshold (above it, where that is negative),
    the area may be `checkpoint_area_slack` below the least one, and boundary and shape are not judged.
    """
    known = {name: value for name, value in scores.items() if value is not None}
    if not all(math.isfinite(value) for value in known.values()):
        return REJECTED, "non_finite"
    area, early = known.get("score_area"), stage == "checkpoint"
    least_area = section.min_area * (1 - section.checkpoint_area_slack if early else 1)
    if area is not None and area < least_area:
        return REJECTED, "empty_mask"
    if area is not None and area > section.max_area:
        return REJECTED, "full_mask"
    overlap = known.get("score_latent_iou" if early else "iou")
    if not early and not section.calibrated:  # whatever the sample was judged by when it was made
        overlap = known.get("score_overlap", overlap)
    slack = section.checkpoint_slack if early else 0.0
    if overlap is not None and overlap < iou_threshold(area, section) - slack:
        return REJECTED, "low_iou"
    reason = None if early else next((name for name, fails in _of_the_finished(known, section) if fails), None)
    return (ACCEPTED, None) if reason is None else (REJECTED, reason)


def _of_the_finished(known: Mapping[str, float], section: GateSection) -> Iterator[tuple[str, bool]]:
    """The rules for finished samples alone, in their order, and whether each fails."""

    def above(score: str, bound: float | None) -> bool:
        return bound is not None and known.get(score, 0.0) > bound

    def below(score: str, bound: float | None) -> bool:
        return bound is not None and known.get(score, math.inf) < bound

    yield "far_boundary", above("score_hausdorff_px", section.max_hausdorff_px)
    yield "implausible_shape", below("score_solidity", section.min_solidity)
    yield "implausible_shape", above("score_holes", section.max_holes)
    yield "implausible_shape", above("score_shape", section.max_shape_distance)
    yield "changed_background", below("score_background_psnr", section.min_background_psnr)
    yield "faint_edge", below("score_edge_contrast", section.min_edge_contrast)


def iou_threshold(area: float | None, section: GateSection) -> float:
    """The least IoU for a lesion that covers `area` (0..1) of a square image."""
    if area is not None and section.theta_by_area:
        return next((theta for most, theta in section.theta_by_area if area <= most), section.theta_by_area[-1][1])
    if area is None or section.shift_tolerance == 0:
        return section.min_iou
    return min(section.min_iou, shifted_disk_iou(math.sqrt(area / math.pi), section.shift_tolerance))


def shifted_disk_iou(radius: float, shift: float) -> float:
    """IoU of a disk with itself shifted by `shift`, in the same unit as `radius`."""
    if radius <= 0 or shift >= 2 * radius:
        return 0.0
    half = shift / (2 * radius)
    both = 2 * radius**2 * math.acos(half) - shift / 2 * math.sqrt(4 * radius**2 - shift**2)
    return both / (2 * math.pi * radius**2 - both)


def shape_scores(mask: Mask) -> dict[str, float]:
    """Facts of a mask (H, W): `score_area` (share of the image), `score_solidity`, `score_components`, `score_holes`.

    Solidity is the area over the area of the convex hull of all pieces, so a torn or scattered mask has a low one;
    of an empty mask it is 0. Components are 8-connected. Holes are a share of what the outlines enclose.
    """
    pixels = mask.astype(np.uint8)
    area = int(pixels.sum())
    if area == 0:
        return {"score_area": 0.0, "score_solidity": 0.0, "score_components": 0.0, "score_holes": 0.0}
    hull = cv2.convexHull(np.argwhere(mask)[:, ::-1].astype(np.int32))
    filled = cv2.fillConvexPoly(np.zeros_like(pixels), hull, 1)
    outlines, _ = cv2.findContours(pixels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    enclosed = int(cv2.drawContours(np.zeros_like(pixels), outlines, -1, 1, cv2.FILLED).sum())
    components = cv2.connectedComponents(pixels, connectivity=8)[0] - 1
    return {
        "score_area": area / mask.size,
        "score_solidity": min(1.0, area / int(filled.sum())),
        "score_components": float(components),
        "score_holes": 1 - area / enclosed,
    }
