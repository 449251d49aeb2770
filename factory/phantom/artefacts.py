"""What gets between the skin and the picture: ink, hair, bubbles, glare, the plate's rim, rulers, stickers, the tube.

Every artefact is a function of (rng, rgb, settings, size) that paints into `rgb`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from factory.phantom.fields import Array, blur, f32, grid, mix, noise, spread, triple
from factory.phantom.settings import PhantomSettings
from factory.phantom.strokes import bends, curved, dot_cover, line_cover

_INKS = ((0.36, 0.22, 0.6), (0.45, 0.33, 0.62), (0.16, 0.14, 0.5))
_HAIRS = ((0.10, 0.07, 0.06), (0.17, 0.10, 0.07), (0.32, 0.19, 0.12), (0.48, 0.33, 0.2), (0.80, 0.74, 0.66))
_DRAPES = ((0.75, 0.1, 0.5), (0.2, 0.45, 0.75), (0.25, 0.55, 0.5), (0.9, 0.9, 0.92), (0.08, 0.08, 0.09))
_STICKERS = (
    (0.1, 0.5, 0.8),
    (0.95, 0.55, 0.1),
    (0.9, 0.6, 0.25),
    (0.25, 0.75, 0.7),
    (0.95, 0.8, 0.25),
    (0.55, 0.57, 0.6),
    (0.3, 0.6, 0.3),
)


def _strands(rng: np.random.Generator, count: int, main: float, around: float, stubble: bool) -> Array:
    """Curves (count, 12, 2) from anywhere, of about one direction; long, or as short as stubble."""
    starts, ways = [], []
    for _ in range(count):
        starts.append(rng.uniform(-0.15, 1.15, 2))
        angle = rng.normal(main, around)
        length = rng.uniform(0.05, 0.15) if stubble else rng.uniform(0.3, 1.3)
        ways.append(bends(rng, angle, length, 0.7))
    return curved(starts, ways)


def _hair(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Strands with a common direction and colour; each has its own bend, width and strength."""
    low, high = s.hair_count
    count = int(low + (high - low) * rng.uniform() ** 1.5)
    stubble = rng.uniform() < 0.15
    main, around = rng.uniform(0, 2 * np.pi), rng.choice([0.25, 0.6, 2.5])
    width = rng.uniform(*s.hair_width)
    strands = _strands(rng, count, main, around, stubble)
    widths, values = width * rng.uniform(0.6, 1.3, count), rng.integers(120, 256, count)
    cover = line_cover(strands, widths.tolist(), values.tolist(), size)
    colour = _HAIRS[rng.choice(5, p=[0.2, 0.34, 0.28, 0.11, 0.07])]
    mix(rgb, colour, blur(cover, rng.uniform(0, 0.004) * size) * np.float32(rng.uniform(0.65, 1)))


def _ink_dots(rng: np.random.Generator, size: int) -> Array:
    around = rng.uniform(0, 2 * np.pi, rng.integers(3, 8))
    points = 0.5 + rng.uniform(0.28, 0.45) * np.stack([np.cos(around), np.sin(around)], axis=1)
    return dot_cover(points, rng.uniform(0.008, rng.choice([0.016, 0.035]), len(points)), size)


def _ink_ring(rng: np.random.Generator, size: int) -> Array:
    around = np.linspace(0, 2 * np.pi, 60)
    wobble = rng.uniform(0.33, 0.46) + 0.012 * rng.normal(size=60)
    loop = 0.5 + wobble[:, None] * np.stack([np.cos(around) * rng.uniform(0.75, 1), np.sin(around)], axis=1)
    return line_cover(loop[None], [rng.uniform(1.2, 3)], [255], size) * np.clip(0.5 + noise(rng, 24, size), 0, 1)


def _ink_scribble(rng: np.random.Generator, size: int) -> Array:
    near = rng.choice([0.1, 0.88], 2) + rng.normal(0, 0.06, 2)
    starts, ways = [], []
    for _ in range(14):
        starts.append(near + rng.normal(0, 0.04, 2))
        ways.append(bends(rng, rng.normal(0.8, 0.5), rng.uniform(0.08, 0.28)))
    return line_cover(curved(starts, ways), [1.4] * 14, [230] * 14, size)


