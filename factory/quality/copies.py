"""Copies of one photograph, found by what survives re-encoding, resizing, flips, crops and mild changes of colour.

`keys_of` describes an image by two short vectors: the lowest frequencies of its whole frame, and of a frame set by its
lesion, which a crop does not move. Flips and quarter turns only change signs and places of such coefficients, so one
canonical form stands for all eight. `candidates` finds close keys with a k-d tree; `same_photograph` then lays two
images over each other and compares their detail, which no two photographs of even one lesion share.

Frequencies as in pHash (Zauner 2010), but as real numbers: nothing is lost to rounding, and closeness can be searched.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from factory.images import RGB, Mask
from factory.quality.attributes import estimate_mask

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

SIDE = 32  # a frame is reduced to so many pixels before its frequencies are taken
LUMA, CHROMA = 7, 3  # the lowest frequencies kept, per axis
DIM = LUMA**2 - 1 + 2 * (CHROMA**2 - 1)
FRAME_RADII = 1.3  # half side of the lesion's frame, in radii of the disc of its area
TREE_DIMS = 12


def _order(count: int) -> list[tuple[int, int]]:
    """Frequencies below `count` per axis but (0, 0), lowest first; (u, v) and (v, u) are neighbours."""
    pairs = [(u, v) for u in range(count) for v in range(count) if u or v]
    return sorted(pairs, key=lambda uv: (max(uv), sum(uv), min(uv), uv))


_LUMA, _CHROMA = _order(LUMA), _order(CHROMA)
_UV = np.array(_LUMA + _CHROMA * 2)  # (DIM, 2) the frequency of each coefficient
_TRANSPOSED = np.array(
    [_LUMA.index((v, u)) for u, v in _LUMA]
    + [len(_LUMA) + k * len(_CHROMA) + _CHROMA.index((v, u)) for k in range(2) for u, v in _CHROMA]
)
_FLIP_V, _FLIP_H = (np.where(_UV[:, axis] % 2, -1.0, 1.0).astype(np.float32) for axis in (0, 1))
# The 8 symmetries of a square, as (take transposed?, signs): row k turns coefficients into those of the k-th image.
_SYMMETRIES = [(t, v, h) for t in (False, True) for v in (False, True) for h in (False, True)]


def keys_of(rgb: RGB, mask: Mask | None = None) -> Floats:
    """The two keys of an image (H, W, 3), (2, DIM): of its whole frame, and of its lesion's frame.

    mask: the estimated lesion, if it is known already; a published mask must not be given, since a copy may lack it.
    """
    lab = cv2.cvtColor(np.ascontiguousarray(rgb).astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
    found = estimate_mask(rgb) if mask is None else mask
    return np.stack([_coefficients(_reduced(lab)), _coefficients(_window(lab, lesion_frame(found)))])


def lesion_frame(mask: Mask) -> tuple[float, float, float]:
    """Centre x, centre y and half side, in pixels, of the square set by a lesion; of the image where there is none."""
    height, width = mask.shape
    area = float(mask.sum())
    if area < 12:
        return width / 2, height / 2, min(width, height) / 2
    moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
    x, y = moments["m10"] / area + 0.5, moments["m01"] / area + 0.5
    return x, y, FRAME_RADII * float(np.sqrt(area / np.pi))


def _reduced(lab: Floats) -> Floats:
    return np.asarray(cv2.resize(lab, (SIDE, SIDE), interpolation=cv2.INTER_AREA), dtype=np.float32)


def _window(lab: Floats, frame: tuple[float, float, float], side: int = SIDE) -> Floats:
    """A square of the image at side x side; what lies beyond the edge repeats it."""
    x, y, half = frame
    scale = 2 * half / side
    if scale > 1:
        lab = cv2.GaussianBlur(lab, (0, 0), 0.5 * scale)
    matrix = np.array([[scale, 0, x - half + 0.5 * scale - 0.5], [0, scale, y - half + 0.5 * scale - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(lab, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE))


def _coefficients(window: Floats) -> Floats:
    """(DIM,): low frequencies of lightness and of both chromas, in units of the lightness's deviation."""
    spectra = [cv2.dct(np.ascontiguousarray(window[..., k])) for k in range(3)]
    values = [spectra[0][u, v] for u, v in _LUMA] + [spectra[k][u, v] for k in (1, 2) for u, v in _CHROMA]
    found = np.array(values, np.float32)
    return found / max(float(np.linalg.norm(found)), 1e-6)


def turned(keys: Floats, symmetry: int) -> Floats:
    """Keys (..., DIM) of the same images under one of the 8 symmetries of a square."""
    transposed, flip_v, flip_h = _SYMMETRIES[symmetry]
    found = keys[..., _TRANSPOSED] if transposed else keys
    if flip_v:
        found = found * _FLIP_V
    return found * _FLIP_H if flip_h else found


def canonical(keys: Floats) -> tuple[Floats, Indices]:
    """Each key (N, DIM) in the one of its 8 forms that all its flips and turns share, and which one that is (N,)."""
    gaps = np.stack([_gap(turned(keys, k)) for k in range(8)])  # (8, N)
    best = gaps.argmin(axis=0)
    found = keys.copy()
    for k in range(1, 8):
        found[best == k] = turned(keys[best == k], k)
    return found, best.astype(np.int64)


_C01, _C10 = _LUMA.index((0, 1)), _LUMA.index((1, 0))


