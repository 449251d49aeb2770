"""Copies of one photograph, found by what survives re-encoding, resizing, flips, crops and mild changes of colour.

An image is described by a few square frames: its whole, and squares around its dark blobs, found where the Laplacian
of a Gaussian is extremal over place and size (Lindeberg 1998), which a crop leaves where they are. Each frame becomes a
key, its lowest frequencies. What of a key no flip or quarter turn changes goes into a k-d tree; pairs that are close
there and agree on how one image lies in the other are `candidates`. `likeness` then lays both images over each other
and compares their detail, which no two photographs of even one lesion share.

Low frequencies are what pHash takes too (Zauner 2010), there as bits. Letters: N images, F frames, D = DIM.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from factory.images import RGB
from factory.quality.skin_tone import to_lab

Floats = NDArray[Any]
Ints = NDArray[np.int64]

BLOBS = 6
FRAMES = 1 + BLOBS
SIDE = 32  # a frame is reduced to so many pixels before its frequencies are taken
LUMA, CHROMA = 7, 3  # the lowest frequencies kept, per axis
DIM = LUMA**2 - 1 + 2 * (CHROMA**2 - 1)

_BLOB_SIDE = 48  # blobs are looked for at this short side, in px
_SIGMAS = np.geomspace(0.035, 0.30, 9)  # of the short side
_FRAME_SIGMAS = 2.2  # half side of a blob's frame
_LEAST_BLOB = 0.5  # L* units of the scale-normalised Laplacian

# ------------------------------------------------------------------------------------------------------- frames


class Description(NamedTuple):
    """Frames (F, 3): centre x, centre y and half side in pixels, the whole image first, with 0 for its half side as it
    need not be square; and their keys (F, D). An image with few blobs has NaN for the rest."""

    frames: Floats
    keys: Floats


def describe(rgb: RGB) -> Description:
    """The frames of an image (H, W, 3) and their keys."""
    lab = to_lab(rgb)
    frames, keys = np.full((FRAMES, 3), np.nan, np.float32), np.full((FRAMES, DIM), np.nan, np.float32)
    frames[0] = lab.shape[1] / 2, lab.shape[0] / 2, 0
    keys[0] = _key(cv2.resize(lab, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
    for k, frame in enumerate(_blobs(lab[..., 0]), start=1):
        frames[k], keys[k] = frame, _key(_window(lab, frame, SIDE))
    return Description(frames, keys)


def _blobs(lightness: Floats) -> Floats:
    """Frames of the `BLOBS` strongest dark blobs, (K, 3), strongest first."""
    height, width = lightness.shape
    shrink = _BLOB_SIDE / min(height, width)
    size = (round(width * shrink), round(height * shrink))
    pad = _BLOB_SIDE // 2
    small = cv2.resize(lightness, size, interpolation=cv2.INTER_AREA)
    padded = cv2.copyMakeBorder(small, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    response = np.stack([_laplacian(padded, sigma * _BLOB_SIDE)[pad:-pad, pad:-pad] for sigma in _SIGMAS])  # (S, h, w)
    around = np.stack([cv2.dilate(layer, np.ones((3, 3), np.uint8)) for layer in response])
    inner = response[1:-1]
    peak = (inner >= around[1:-1]) & (inner >= around[:-2]) & (inner >= around[2:]) & (inner > _LEAST_BLOB)
    s, y, x = np.nonzero(peak)
    s += 1
    best = np.argsort(-response[s, y, x], kind="stable")[:BLOBS]
    found = [_refined(response, s[k], y[k], x[k]) for k in best]
    scale, y, x = np.array(found).reshape(-1, 3).T
    half = _FRAME_SIGMAS * _BLOB_SIDE * _SIGMAS[0] * (_SIGMAS[1] / _SIGMAS[0]) ** scale
    return np.stack([x + 0.5, y + 0.5, half], axis=1) / shrink


def _laplacian(image: Floats, sigma: float) -> Floats:
    """Scale-normalised: large where a dark blob of this size is."""
    blurred = cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(sigma**2 * cv2.Laplacian(blurred, cv2.CV_32F, ksize=1))


def _refined(response: Floats, s: int, y: int, x: int) -> tuple[float, float, float]:
    """The peak of a parabola through each axis's three values; at an edge the peak itself."""
    where = []
    for axis, place in enumerate((s, y, x)):
        line = response[:, y, x] if axis == 0 else response[s, :, x] if axis == 1 else response[s, y, :]
        offset = 0.0
        if 0 < place < len(line) - 1:
            below, at, above = (float(v) for v in line[place - 1 : place + 2])
            bend = below - 2 * at + above
            offset = float(np.clip(0.5 * (below - above) / bend, -0.5, 0.5)) if abs(bend) > 1e-9 else 0.0
        where.append(place + offset)
    return where[0], where[1], where[2]


