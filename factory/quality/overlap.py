"""How well two masks agree. Masks are bool, (H, W) or a batch (N, H, W)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from factory.images import Mask

Scores = NDArray[np.float64]


def iou(a: Mask, b: Mask) -> Any:
    """Intersection over union: a float for (H, W), an array (N,) for (N, H, W). Two empty masks agree (1.0)."""
    _same_shape(a, b)
    both, either = _area(a & b), _area(a | b)
    return _scalar(np.where(either == 0, 1.0, both / np.maximum(either, 1)))


def dice(a: Mask, b: Mask) -> Any:
    """Twice the intersection over the sum of the areas, shaped as `iou`. Two empty masks agree (1.0)."""
    _same_shape(a, b)
    both, total = _area(a & b), _area(a) + _area(b)
    return _scalar(np.where(total == 0, 1.0, 2 * both / np.maximum(total, 1)))


def agreement(chance: NDArray[np.float32], masks: Mask) -> Scores:
    """How masks (N, H, W) agree with lesions that were found with a probability of `chance` (N, H, W) at each pixel:
    (N, 5), from 0 to 1 each. Their IoU with what is likelier than not; the IoU that is to be expected by the chances,
    and that of what is likelier than not itself, which says how sure it is; which share of a mask was found; and which
    share of what was found it covers."""
    found = chance > 0.5
    _same_shape(masks, found)
    both = _area(masks & found)
    return np.stack([
        np.asarray(iou(masks, found)), _soft_iou(chance, masks), _soft_iou(chance, found),
        both / np.maximum(_area(masks), 1), both / np.maximum(_area(found), 1),
    ], axis=-1)  # fmt: skip


def _soft_iou(chance: NDArray[np.float32], masks: Mask) -> Scores:
    """The expected intersection over the expected union, if pixels were independent."""
    both = np.sum(chance, axis=(-2, -1), where=masks, dtype=np.float64)
    either = chance.sum(axis=(-2, -1), dtype=np.float64) + _area(masks) - both
    return np.asarray(both / np.maximum(either, 1e-9))


def hausdorff95(a: Mask, b: Mask) -> float:
    """The 95th percentile of the distances between two boundaries, both ways, in pixels, for (H, W).

    Zero for two empty masks, the image's diagonal when one is empty.
    """
    _same_shape(a, b)
    if not a.any() or not b.any():
        return 0.0 if a.any() == b.any() else float(np.hypot(*a.shape))
    return float(np.percentile(np.concatenate(_boundary_distances(a, b)), 95))


def boundary_f1(a: Mask, b: Mask, tolerance_px: float = 2.0) -> float:
    """F1 of the boundary pixels of two masks (H, W) that lie within `tolerance_px` of the other boundary.

    Unlike IoU it does not punish small lesions for being small. Csurka et al. 2013, BMVC.
    """
    _same_shape(a, b)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    from_a, from_b = _boundary_distances(a, b)
    precision, recall = float((from_a <= tolerance_px).mean()), float((from_b <= tolerance_px).mean())
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _boundary_distances(a: Mask, b: Mask) -> tuple[Scores, Scores]:
    """Distances of a's boundary pixels to b's boundary, and the reverse."""
    edge_a, edge_b = _boundary(a), _boundary(b)
    to_a, to_b = ndimage.distance_transform_edt(~edge_a), ndimage.distance_transform_edt(~edge_b)
    return to_b[edge_a], to_a[edge_b]


def _boundary(mask: Mask) -> Mask:
    """Pixels of the mask that touch its outside; the image's border counts as outside."""
    return np.asarray(mask & ~ndimage.binary_erosion(mask, border_value=0))


def _area(mask: Mask) -> NDArray[np.int64]:
    return np.asarray(np.count_nonzero(mask, axis=(-2, -1)))


def _scalar(values: NDArray[Any]) -> Any:
    return float(values) if values.ndim == 0 else values


def _same_shape(a: Mask, b: Mask) -> None:
    if a.shape != b.shape:
        raise ValueError(f"masks must be of the same shape, got {a.shape} and {b.shape}; resize one to the other.")
    if a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {a.dtype} and {b.dtype}; threshold them first.")
