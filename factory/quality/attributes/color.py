"""The colours of a lesion: which of the six dermoscopic colours are there, and how unlike its mirrored halves are.

Colours are seen at 128 px of the image's shorter side, so that what is said of a lesion does not depend on the size
it was stored at, under hair that has been taken away, and relative to the bare skin around.

A phantom's number of colours is followed only loosely (Spearman 0.65 to 0.68, against 0.97 and more for shape): each
colour is called rightly on 81 to 85% of images, all six on about a third. A share of its own for each colour, or an
opacity inferred per image, gave at most two points more; a forest fitted on 2,080 phantoms' colour histograms 0.72 and
39%. Why is not settled: opaque pigment in even light without artefacts is told no better by these references, and with
shares fitted on those very images 0.79 and 45%.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from factory import taxonomy
from factory.images import RGB, Mask, resized
from factory.quality.attributes.shape import MIN_PIXELS, Floats
from factory.quality.skin_tone import hair_mask, skin_lab, to_lab, without_hair

COLOR_SHARE = 0.06  # a colour is there when it covers this share of the lesion
_SIDE = 128  # px of the shorter side that colours are seen at
_BLUR = 1.0  # px of the view
_TYPICAL_SKIN = np.asarray([65.0, 10.0, 15.0])  # where a lesion fills the view

Channel = tuple[float, float]
# What a dermoscopic colour looks like on this skin, in Lab: (share of the skin's value, offset) for L, a and b. The
# colours' clinical definitions are relative too: what is white is paler than the skin around it. The numbers are a
# least-squares fit to phantoms of one colour each; the last rows were added from real lesions, whose dark brown was
# else called red on pink skin, and black where it is deep.
_REFERENCES: tuple[tuple[str, Channel, Channel, Channel], ...] = (
    ("light-brown", (0.85, -1.2), (0.82, 8.0), (0.85, 15.5)),
    ("dark-brown", (0.67, -1.6), (0.64, 10.1), (0.67, 14.2)),
    ("black", (0.51, -0.3), (0.32, 5.5), (0.55, 1.3)),
    ("blue-gray", (0.75, -1.5), (0.54, 2.0), (0.75, -10.1)),
    ("red", (0.84, -1.0), (0.89, 12.6), (0.88, 9.7)),
    ("white", (0.99, 5.7), (0.77, 1.0), (0.88, -6.3)),
    # Deeper than a phantom paints them.
    ("dark-brown", (0.55, 0.0), (1.0, 18.0), (1.0, 9.0)),
    ("dark-brown", (0.38, 0.0), (1.0, 2.0), (1.0, 0.0)),
    ("black", (0.15, 0.0), (0.1, 1.0), (0.1, 1.0)),
    ("red", (0.78, 0.0), (1.0, 24.0), (1.0, 1.0)),
)
_WEIGHTS = np.asarray([0.5, 1.0, 1.0])  # lightness varies most within one colour, so it counts half


class View(NamedTuple):
    """A lesion as its colours are seen: smoothed Lab (H, W, 3) without hair, its mask (H, W), the skin's Lab (3,)."""

    lab: Floats
    mask: Mask
    skin: Floats


def view(rgb: RGB, mask: Mask) -> View:
    """What colours are read from; `mask` (H, W) must be that of `rgb` (H, W, 3)."""
    height, width = mask.shape
    scale = min(1.0, _SIDE / min(height, width))
    size = (round(width * scale), round(height * scale))
    small, shrunk = resized(rgb, *size), resized(mask, *size)
    if shrunk.sum() < MIN_PIXELS:  # too small to be shrunk
        small, shrunk = rgb, mask
    hair = hair_mask(small)
    skin = skin_lab(small, shrunk, hair=hair)
    lab = cv2.GaussianBlur(to_lab(without_hair(small, hair)), (0, 0), _BLUR * max(0.7, min(shrunk.shape) / _SIDE))
    return View(lab, shrunk, _TYPICAL_SKIN if skin is None else skin)


def colors(rgb: RGB, mask: Mask) -> tuple[str, ...]:
    """The dermoscopic colours that cover at least `COLOR_SHARE` of the lesion, in the vocabulary's order.

    A pixel has the nearest reference colour, relative to the bare skin around. At least one is returned.
    """
    return present(shares_of(view(rgb, mask)))


def color_shares(rgb: RGB, mask: Mask) -> dict[str, float]:
    """The share of the lesion that has each dermoscopic colour; they sum to 1."""
    return shares_of(view(rgb, mask))


def present(shares: dict[str, float]) -> tuple[str, ...]:
    """The colours whose share is large enough, or the largest alone, in the vocabulary's order."""
    found = tuple(name for name in taxonomy.COLORS if shares[name] >= COLOR_SHARE)
    return found or (max(shares, key=lambda name: shares[name]),)


def shares_of(seen: View) -> dict[str, float]:
    """The share of the lesion's core that is nearest to each reference colour; they sum to 1."""
    base = seen.skin
    table = np.asarray([[share * base[k] + offset for k, (share, offset) in enumerate(row[1:])] for row in _REFERENCES])
    table = (table * _WEIGHTS).astype(np.float32)
    inside = seen.lab[_core(seen.mask)] * _WEIGHTS.astype(np.float32)
    # |p - t|^2 less |p|^2, which is the same for every reference.
    nearest = ((table**2).sum(axis=1) - 2 * (inside @ table.T)).argmin(axis=1)  # (P, R) -> (P,)
    shares = dict.fromkeys(taxonomy.COLORS, 0.0)
    for row, count in zip(_REFERENCES, np.bincount(nearest, minlength=len(table)), strict=True):
        shares[row[0]] += float(count) / len(inside)
    return shares


def color_asymmetry(seen: View) -> float:
    """Mean colour difference (Delta E 76, Lab units) between a lesion and its mirror image, over both principal axes.

    Over the pixels whose mirror image is in the lesion too, so that the shape's own asymmetry does not count; 0 for
    a lesion of one colour or of mirrored colours. About 2 is the least that an eye tells apart.
    """
    core = _core(seen.mask).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(core)
    part = np.ascontiguousarray(seen.lab[top : top + height, left : left + width])
    core = np.ascontiguousarray(core[top : top + height, left : left + width])
    m = cv2.moments(core, binaryImage=True)
    cx, cy = m["m10"] / m["m00"], m["m01"] / m["m00"]
    angle = 0.5 * np.arctan2(2 * m["mu11"], m["mu20"] - m["mu02"])
    found = [_mirrored_difference(part, core, cx, cy, a) for a in (angle, angle + np.pi / 2)]
    return float(np.mean(found))


def _mirrored_difference(lab: Floats, core: NDArray[Any], cx: float, cy: float, angle: float) -> float:
    c, s = np.cos(2 * angle), np.sin(2 * angle)
    flip = np.asarray([[c, s, cx - c * cx - s * cy], [s, -c, cy - s * cx + c * cy]])
    size = (lab.shape[1], lab.shape[0])
    other = cv2.warpAffine(lab, flip, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    both = (core & cv2.warpAffine(core, flip, size, flags=cv2.INTER_NEAREST)) > 0
    if not both.any():
        return 0.0
    away = lab[both] - other[both]
    return float(np.sqrt((away**2).sum(axis=1)).mean())


def _core(mask: Mask) -> Mask:
    """The mask without its blurred edge, or the mask where nothing would be left."""
    core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return np.asarray(core if core.sum() >= MIN_PIXELS else mask)