def _window(image: Floats, frame: Floats | tuple[float, float, float], side: int) -> Floats:
    """A square of the image at side x side; what lies beyond the edge repeats it."""
    x, y, half = (float(v) for v in frame)
    scale = 2 * half / side
    reach = int(np.ceil(half * 1.5)) + 2
    left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
    part = image[top : int(y) + reach + 1, left : int(x) + reach + 1]
    if not part.size:
        return np.zeros((side, side, *image.shape[2:]), np.float32)
    if scale > 1:
        part = cv2.GaussianBlur(part, (0, 0), 0.5 * scale)
    shift = 0.5 * scale - 0.5 - half
    matrix = np.array([[scale, 0, x - left + shift], [0, scale, y - top + shift]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(part, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE))


# --------------------------------------------------------------------------------------------------------- keys


def _order(count: int) -> list[tuple[int, int]]:
    """Frequencies below `count` per axis but (0, 0), lowest first."""
    pairs = [(u, v) for u in range(count) for v in range(count) if u or v]
    return sorted(pairs, key=lambda uv: (uv[0] + uv[1], max(uv), uv))


# The plane (0 lightness, 1 and 2 chroma), row frequency and column frequency of each coefficient of a key.
_PLANES = [(0, u, v) for u, v in _order(LUMA)] + [(k, u, v) for k in (1, 2) for u, v in _order(CHROMA)]
_UV = np.array(_PLANES)[:, 1:]
_TRANSPOSED = np.array([_PLANES.index((k, v, u)) for k, u, v in _PLANES])
_SIGNS = {
    (flip_v, flip_h): np.where((_UV[:, 0] * flip_v + _UV[:, 1] * flip_h) % 2, -1, 1).astype(np.float32)
    for flip_v in (0, 1)
    for flip_h in (0, 1)
}
# The 8 symmetries of a square: transposed first, then flipped.
_SYMMETRIES = [(t, v, h) for t in (0, 1) for v in (0, 1) for h in (0, 1)]


def _key(window: Floats) -> Floats:
    """(D,): low frequencies of lightness and both chromas, of unit length."""
    spectra = [cv2.dct(np.ascontiguousarray(window[..., k])) for k in range(3)]
    found = np.array([spectra[k][u, v] for k, u, v in _PLANES], np.float32)
    return found / max(float(np.linalg.norm(found)), 1e-6)


def turned(keys: Floats, symmetry: int) -> Floats:
    """Keys (..., D) of the same frames under one of the 8 symmetries of a square."""
    transposed, flip_v, flip_h = _SYMMETRIES[symmetry]
    return (keys[..., _TRANSPOSED] if transposed else keys) * _SIGNS[flip_v, flip_h]


def invariants(keys: Floats) -> Floats:
    """What of keys (..., D) no symmetry changes, lowest frequencies first."""
    found = []
    for n, (k, u, v) in enumerate(_PLANES):
        if u > v:
            continue
        a, b = keys[..., n], keys[..., _PLANES.index((k, v, u))]
        if u == v:
            found.append((u + v, a if u % 2 == 0 else np.abs(a)))
        elif u % 2 == 0 and v % 2 == 0:  # their signs stay; a turn only exchanges them
            found += [(u + v, (a + b) / np.sqrt(2)), (u + v, np.abs(a - b) / np.sqrt(2))]
        else:
            found.append((u + v, np.hypot(a, b)))
    return np.stack([values for _, values in sorted(found, key=lambda item: item[0])], axis=-1).astype(np.float32)


def packed(description: Description) -> bytes:
    """A description as bytes, for a column; half precision."""
    return np.concatenate([description.frames, description.keys], axis=1).astype(np.float16).tobytes()


def unpacked(column: pa.Array | pa.ChunkedArray) -> Description:
    """The descriptions in a column without nulls: frames (N, F, 3) and keys (N, F, D), in half precision."""
    values = np.frombuffer(b"".join(column.to_pylist()), np.float16).reshape(-1, FRAMES, 3 + DIM)
    return Description(values[..., :3], values[..., 3:])  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- candidates

TREE_DIMS = 14
TREE_RADIUS, KEY_RADIUS = 0.25, 0.35  # of keys of unit length
_NEIGHBOURS = 8
_DISTINCT = 0.7  # a match this much closer than the last neighbour stands for itself (Lowe 2004)
_CHUNK = 65_536
_PLACE_SLACK, _SCALE_SLACK = 0.15, 0.35  # of the way between two blobs; of the log of their frames' ratio


class Candidates(NamedTuple):
    """Pairs of images, each once with a < b, (P,): the frames that match, and the symmetry that turns b into a."""

    a: Ints
    b: Ints
    frame_a: Ints
    frame_b: Ints
    symmetry: Ints


class _Matches(NamedTuple):
    """Close keys of different images, (M,): p's frame is q's under a symmetry."""

    p: Ints
    q: Ints
    symmetry: Ints
    distance: Floats
    distinct: NDArray[np.bool_]

    def where(self, chosen: NDArray[Any]) -> _Matches:
        return _Matches(*(column[chosen] for column in self))


def candidates(described: Description) -> Candidates:
    """Pairs of images, of descriptions (N, F, ...), that may be copies; `likeness` decides."""
    if not len(described.keys):
        return Candidates(*(np.zeros(0, np.int64) for _ in Candidates._fields))
    rows, frames = np.nonzero(np.isfinite(described.keys[..., 0].astype(np.float32)))
    found = _matches(described.keys[rows, frames].astype(np.float32), rows)
    swap = rows[found.p] > rows[found.q]
    found = found._replace(
        p=np.where(swap, found.q, found.p), q=np.where(swap, found.p, found.q),
        symmetry=np.where(swap, _INVERSE[found.symmetry], found.symmetry),
    )  # fmt: skip
    found = found.where(found.distinct | _agreed(rows, described.frames[rows, frames].astype(np.float32), found))
    found = found.where(np.lexsort((found.distance, rows[found.q], rows[found.p])))
    pair = np.stack([rows[found.p], rows[found.q]])
    new = np.ones(pair.shape[1], bool)
    new[1:] = (pair[:, 1:] != pair[:, :-1]).any(axis=0)  # of a pair's matches the closest
    found = found.where(new)
    return Candidates(rows[found.p], rows[found.q], frames[found.p], frames[found.q], found.symmetry)


def _matches(keys: Floats, rows: Ints) -> _Matches:
    """The nearest keys of other images, for each key (M, D)."""
    points = invariants(keys)[:, :TREE_DIMS]
    tree, found = cKDTree(points), []
    for start in range(0, len(points), _CHUNK):
        distances, near = tree.query(
            points[start : start + _CHUNK], k=_NEIGHBOURS + 1, distance_upper_bound=TREE_RADIUS, workers=-1
        )
        i, j = np.nonzero(near < len(points))
        p, q = i + start, near[i, j]
        last = np.minimum(distances[i, -1], TREE_RADIUS)
        other = rows[p] != rows[q]
        found.append(_turned_alike(keys, p[other], q[other], (distances[i, j] < _DISTINCT * last)[other]))
    return _Matches(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _turned_alike(keys: Floats, p: Ints, q: Ints, distinct: NDArray[np.bool_]) -> _Matches:
    """Of pairs of keys, those that are close in one of their 8 symmetries, and which."""
    distances = np.stack([np.linalg.norm(turned(keys[q], k) - keys[p], axis=1) for k in range(8)])  # (8, M)
    symmetry = distances.argmin(axis=0)
    distance = distances[symmetry, np.arange(len(p))]
    return _Matches(p, q, symmetry, distance, distinct).where(distance < KEY_RADIUS)


def _agreed(rows: Ints, frames: Floats, found: _Matches) -> NDArray[np.bool_]:
    """Which matches of blobs another match of the same two images confirms: the way from one blob to the other is the
    same in both images, but for the symmetry and the scale."""
    p, q = found.p, found.q
    scale = np.log(np.maximum(frames[p, 2], 1e-3) / np.maximum(frames[q, 2], 1e-3))
    blobs = (frames[p, 2] > 0) & (frames[q, 2] > 0)
    order = np.lexsort((scale, found.symmetry, rows[q], rows[p]))
    group = np.stack([rows[p], rows[q], found.symmetry])[:, order]
    agreed = np.zeros(len(p), bool)
    for ahead in range(1, min(2 * FRAMES, len(order))):
        first, second = order[:-ahead], order[ahead:]
        same = (group[:, ahead:] == group[:, :-ahead]).all(axis=0) & blobs[first] & blobs[second]
        first, second = first[same], second[same]
        way_a = frames[p[first], :2] - frames[p[second], :2]
        way_b = frames[q[first], :2] - frames[q[second], :2]
        ratio = np.exp((scale[first] + scale[second]) / 2)
        expected = ratio[:, None] * np.einsum("mij,mj->mi", _MATRICES[found.symmetry[first]], way_b)
        length = np.linalg.norm(way_a, axis=1)
        fits = (np.linalg.norm(way_a - expected, axis=1) < _PLACE_SLACK * length) & (length > 0)
        fits &= np.abs(scale[first] - scale[second]) < _SCALE_SLACK
        agreed[first[fits]] = agreed[second[fits]] = True
    return agreed


def apply(image: NDArray[Any], symmetry: int) -> NDArray[Any]:
    """An image (H, W, ...) under one of the 8 symmetries."""
    transposed, flip_v, flip_h = _SYMMETRIES[symmetry]
    image = image.swapaxes(0, 1) if transposed else image
    image = image[::-1] if flip_v else image
    return np.ascontiguousarray(image[:, ::-1] if flip_h else image)


def _matrix(symmetry: int) -> Floats:
    """What a symmetry does to (x, y), about the origin."""
    transposed, flip_v, flip_h = _SYMMETRIES[symmetry]
    swap = np.array([[0, 1], [1, 0]]) if transposed else np.eye(2)
    return np.asarray(np.diag([1 - 2 * flip_h, 1 - 2 * flip_v]) @ swap, dtype=np.float32)


_MATRICES = np.stack([_matrix(k) for k in range(8)])
_INVERSE = np.array([int(np.abs(_MATRICES @ matrix - np.eye(2)).sum(axis=(1, 2)).argmin()) for matrix in _MATRICES])

# ----------------------------------------------------------------------------------------------------- likeness

_DETAIL_SIDE, _DETAIL_SIGMA = 72, 3.0  # px of the short side at which details are compared, and of what is left out
_LEAST_CONTRAST, _LEAST_TOLD = 1.0, 100  # grey levels, and places that have them
_MOST_STRETCH = 1.15  # by which the alignment may change what the frames said
_PATCH = 11  # px of the side of the places that are compared
_MARGIN = 4  # px of the overlap's edge that do not count
_LEAST_OVERLAP = 0.2  # of the smaller image
_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)


def likeness(a: RGB, b: RGB, frame_a: Floats, frame_b: Floats, symmetry: int) -> float:
    """How far two images agree in detail where they overlap: 1 the same photograph, 0 no relation.

    The frames and the symmetry say where b lies on a; an affine map improves on that (ECC, Evangelidis and Psarakis
    2008); then what a narrow Gaussian leaves of both is correlated over all of the overlap.
    """
    first, grown_a = _grey(a)
    second, grown_b = _grey(b)
    place = _place(frame_a * grown_a, frame_b * grown_b, symmetry, first.shape, second.shape)
    size, flags = first.shape[::-1], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(second, place, size, flags=flags)
    seen: Floats = (cv2.warpAffine(np.ones_like(second), place, size, flags=flags) > 0.99).astype(np.uint8)
    if seen.sum() < _LEAST_OVERLAP * min(first.size, second.size):
        return 0.0
    start: Floats = np.eye(2, 3, dtype=np.float32)
    try:
        _, warp = cv2.findTransformECC(first, laid, start, cv2.MOTION_AFFINE, _STEPS, seen, 5)
    except cv2.error:  # it has no solution where one image is flat, or they share nothing
        return 0.0
    stretch = np.linalg.svd(warp[:, :2], compute_uv=False)
    if stretch[0] > _MOST_STRETCH or stretch[1] < 1 / _MOST_STRETCH:
        return 0.0
    laid, seen = (cv2.warpAffine(image, warp, size, flags=flags) for image in (laid, seen))
    inside = cv2.erode(seen, np.ones((2 * _MARGIN + 1,) * 2, np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return _agreement(_detail(first), _detail(laid), inside > 0)


def _grey(rgb: RGB) -> tuple[Floats, float]:
    """The lightness at the size of comparison, and how much larger that is than the image."""
    lightness = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY).astype(np.float32)
    grown = _DETAIL_SIDE / min(lightness.shape)
    size = (round(lightness.shape[1] * grown), round(lightness.shape[0] * grown))
    return np.asarray(cv2.resize(lightness, size, interpolation=cv2.INTER_AREA)), grown


def _place(
    frame_a: Floats, frame_b: Floats, symmetry: int, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> Floats:
    """(2, 3): from pixels of a to those of b, if b's frame is a's under the symmetry."""
    half_a, half_b = (
        np.full(2, frame[2]) if frame[2] > 0 else np.array(shape[1::-1]) / 2
        for frame, shape in ((frame_a, shape_a), (frame_b, shape_b))
    )
    turn = np.diag(half_b) @ _MATRICES[_INVERSE[symmetry]] @ np.diag(1 / half_a)
    # Frames count from the edge of the first pixel, warps from its middle.
    shift = frame_b[:2] - 0.5 - turn @ (frame_a[:2] - 0.5)
    return np.concatenate([turn, shift[:, None]], axis=1)


def _detail(grey: Floats) -> Floats:
    return np.asarray(grey - cv2.GaussianBlur(grey, (0, 0), _DETAIL_SIGMA))


def _agreement(a: Floats, b: Floats, inside: NDArray[np.bool_]) -> float:
    """The median of the local correlations of two images' detail, wherever there is any: one strong edge that both
    have, as that of a vignette, is not enough."""
    if inside.sum() < _LEAST_OVERLAP * _DETAIL_SIDE**2 / 2:
        return 0.0
    mean_a, mean_b = _local(a), _local(b)
    power_a, power_b = _local(a * a) - mean_a**2, _local(b * b) - mean_b**2
    contrast = np.sqrt(np.maximum(power_a * power_b, 0))
    correlation = ((_local(a * b) - mean_a * mean_b) / np.maximum(contrast, 1e-3))[inside]
    told = correlation[contrast[inside] > _LEAST_CONTRAST]
    return float(np.median(told)) if len(told) >= _LEAST_TOLD else 0.0


def _local(values: Floats) -> Floats:
    return np.asarray(cv2.blur(values, (_PATCH, _PATCH)))
