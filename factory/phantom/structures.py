"""Dermoscopic structures, painted into the pigment: network, globules, streaks, vessels, cysts and the like."""

from __future__ import annotations

import numpy as np

from factory.phantom.contour import ANGLES
from factory.phantom.fields import Array, blur, f32, grid, noise, shift_in_place, spread, triple
from factory.phantom.strokes import bends, curved, dot_cover, line_cover
from factory.phantom.truth import Attributes


def _mesh(rng: np.random.Generator, size: int, period: float) -> Array:
    """A warped honeycomb, about -1 in the lines and +1 in the holes."""
    x, y = grid(size)
    bend = noise(rng, 11, size, 2) * np.float32(0.6 * period)
    x, y = x + bend[..., 0], y + bend[..., 1]
    turn = rng.uniform(0, np.pi)
    total = np.zeros((size, size), np.float32)
    for k in range(3):
        a = turn + k * np.pi / 3
        wave = x * np.float32(np.cos(a)) + y * np.float32(np.sin(a))
        total += np.cos(wave * np.float32(2 * np.pi / (0.866 * period)))
    # Plain noise of the same period breaks the lattice, which skin never keeps for long.
    return total * np.float32(0.45) + noise(rng, int(0.8 / period), size) * np.float32(rng.uniform(0.3, 0.8))


def _network(rng: np.random.Generator, paint: Array, size: int) -> None:
    """Pigment network: dark mesh, lighter holes, line width and strength varying over the lesion."""
    mesh = _mesh(rng, size, rng.uniform(0.026, 0.05))
    lines = np.clip(0.5 - mesh + 0.4 * noise(rng, 8, size), 0, 1) - 0.5
    lines *= np.clip(0.5 + 0.7 * noise(rng, 6, size), 0, 1.5) * np.float32(rng.uniform(4, 13))
    paint[..., 0] -= lines
    paint[..., 2] -= lines * 0.3


def _cobblestone(rng: np.random.Generator, paint: Array, size: int) -> None:
    """Large polygonal globules packed side by side."""
    mesh = _mesh(rng, size, rng.uniform(0.05, 0.09))
    paint[..., 0] -= np.clip(mesh, -0.4, 0.9) * np.float32(rng.uniform(3, 8))


def _ridges(rng: np.random.Generator, paint: Array, size: int) -> None:
    """Brain-like fissures: the zero crossings of smooth noise."""
    away = np.abs(noise(rng, int(rng.integers(12, 26)), size))
    paint[..., 0] -= np.clip(1 - away * 2.5, 0, 1) * np.float32(rng.uniform(5, 13))


def _inside(rng: np.random.Generator, at: Attributes, count: int, low: float, high: float) -> Array:
    """Points between two relative radii of the lesion, in image shares."""
    vertex = rng.integers(0, ANGLES, count)
    reach = np.sqrt(rng.uniform(low**2, high**2, count))[:, None]
    return at.contour[vertex] * reach * at.radius + np.array(at.centre)


def _globules(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Round dark clods, scattered or along the rim."""
    low = rng.choice([0.0, 0.0, 0.7])
    points = _inside(rng, at, int(rng.integers(8, 60)), low, 0.95)
    spots = dot_cover(points, rng.uniform(0.004, 0.013, len(points)), size)
    paint += spread(blur(spots, 0.004 * size), f32([-15, 1, 0]) * np.float32(rng.uniform(0.5, 1.3)))


def _blotch(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """A dark structureless area, usually off the middle."""
    points = _inside(rng, at, int(rng.integers(1, 4)), 0.0, 0.6)
    spot = dot_cover(points, at.radius * rng.uniform(0.15, 0.45, len(points)), size)
    spot = blur(spot, at.radius * rng.uniform(0.05, 0.2) * size)
    paint[..., 0] *= 1 - spot * np.float32(rng.uniform(0.2, 0.5))


def _streaks(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Radial lines that end at the border."""
    count = int(rng.integers(15, 45))
    start = int(rng.integers(ANGLES))
    vertex = (start + rng.integers(0, rng.integers(120, ANGLES), count)) % ANGLES
    reach = np.stack([rng.uniform(0.6, 0.85, count), np.ones(count)], axis=1)[..., None]
    rays = at.contour[vertex][:, None] * reach * at.radius + np.array(at.centre)
    lines = blur(line_cover(rays, [1.6] * count, [255] * count, size), 0.004 * size)
    paint[..., 0] *= 1 - lines * np.float32(rng.uniform(0.3, 0.6))


def _vessels(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Short curved red vessels."""
    count = int(rng.integers(5, 18))
    starts = _inside(rng, at, count, 0, 0.9)
    ways = [bends(rng, rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.09)) for _ in range(count)]
    lines = line_cover(curved(starts, ways), [1.0] * count, [255] * count, size)
    paint += spread(lines, f32([-7, 17, 3]))


def _cysts(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Milia-like cysts: small white-yellow dots."""
    points = _inside(rng, at, int(rng.integers(4, 30)), 0, 0.92)
    spots = blur(dot_cover(points, rng.uniform(0.004, 0.011, len(points)), size), 0.004 * size)
    paint += spread(spots, f32([24, -4, 2]) * np.float32(rng.uniform(0.4, 1)))


def _openings(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Comedo-like openings: brown-black plugs."""
    points = _inside(rng, at, int(rng.integers(3, 18)), 0, 0.92)
    spots = blur(dot_cover(points, rng.uniform(0.006, 0.016, len(points)), size), 0.005 * size)
    paint[..., 0] *= 1 - spots * np.float32(rng.uniform(0.3, 0.65))


def _veil(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """A milky blue haze over the blue-gray part, so it deepens a colour that is there already."""
    haze = np.clip(0.3 + noise(rng, 6, size), 0, 1) * np.clip((9 - paint[..., 2]) / 9, 0, 1)
    towards = shift_in_place(-paint, [58, -1, -11])
    paint += towards * triple(haze * np.float32(rng.uniform(0.2, 0.5)))


def _regression(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Peppering: fine gray dots over the scar-like white part."""
    points = _inside(rng, at, int(rng.integers(15, 60)), 0, 0.9)
    pale = np.clip((paint[..., 0] - 50) / 25, 0, 1)
    spots = dot_cover(points, np.full(len(points), 0.004), size) * pale
    paint += spread(spots, f32([-14, -3, -9]))


def paint_structures(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Paint the structures that the diagnosis asked for."""
    textures = {"network": _network, "cobblestone": _cobblestone, "ridges": _ridges}
    marks = {"globules": _globules, "blotch": _blotch, "streaks": _streaks, "vessels": _vessels, "cysts": _cysts,
             "openings": _openings, "blue-white-veil": _veil, "regression": _regression}  # fmt: skip
    for name in at.structures:
        if name in textures:
            textures[name](rng, paint, size)
        else:
            marks[name](rng, at, paint, size)