def _ink(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Surgical marker: dots, a ring of dashes, or a scribble, in violet."""
    colour = _INKS[rng.integers(3)]
    cover = (_ink_dots, _ink_ring, _ink_scribble)[rng.integers(3)](rng, size)
    mix(rgb, colour, blur(cover, 0.005 * size) * np.float32(rng.uniform(0.35, 0.9)))


def _scale_lines(rng: np.random.Generator, bold: bool) -> Array:
    """Lines (N, 2, 2) of a ruler at the lower edge; a thin one has a base line and a foot beside its ticks."""
    ticks = int(rng.integers(10, 24)) if bold else 11
    along = np.linspace(0.02, 0.98, ticks) if bold else np.linspace(0, rng.uniform(0.36, 0.48), ticks)
    length = np.where(np.arange(ticks) % 5 == 0, 1.6, 1.0) * (rng.uniform(0.025, 0.05) if bold else 0.018)
    tilt = 0.0 if bold else rng.normal(0, 0.16)
    origin = np.array([0.0, 1.0]) if bold else np.array([rng.uniform(0.2, 0.4), rng.uniform(0.86, 0.94)])
    way, up = np.array([np.cos(tilt), np.sin(tilt)]), np.array([np.sin(tilt), -np.cos(tilt)])
    lines = [origin + way * a + np.outer([0, h], up) for a, h in zip(along, length, strict=True)]
    if not bold:
        lines.append(origin + np.outer([0, along[-1]], way))
        lines.append(origin - up * 0.02 + np.outer([0, 0.03], way))
    return np.stack(lines)


def _ruler(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """A graduated scale: a thin one lying near an edge, or bold ticks that enter from the edge."""
    bold = rng.uniform() < 0.25
    lines = _scale_lines(rng, bold)
    turned = rng.integers(8)  # 5: transposed, 6: turned upside down, 7: both; the other five stay below
    lines = lines[..., ::-1] if turned in (5, 7) else lines
    lines = 1 - lines if turned in (6, 7) else lines
    width = rng.uniform(1.5, 3.0) if bold else rng.uniform(0.45, 1.0)
    cover = line_cover(lines, [width] * len(lines), [255] * len(lines), size)
    mix(rgb, [0.1, 0.09, 0.1], cover * np.float32(rng.uniform(0.6, 1)))


def _bubbles(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Air in the gel: bright rims with a faint inside."""
    count = int(rng.integers(1, 10))
    points = rng.uniform(0, 1, (count, 2))
    radii = rng.uniform(0.008, 0.05, count) * rng.choice([0.6, 1.0, 1.8])
    outer, inner = dot_cover(points, radii, size), dot_cover(points, radii * 0.8, size)
    rim = np.clip(outer - inner, 0, 1) * np.clip(0.7 + 0.5 * noise(rng, 10, size), 0, 1)
    mix(rgb, f32([1, 0.98, 0.95]), blur(rim, 0.003 * size) * np.float32(rng.uniform(0.25, 0.8)))
    rgb += triple(inner * np.float32(rng.uniform(-0.03, 0.05)))


def _glare(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Specular light: fine flecks on the surface, or lamps seen at the edge of the plate."""
    if rng.uniform() < 0.6:
        near = rng.uniform(0.2, 0.8, 2)
        points = near + rng.normal(0, 0.15, (int(rng.integers(5, 40)), 2))
        cover = blur(dot_cover(points, rng.uniform(0.002, 0.007, len(points)), size), 0.003 * size)
    else:
        points = np.stack([rng.choice([0.0, 1.0], 3), rng.uniform(0.1, 0.9, 3)], axis=1)
        cover = blur(dot_cover(points, rng.uniform(0.02, 0.1, 3), size), rng.uniform(0.01, 0.05) * size)
    mix(rgb, f32([1, 1, 1]), cover * np.float32(rng.uniform(0.4, 0.95)))


def _disc(centre: tuple[float, float], radius: float, aspect: float, size: int) -> Array:
    """Coverage of a disc that a frame stretched to a square has made `aspect` times as tall."""
    x, y = grid(size)
    far = np.hypot(x - np.float32(centre[0]), (y - np.float32(centre[1])) / np.float32(aspect))
    return np.clip((np.float32(radius) - far) * np.float32(size) + 0.5, 0, 1)


def _patch(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Coloured stickers that enter from an edge, some with a second colour inside, their surface finely woven."""
    for _ in range(int(rng.integers(1, 3))):
        edge, along = rng.integers(4), rng.uniform(0, 1)
        radius, aspect = rng.uniform(0.1, 0.34), rng.choice([1.0, 1.33])
        out = radius * rng.uniform(-0.2, 0.75)
        centre = [(-out, along), (1 + out, along), (along, -out), (along, 1 + out)][edge]
        weave = rng.uniform(0.7, 1.05) * (1 + rng.uniform(0, 0.12) * noise(rng, 80, size))
        mix(rgb, spread(weave, _STICKERS[rng.integers(len(_STICKERS))]), _disc(centre, radius, aspect, size))
        if rng.uniform() < 0.4:
            inner = _disc(centre, radius * rng.uniform(0.4, 0.7), aspect, size)
            mix(rgb, spread(weave, _STICKERS[rng.integers(len(_STICKERS))]), inner)


def _drape(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Cloth, a glove or the world beside the plate, across one side or corner."""
    x, y = grid(size)
    a = rng.uniform(0, 2 * np.pi)
    along = (x - 0.5) * np.float32(np.cos(a)) + (y - 0.5) * np.float32(np.sin(a))
    edge = np.float32(rng.uniform(0.25, 0.5)) + np.float32(0.02) * noise(rng, 4, size)
    cover = np.clip((along - edge) * np.float32(size / rng.choice([1, 3, 10])) + 0.5, 0, 1)
    colour = _DRAPES[rng.integers(len(_DRAPES))]
    weave = 1 + rng.uniform(0, 0.15) * noise(rng, 60, size)
    mix(rgb, spread(weave, colour), cover)


def _far(rng: np.random.Generator, size: int) -> Array:
    """Distance from about the middle, in half-sides, with the aspect of a stretched frame."""
    x, y = grid(size)
    cx, cy = rng.normal(0.5, 0.02, 2)
    aspect = rng.uniform(0.75, 1.0)
    return np.hypot((x - np.float32(cx)) * np.float32(2), (y - np.float32(cy)) * np.float32(2 * aspect))


def vignette(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """The dark tube around the view: only the corners, or a full circle, with a hard or a soft edge."""
    far = _far(rng, size)
    radius = rng.uniform(0.9, 1.05) if rng.uniform() < 0.4 else rng.uniform(1.02, 1.3)
    width = rng.choice([0.015, 0.03, 0.1, 0.3])
    lit = np.clip((radius - far) / np.float32(width) + 0.5, 0, 1)
    floor = np.float32(rng.uniform(0.0, 0.12)) * f32([1.1, 1.0, 0.95])
    mix(rgb, floor, 1 - lit * lit * (3 - 2 * lit))


def _ring(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """The rim of the contact plate: a faint ellipse, with another tone outside."""
    far = _far(rng, size)
    radius = np.float32(rng.uniform(0.6, 0.98))
    rgb *= triple(1 + np.clip((far - radius) * 40, 0, 1) * np.float32(rng.uniform(-0.10, 0.08)))
    rim = np.exp(-(((far - radius) / np.float32(rng.uniform(0.012, 0.03))) ** 2))
    rgb += triple(rim * np.clip(0.5 + 0.5 * noise(rng, 5, size), 0, 1) * np.float32(rng.choice([-0.06, 0.05, 0.1])))


ARTEFACTS: dict[str, Callable[[np.random.Generator, Array, PhantomSettings, int], None]] = {
    "ink": _ink,
    "hair": _hair,
    "bubbles": _bubbles,
    "glare": _glare,
    "ring": _ring,
    "ruler": _ruler,
    "patch": _patch,
    "drape": _drape,
}