def _gap(keys: Floats) -> Floats:
    """How far keys (N, DIM) are from canonical form, (N,): 0 there."""
    x, y = keys[:, _C01], keys[:, _C10]
    return np.asarray(np.maximum.reduce([-x, -y, y - x, np.zeros_like(x)]))


class Candidates(NamedTuple):
    """Pairs of rows, each once with a < b, the symmetry that turns b's image into a's, and the frame that found it."""

    a: Indices
    b: Indices
    symmetry: Indices
    frame: Indices


# A canonical form is ambiguous where it was decided by less than this; such keys are looked up in each form they may have.
_AMBIGUOUS = 0.08
TREE_RADIUS, KEY_RADIUS = 0.16, 0.24  # of unit vectors; see benchmarks/copies.py for what these find and let by
_NEIGHBOURS = 8  # per lookup; larger families of copies are joined through each other
_CHUNK = 65_536


def candidates(keys: Floats) -> Candidates:
    """Pairs of images whose keys (N, 2, DIM) are close in one of their frames; `same_photograph` decides."""
    found = [pair for frame in (0, 1) for pair in _close(keys[:, frame], frame)]
    if not found:
        return Candidates(*(np.zeros(0, np.int64) for _ in range(4)))
    a, b, symmetry, frame = (np.concatenate(column) for column in zip(*found, strict=True))
    swapped = a > b
    inverse = _INVERSE[symmetry]
    a, b, symmetry = np.where(swapped, b, a), np.where(swapped, a, b), np.where(swapped, inverse, symmetry)
    _, first = np.unique(np.stack([a, b, symmetry, frame]), axis=1, return_index=True)
    return Candidates(a[first], b[first], symmetry[first], frame[first])


def _close(keys: Floats, frame: int) -> list[tuple[Indices, Indices, Indices, Indices]]:
    """(a, b, symmetry, frame) of lookups of every key, in each of its likely forms, among the canonical ones."""
    base, form = canonical(keys)
    tree = cKDTree(base[:, :TREE_DIMS])
    found = []
    for k in range(8):
        looked_up = turned(keys, k)
        rows = np.flatnonzero(_gap(looked_up) < _AMBIGUOUS)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            _, near = tree.query(
                looked_up[part, :TREE_DIMS], k=_NEIGHBOURS, distance_upper_bound=TREE_RADIUS, workers=-1
            )
            i, j = np.nonzero((near < len(keys)) & (near != part[:, None]))
            b, a = part[i], near[i, j]
            closeness = np.linalg.norm(looked_up[b] - base[a], axis=1)
            b, a = b[closeness < KEY_RADIUS], a[closeness < KEY_RADIUS]
            # b under k looks like a under its own form, so b under k and then back from that form looks like a.
            found.append((a, b, _PRODUCT[k, _INVERSE[form[a]]], np.full(len(a), frame)))
    return found


def _apply(image: NDArray[np.generic], symmetry: int) -> NDArray[np.generic]:
    """An image (H, W, ...) under one of the 8 symmetries."""
    transposed, flip_v, flip_h = _SYMMETRIES[symmetry]
    image = image.swapaxes(0, 1) if transposed else image
    image = image[::-1] if flip_v else image
    return image[:, ::-1] if flip_h else image


def _products() -> Indices:
    """(8, 8): the symmetry that is k and then l."""
    probe = np.arange(9).reshape(3, 3)
    forms = {_apply(probe, k).tobytes(): k for k in range(8)}
    return np.array([[forms[_apply(_apply(probe, k), l).tobytes()] for l in range(8)] for k in range(8)])


_PRODUCT = _products()
_INVERSE = np.array([int(np.flatnonzero(_PRODUCT[k] == 0)[0]) for k in range(8)])

_DETAIL_SIDE, _DETAIL_SIGMA = 64, 4.0
_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)


def likeness(a: RGB, b: RGB, symmetry: int, frame: int) -> float:
    """How far two images agree in detail once b is turned by `symmetry` and laid over a: 1 the same, 0 no relation.

    They are aligned by an affine map (ECC, Evangelidis and Psarakis 2008) and compared by the correlation of what a
    Gaussian of 1/16 of the frame leaves.
    """
    first = _grey(a, frame)
    second = _grey(np.ascontiguousarray(_apply(b, symmetry)).astype(np.uint8), frame)
    warp = np.eye(2, 3, dtype=np.float32)
    try:
        _, warp = cv2.findTransformECC(first, second, warp, cv2.MOTION_AFFINE, _STEPS, None, 5)
    except cv2.error:  # it has no solution where one image is flat, or they share nothing
        return 0.0
    size, flags = (_DETAIL_SIDE, _DETAIL_SIDE), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    seen = cv2.warpAffine(np.ones_like(second), warp, size, flags=flags) > 0.99
    return _correlation(_detail(first)[seen], _detail(cv2.warpAffine(second, warp, size, flags=flags))[seen])


def _grey(rgb: RGB, frame: int) -> Floats:
    lightness = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY).astype(np.float32)
    if frame == 0:
        return np.asarray(cv2.resize(lightness, (_DETAIL_SIDE, _DETAIL_SIDE), interpolation=cv2.INTER_AREA))
    return _window(lightness, lesion_frame(estimate_mask(rgb)), _DETAIL_SIDE)


def _detail(grey: Floats) -> Floats:
    return np.asarray(grey - cv2.GaussianBlur(grey, (0, 0), _DETAIL_SIGMA))


def _correlation(a: Floats, b: Floats) -> float:
    if a.size < _DETAIL_SIDE**2 // 4:
        return 0.0
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 1e-6 else 0.0
