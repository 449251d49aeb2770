"""The border of a lesion, four ways: how long it is for its area, how far it strays from a circle, how rough it is at
every scale, and in how many eighths the pigment ends abruptly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from factory.images import Mask
from factory.phantom import measure_irregularity
from factory.quality.attributes.shape import outline, sampled

Floats = NDArray[Any]

OCTANTS = 8
# Derived defaults, since Stolz et al. call it by eye: the pigment ends abruptly where half of its contrast with skin
# is lost within a band of a tenth of the lesion's radius, and only where there are 8 Lab units of contrast to lose.
ABRUPT, LEAST_CONTRAST = 0.5, 8.0
# Across the border, in radii of the disk of equal area: from well inside to a little outside, as masks are drawn around
# the fade; the number of steps, those of the band, and the points of the outline that are averaged.
_INSIDE, _OUTSIDE, _STEPS, _BAND, _RUN = -0.35, 0.15, 21, 4, 5
_MOST_IRREGULAR = 100.0
_YARDSTICKS = (8, 12, 16, 24, 32, 48, 64)  # steps along the 512 points


def compactness(line: Floats) -> float:
    """Of an outline: perimeter^2 / (4 pi area) - 1, about 0 for a disk, growing with every lobe and notch."""
    # A hairline's outline may enclose next to nothing; any such shape is as irregular as can be told.
    with np.errstate(divide="ignore"):
        return float(np.clip(measure_irregularity(line), 0.0, _MOST_IRREGULAR))


def border_irregularity(piece: Mask) -> float:
    """`compactness` of a piece (H, W)."""
    return compactness(outline(piece))


def radial_variance(line: Floats) -> float:
    """Standard deviation over mean of the outline's distance from its centroid: 0 for a disk.

    The coefficient of variation, so without a unit; it grows with an ellipse's length as well as with lobes.
    """
    distance = np.hypot(*(line - _centroid(line)).T)
    return float(distance.std() / max(float(distance.mean()), 1e-9))


def fractal_dimension(line: Floats) -> float:
    """Of an outline (512, 2), by the divider method: 1 for a smooth line, towards 2 the rougher it is.

    The slope of log(length measured in chords) over log(chord), for chords of 8 to 64 of the outline's 512 steps;
    each length is a mean over every starting point. Clipped to [1, 2].
    """
    lengths, chords = [], []
    for step in _YARDSTICKS:
        chord = float(np.hypot(*(np.roll(line, -step, axis=0) - line).T).mean())
        chords.append(max(chord, 1e-9))
        lengths.append(max(chord * len(line) / step, 1e-9))
    slope = float(np.polyfit(np.log(chords), np.log(lengths), 1)[0])
    return float(np.clip(1.0 - slope, 1.0, 2.0))


def abrupt_octants(lab: Floats, line: Floats) -> int:
    """In how many of eight octants about the centroid the pigment ends abruptly, 0..8: the B of the ABCD rule.

    lab (H, W, 3), line (N, 2) in its pixels. Per point of the outline, the largest share of the contrast between
    inside and outside that is lost within a tenth of a radius along the normal; an octant ends abruptly where the
    median share is at least `ABRUPT`. Octants are eighths of the turn from the major principal axis; points that
    look out of the image do not count.
    """
    line = line[::2]  # half of the points say as much, in half of the time
    radius = float(np.sqrt(abs(_signed_area(line)) / np.pi))
    along = np.roll(line, -1, axis=0) - np.roll(line, 1, axis=0)
    normal = np.stack([along[:, 1], -along[:, 0]], axis=1) / np.maximum(np.hypot(*along.T), 1e-9)[:, None]
    outward = normal * (np.sign(_signed_area(line)) or 1.0) * radius
    offsets = np.linspace(_INSIDE, _OUTSIDE, _STEPS)
    places = line[None] + offsets[:, None, None] * outward[None]  # (steps, N, 2)
    height, width = lab.shape[:2]
    visible = ((places >= 0) & (places <= np.asarray([width - 1, height - 1]))).all(axis=(0, 2))
    share = _lost_at_once(_smoothed(sampled(lab, places)))
    octant = _octants(line)
    members = [share[(octant == k) & visible] for k in range(OCTANTS)]
    return sum(bool(len(part) and np.median(part) >= ABRUPT) for part in members)


def _smoothed(profiles: Floats) -> Floats:
    """Profiles (steps, N, 3) averaged with their neighbours along the closed outline."""
    around = np.concatenate([profiles[:, -_RUN // 2 + 1 :], profiles, profiles[:, : _RUN // 2]], axis=1)
    total = np.cumsum(np.concatenate([np.zeros_like(around[:, :1]), around], axis=1, dtype=np.float64), axis=1)
    return np.asarray((total[:, _RUN:] - total[:, :-_RUN]) / _RUN)


def _lost_at_once(profiles: Floats) -> Floats:
    """Of profiles (steps, N, 3) the largest contrast within the band over that of the whole, (N,), 0 for too little."""
    whole = np.sqrt(((profiles[-1] - profiles[0]) ** 2).sum(axis=1))
    band = np.sqrt(((profiles[_BAND:] - profiles[:-_BAND]) ** 2).sum(axis=2)).max(axis=0)
    return np.where(whole >= LEAST_CONTRAST, band / np.maximum(whole, 1e-9), 0.0)


def _octants(line: Floats) -> NDArray[np.intp]:
    """The eighth, 0..7, of the turn about the centroid that each point lies in, from the major principal axis."""
    away = line - _centroid(line)
    _, axes = np.linalg.eigh(away.T @ away)
    turn = np.arctan2(away @ axes[:, 0], away @ axes[:, 1]) % (2 * np.pi)
    return np.minimum((turn * OCTANTS / (2 * np.pi)).astype(np.intp), OCTANTS - 1)


def _signed_area(line: Floats) -> float:
    x, y = line.T
    return float(0.5 * np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def _centroid(line: Floats) -> Floats:
    """Of the enclosed area, or of the points where next to nothing is enclosed."""
    x, y = line.T
    following_x, following_y = np.roll(x, -1), np.roll(y, -1)
    cross = x * following_y - following_x * y
    total = cross.sum()
    if abs(total) < 1e-6:
        return np.asarray(line.mean(axis=0))
    return np.asarray([((x + following_x) * cross).sum(), ((y + following_y) * cross).sum()]) / (3 * total)
