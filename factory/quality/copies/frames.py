"""How an image is described so that its copies can be found: a few square frames, and a key for each.

The frames are the whole image and squares around its dark blobs, found where the Laplacian of a Gaussian is extremal
over place and size (Lindeberg 1998), which a crop leaves where they are. A frame's key is its lowest frequencies, as
pHash takes them (Zauner 2010), there as bits. Letters: N images, F frames, D = DIM.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from factory.images import RGB, reduced
from factory.quality.skin_tone import from_corners, to_lab

Floats = NDArray[Any]
Ints = NDArray[np.int64]
Grey = NDArray[np.uint8]

BLOBS = 6
FRAMES = 1 + BLOBS
VIEW_SIDE = 84  # px of the short side at which details are compared
SIDE = 32  # a frame is reduced to so many pixels before its frequencies are taken
LUMA, CHROMA = 7, 3  # the lowest frequencies kept, per axis
DIM = LUMA**2 - 1 + 2 * (CHROMA**2 - 1)

_BLOB_SIDE = 48  # blobs are looked for at this short side, in px
_SIGMAS = np.geomspace(0.035, 0.30, 9)  # of the short side
_FRAME_SIGMAS = 2.2  # half side of a blob's frame
_LEAST_BLOB = 0.5  # L* units of the scale-normalised Laplacian

_VIGNETTE, _VIGNETTE_EDGE = 22.0, 5  # L* of the dark around the view; px of its soft edge at the size of blobs


class Description(NamedTuple):
    """Frames (F, 3): centre x, centre y and half side in units of the image's short side, the whole image first, with 0
    for its half side as it need not be square; and their keys (F, D). An image with few blobs has NaN for the rest."""

    frames: Floats
    keys: Floats


def describe(rgb: RGB) -> Description:
    """The frames of an image (H, W, 3) and their keys."""
    lab = to_lab(rgb)
    short = min(lab.shape[:2])
    frames, keys = np.full((FRAMES, 3), np.nan, np.float32), np.full((FRAMES, DIM), np.nan, np.float32)
    frames[0] = lab.shape[1] / 2 / short, lab.shape[0] / 2 / short, 0
    keys[0] = _key(cv2.resize(lab, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
    for k, frame in enumerate(_blobs(lab[..., 0]), start=1):
        frames[k], keys[k] = frame, _key(_window(lab, frame * short, SIDE))
    return Description(frames, keys)


def view(rgb: RGB) -> Grey:
    """An image (H, W, 3) as it is compared in detail: its lightness, the short side at most `VIEW_SIDE` px."""
    grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
    return np.asarray(reduced(grey, VIEW_SIDE), dtype=np.uint8)


def _blobs(lightness: Floats) -> Floats:
    """Frames of the `BLOBS` strongest dark blobs, (K, 3) in units of the short side, strongest first."""
    height, width = lightness.shape
    shrink = _BLOB_SIDE / min(height, width)
    size = (round(width * shrink), round(height * shrink))
    pad = _BLOB_SIDE // 2
    small = _lit(cv2.resize(lightness, size, interpolation=cv2.INTER_AREA))
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
    return np.stack([x + 0.5, y + 0.5, half], axis=1) / _BLOB_SIDE


def _lit(lightness: Floats) -> Floats:
    """With the vignette filled from what is around it: its corners would be blobs, and a crop moves them."""
    dark = lightness < _VIGNETTE
    tube = from_corners(dark, _VIGNETTE_EDGE)
    if not tube.any() or dark.all():
        return lightness
    seen = (~tube).astype(np.float32)
    sigma = 0.15 * _BLOB_SIDE
    middle = float(lightness[~dark].mean())  # also where nothing is near enough
    weight, around = (cv2.GaussianBlur(part, (0, 0), sigma) for part in (seen, (lightness - middle) * seen))
    return np.asarray(np.where(seen > 0, lightness, middle + around / np.maximum(weight, 1e-3)))


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


MATRICES = np.stack([_matrix(k) for k in range(8)])
INVERSE = np.array([int(np.abs(MATRICES @ matrix - np.eye(2)).sum(axis=(1, 2)).argmin()) for matrix in MATRICES])


def packed(description: Description) -> bytes:
    """A description as bytes, for a column; half precision."""
    return np.concatenate([description.frames, description.keys], axis=1).astype(np.float16).tobytes()


def unpacked(column: pa.Array | pa.ChunkedArray) -> Description:
    """The descriptions in a column without nulls: frames (N, F, 3) and keys (N, F, D), in half precision."""
    values = np.frombuffer(b"".join(column.to_pylist()), np.float16).reshape(-1, FRAMES, 3 + DIM)
    return Description(values[..., :3], values[..., 3:])  # type: ignore[arg-type]
