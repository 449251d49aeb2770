"""A digital dermoscopy phantom: synthetic skin lesions drawn with exact truth beside every image.

How a phantom comes about, in this order:

1. `draw_attributes` draws what a clinician would score. A latent "atypia" shapes a closed polar contour; from that
   contour (never from pixels of the final image) asymmetry and border irregularity are measured, and a set of
   dermoscopic colours is chosen.
2. Malignancy is a coin whose bias is logistic in those three numbers (`LOGIT_*`); the diagnosis follows from it.
3. The diagnosis chooses the structures (network, globules, cysts, ...), and the settings choose the artefacts.
4. `draw` paints skin, pigment and structures in CIE Lab, then photographs the result in RGB: hair, gel, glare, ruler,
   light, white balance, vignette, defocus and noise.

Every parameter is drawn before the first pixel, and every random field comes from a grid of coefficients whose size
does not depend on the image, so one (seed, index) is the same lesion at any size. Only the sensor noise differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

COLORS = ("white", "red", "light-brown", "dark-brown", "blue-gray", "black")
DIAGNOSES = ("nevus", "melanoma", "seborrheic_keratosis")
LEVELS = ("low", "medium", "high")
MIN_SIZE, MAX_SIZE = 32, 512

# Field of view of the imagined dermatoscope: the image side is this many millimetres of skin.
FIELD_MM = 20.0

# Lower ITA edge of Fitzpatrick I..V; the outer ends close types I and VI.
ITA_EDGES = (55.0, 41.0, 28.0, 10.0, -30.0)
ITA_ENDS = (68.0, -58.0)

# P(malignant) = 1 / (1 + exp(-(LOGIT_0 + LOGIT_ASYMMETRY*asymmetry + LOGIT_BORDER*irregularity + LOGIT_COLORS*count)))
LOGIT_0 = -4.9
LOGIT_ASYMMETRY = 14.0
LOGIT_BORDER = 3.5
LOGIT_COLORS = 0.8
# Of the benign ones, this share are nevi; the rest are seborrheic keratoses.
NEVUS_SHARE = 0.78

# Upper edges of "low" and "medium", near the terciles of the default phantom.
ASYMMETRY_LEVELS = (0.051, 0.080)
BORDER_LEVELS = (0.12, 0.24)

_ANGLES = 512  # contour vertices: the fixed analytical resolution of perimeter and area
_PIGMENT = 72  # side of the lesion-frame colour map
_TRIES = 64  # attempts at an attribute draw that agrees with what was pinned


@dataclass(frozen=True)
class PhantomSettings:
    """Ranges and probabilities of the renderer; pairs are (low, high) of a uniform draw unless said otherwise."""

    skin_types: tuple[float, ...] = (0.2, 0.25, 0.21, 0.15, 0.11, 0.08)
    log_area: tuple[float, float] = (-2.05, 0.95)  # mean and deviation of log(lesion area / image area)
    area: tuple[float, float] = (0.006, 0.8)
    off_centre: float = 0.07
    opacity: tuple[float, float] = (0.4, 1.0)
    crisp: tuple[float, float] = (0.003, 0.014)  # edge blur of the crispest sector, as a share of the image side
    soft: tuple[float, float] = (0.015, 0.07)  # edge blur of the blurriest sector
    mottle: tuple[float, float] = (0.2, 1.3)
    grain: tuple[float, float] = (0.3, 1.8)
    freckles: float = 0.3
    follicles: float = 0.12
    hair: float = 0.42
    hair_count: tuple[int, int] = (2, 45)
    hair_width: tuple[float, float] = (0.3, 1.2)  # in 1/128 of the image side
    vignette: float = 0.26
    ring: float = 0.14
    ruler: float = 0.3
    bubbles: float = 0.16
    glare: float = 0.22
    ink: float = 0.16
    patch: float = 0.09
    illumination: tuple[float, float] = (0.0, 0.16)
    exposure: tuple[float, float] = (0.95, 1.42)
    cast: tuple[float, float] = (0.03, 0.16)  # spread of the red-blue balance, and how far blue is lifted
    blur: tuple[float, float] = (0.0, 0.9)  # defocus sigma in 1/128 of the image side
    noise: tuple[float, float] = (0.3, 2.6)  # sensor noise, in grey levels of 255
    jpeg: float = 0.25


DEFAULT = PhantomSettings()
# What training never sees: heavier hair, coarser skin, harder light. A gate on faults is calibrated on it.
HELD_OUT = PhantomSettings(
    skin_types=(0.1, 0.16, 0.2, 0.2, 0.18, 0.16),
    opacity=(0.3, 0.9),
    crisp=(0.008, 0.018),
    soft=(0.03, 0.08),
    mottle=(1.6, 2.6),
    grain=(1.8, 3.2),
    freckles=0.5,
    follicles=0.3,
    hair=0.75,
    hair_count=(30, 80),
    hair_width=(1.0, 2.2),
    vignette=0.5,
    bubbles=0.35,
    glare=0.4,
    illumination=(0.16, 0.34),
    exposure=(0.78, 0.95),
    cast=(0.1, 0.24),
    blur=(0.6, 1.5),
    noise=(2.6, 5.0),
    jpeg=0.6,
)


@dataclass(frozen=True)
class Attributes:
    """What is decided before a pixel is painted; `contour` is (512, 2) in the lesion frame, of area pi."""

    diagnosis: str
    malignant: bool
    probability: float
    skin_type: int
    ita: float
    asymmetry: float
    asymmetry_axes: tuple[float, float]
    border_irregularity: float
    colors: tuple[str, ...]
    radius: float  # of the disc of equal area, as a share of the image side
    centre: tuple[float, float]
    diameter_mm: float  # largest caliper of the uncropped contour
    structures: tuple[str, ...]
    contour: Array = field(repr=False, compare=False)

    @property
    def color_count(self) -> int:
        return len(self.colors)


@dataclass(frozen=True)
class Phantom:
    """One image with its exact truth.

    `asymmetry` is the mean of `asymmetry_axes`: for the major, then the minor principal axis of the uncropped shape,
    area(shape XOR its reflection across that axis) / (2 * area(shape)). `border_irregularity` is
    perimeter^2 / (4 pi area) - 1 of the 512-vertex contour: 0 for a disc, growing with every lobe and notch.
    """

    image: Array = field(repr=False)
    mask: Array = field(repr=False)
    diagnosis: str
    malignant: bool
    skin_type: int
    ita: float
    asymmetry: float
    asymmetry_axes: tuple[float, float]
    border_irregularity: float
    colors: tuple[str, ...]
    color_count: int
    structures: tuple[str, ...]
    artefacts: tuple[str, ...]
    diameter_mm: float
    index: int
    seed: int
    size: int


# ---------------------------------------------------------------------------------------------- attributes


def malignancy_probability(asymmetry: float, border_irregularity: float, color_count: int) -> float:
    """The stated chance that a lesion of these attributes is malignant."""
    logit = LOGIT_0 + LOGIT_ASYMMETRY * asymmetry + LOGIT_BORDER * border_irregularity + LOGIT_COLORS * color_count
    return float(1.0 / (1.0 + np.exp(-logit)))


def level(value: float, cuts: tuple[float, float]) -> str:
    """Name of the level of `value`, given the upper edges of low and medium."""
    return LEVELS[int(value >= cuts[0]) + int(value >= cuts[1])]


def measure_asymmetry(contour: Array) -> tuple[float, float]:
    """Symmetric difference with the mirror image over twice the area, across the major and the minor axis."""
    side = 160
    scale = (side / 2 - 4) / float(np.abs(contour).max())
    shape = _fill(contour * scale + side / 2, side, 2)
    m = cv2.moments(shape)
    cx, cy = m["m10"] / m["m00"], m["m01"] / m["m00"]
    angle = 0.5 * np.arctan2(2 * m["mu11"], m["mu20"] - m["mu02"])
    across = []
    for a in (angle, angle + np.pi / 2):
        c, s = np.cos(2 * a), np.sin(2 * a)
        flip = np.array([[c, s, cx - c * cx - s * cy], [s, -c, cy - s * cx + c * cy]])
        other = cv2.warpAffine(shape, flip, (side, side), flags=cv2.INTER_LINEAR)
        across.append(float(cv2.norm(shape, other, cv2.NORM_L1) / (2.0 * m["m00"])))
    return across[0], across[1]


def measure_irregularity(contour: Array) -> float:
    """perimeter^2 / (4 pi area) - 1 of the closed contour."""
    following = np.roll(contour, -1, axis=0)
    perimeter = np.hypot(*(following - contour).T).sum()
    area = 0.5 * abs(np.sum(contour[:, 0] * following[:, 1] - contour[:, 1] * following[:, 0]))
    return float(perimeter**2 / (4 * np.pi * area) - 1)


@lru_cache(maxsize=1)
def _angles() -> Array:
    return np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False)


def _contour(rng: np.random.Generator, uneven: float, ragged: float) -> Array:
    """Closed star-shaped contour of area pi: an ellipse, low harmonics (uneven), high ones and notches (ragged)."""
    theta = _angles()
    turned = theta - rng.uniform(0, np.pi)
    stretch = 1 + 0.75 * rng.beta(1.3, 2.4)
    radii = 1 / np.hypot(np.cos(turned) / np.sqrt(stretch), np.sin(turned) * np.sqrt(stretch))
    k = np.arange(1, 31)
    amplitude = np.where(k <= 5, 0.02 + 0.19 * uneven, (0.003 + 0.036 * ragged) * (6 / k) ** 1.25)
    amplitude = amplitude * rng.normal(size=k.size) / np.where(k <= 5, k**0.7, 1.0)
    amplitude[0] *= 0.5  # the first harmonic mostly shifts a shape
    phase = rng.uniform(0, 2 * np.pi, k.size)
    radii = radii * np.exp(np.clip(amplitude @ np.cos(np.outer(k, theta) + phase[:, None]), -0.9, 0.7))
    for _ in range(rng.poisson(2.2 * uneven * ragged + 0.2)):
        away = np.angle(np.exp(1j * (theta - rng.uniform(0, 2 * np.pi))))
        depth, width = rng.uniform(-0.2, 0.45), rng.uniform(0.08, 0.4)
        radii = radii * (1 - depth * np.exp(-((away / width) ** 2)))
    area = 0.5 * np.sum(radii**2) * 2 * np.pi / _ANGLES
    radii *= np.sqrt(np.pi / area)
    return np.stack([radii * np.cos(theta), radii * np.sin(theta)], axis=1)


def _levelled_contour(rng: np.random.Generator, atypia: float, wanted: str | None) -> tuple[Array, tuple[float, float]]:
    """A contour and its two asymmetries; their mean falls in the wanted level, by drawing again with a nudge."""
    uneven = float(np.clip(0.65 * atypia + 0.35 * rng.uniform(), 0, 1))
    ragged = float(np.clip(0.6 * atypia + 0.4 * rng.uniform(), 0, 1)) ** 1.3
    while True:
        contour = _contour(rng, uneven, ragged)
        axes = measure_asymmetry(contour)
        found = level(sum(axes) / 2, ASYMMETRY_LEVELS)
        if wanted is None or found == wanted:
            return contour, axes
        # Shrinking both ends in an ellipse, growing ends in a blob, so every level is reached.
        step = 0.85 if LEVELS.index(found) > LEVELS.index(wanted) else 1.15
        uneven, ragged = max(0.01, min(1.6, uneven * step)), max(0.01, min(1.6, ragged * step))


def _palette(rng: np.random.Generator, atypia: float) -> tuple[str, ...]:
    """Dermoscopic colours, the base first; atypical lesions carry more of them."""
    base = str(
        rng.choice(["light-brown", "dark-brown", "red", "blue-gray", "black"], p=[0.46, 0.38, 0.12, 0.015, 0.025])
    )
    weights = {"light-brown": 3.0, "dark-brown": 3.2, "red": 1.2, "white": 0.7, "blue-gray": 0.8, "black": 1.1}
    others = [c for c in COLORS if c != base]
    odds = np.array([weights[c] for c in others])
    count = int(rng.binomial(5, 0.12 + 0.36 * atypia))
    chosen = rng.choice(others, size=count, replace=False, p=odds / odds.sum())
    return (base, *(str(c) for c in chosen))


def _ita(rng: np.random.Generator, skin_type: int) -> float:
    edges = (ITA_ENDS[0], *ITA_EDGES, ITA_ENDS[1])
    high, low = edges[skin_type - 1], edges[skin_type]
    return float(rng.uniform(low + 0.05, high))


def _place(rng: np.random.Generator, s: PhantomSettings, malignant: bool) -> tuple[float, tuple[float, float]]:
    """Equal-area radius and centre; malignant lesions are larger, large ones sit nearer to the middle."""
    mean, deviation = s.log_area
    area = np.clip(np.exp(rng.normal(mean + (0.35 if malignant else -0.08), deviation)), *s.area)
    radius = float(np.sqrt(area / np.pi))
    spread = s.off_centre * (1.3 - radius)
    x, y = np.clip(rng.normal(0.5, spread, 2), 0.2, 0.8)
    return radius, (float(x), float(y))


def _structures(rng: np.random.Generator, diagnosis: str, colors: tuple[str, ...]) -> tuple[str, ...]:
    """Dermoscopic structures that go with the diagnosis and with the colours already chosen."""
    chances = {
        "nevus": {"network": 0.5, "globules": 0.35, "blotch": 0.25, "streaks": 0.05, "vessels": 0.08},
        "melanoma": {"network": 0.6, "globules": 0.45, "blotch": 0.5, "streaks": 0.35, "vessels": 0.2},
        "seborrheic_keratosis": {"cysts": 0.7, "cobblestone": 0.4, "ridges": 0.5, "openings": 0.45, "blotch": 0.15},
    }[diagnosis]
    found = [name for name, p in chances.items() if rng.uniform() < p]
    if diagnosis == "melanoma" and "blue-gray" in colors:
        found.append("blue-white-veil")
    if diagnosis != "seborrheic_keratosis" and "white" in colors:
        found.append("regression")
    return tuple(found)


def _check(wanted: dict[str, Any]) -> None:
    """Refuse a pin that no phantom can satisfy, and name what can be asked for."""
    choices = {"diagnosis": DIAGNOSES, "skin_type": (1, 2, 3, 4, 5, 6), "asymmetry": LEVELS}
    for name, value in wanted.items():
        if name == "colors":
            if not value or isinstance(value, str) or len(set(value)) != len(value) or not set(value) <= set(COLORS):
                raise ValueError(f"colors must be a tuple of different names from {COLORS}, got {value!r}")
        elif name not in choices:
            raise ValueError(f"cannot pin {name!r}; pin one of {(*choices, 'colors')}")
        elif value not in choices[name]:
            raise ValueError(f"{name} must be one of {choices[name]}, got {value!r}")


def draw_attributes(seed: int, index: int, *, settings: PhantomSettings = DEFAULT, **wanted: Any) -> Attributes:
    """The truth of a phantom without its pixels; a pinned diagnosis is met by drawing lesions until one has it."""
    wanted = {name: value for name, value in wanted.items() if value is not None}
    _check(wanted)
    rng = _generator(seed, index, 0)
    skin_type = wanted.get("skin_type") or int(rng.choice(6, p=settings.skin_types)) + 1
    ita = _ita(rng, skin_type)
    asked = wanted.get("diagnosis")
    for _ in range(_TRIES):
        atypia = rng.uniform()
        contour, axes = _levelled_contour(rng, atypia, wanted.get("asymmetry"))
        colors = tuple(wanted.get("colors") or _palette(rng, atypia))
        asymmetry, irregularity = sum(axes) / 2, measure_irregularity(contour)
        probability = malignancy_probability(asymmetry, irregularity, len(colors))
        diagnosis = "nevus" if rng.uniform() < NEVUS_SHARE else "seborrheic_keratosis"
        diagnosis = "melanoma" if rng.uniform() < probability else diagnosis
        if asked in (None, diagnosis):
            break
    # After that many tries the pins contradict the model, and a pin outranks it.
    diagnosis = asked or diagnosis
    radius, centre = _place(rng, settings, diagnosis == "melanoma")
    theta = _angles()[: _ANGLES // 2 : 4]
    reach = contour @ np.stack([np.cos(theta), np.sin(theta)])
    return Attributes(
        diagnosis=diagnosis,
        malignant=diagnosis == "melanoma",
        probability=probability,
        skin_type=skin_type,
        ita=ita,
        asymmetry=asymmetry,
        asymmetry_axes=axes,
        border_irregularity=irregularity,
        colors=colors,
        radius=radius,
        centre=centre,
        diameter_mm=float(np.ptp(reach, axis=0).max()) * radius * FIELD_MM,
        structures=_structures(rng, diagnosis, colors),
        contour=contour,
    )


# ---------------------------------------------------------------------------------------------- fields and grids


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index, stream])))


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Array, Array]:
    """Pixel centres as shares of the image side: x and y, float32."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(line, line)
    return x, y


@lru_cache(maxsize=1)
def _polar() -> tuple[Array, Array]:
    """Radius (frame half-side = 1) and nearest contour vertex of each cell of the lesion frame."""
    x, y = (2 * g - 1 for g in _grid(_PIGMENT))
    return np.hypot(x, y), (np.arctan2(y, x) % (2 * np.pi) * (_ANGLES / (2 * np.pi))).astype(np.intp) % _ANGLES


def _f32(value: Any) -> Array:
    return np.asarray(value, np.float32)


def _resize(coarse: Array, size: int) -> Array:
    ratio = size / coarse.shape[0]
    # Linear is enough, and faster, where a coefficient spans few pixels; over many its creases would show.
    how = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR if ratio < 2.5 else cv2.INTER_CUBIC
    return cv2.resize(coarse, (size, size), interpolation=how)


def _noise(rng: np.random.Generator, cells: int, size: int, channels: int = 1) -> Array:
    """Smooth noise of about unit deviation with `cells` coefficients a side, the same at every size."""
    shape = (cells, cells) if channels == 1 else (cells, cells, channels)
    return _resize(rng.standard_normal(shape, dtype=np.float32), size)


def _fill(points: Array, side: int, fine: int = 4) -> Array:
    """Polygon as uint8 coverage 0..255, antialiased by drawing `fine` times larger."""
    canvas = np.zeros((side * fine, side * fine), np.uint8)
    # A pixel centre is at +0.5 in image shares but at +0 for OpenCV.
    scaled = np.round((points * fine - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [scaled], 255, lineType=cv2.LINE_8, shift=4)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)


def _blur(image: Array, sigma: float) -> Array:
    """Gaussian blur; below a fifth of a pixel there is nothing to do."""
    return image if sigma < 0.2 else cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)


def _spread(weight: Array, tone: Any = (1.0, 1.0, 1.0)) -> Array:
    """`weight` times a three-part tone; merging planes is far faster than broadcasting over a short last axis."""
    return cv2.merge([weight * np.float32(part) for part in tone])


def _mix(image: Array, colour: Any, weight: Array) -> None:
    """Blend a colour (or an image) into `image`, in place."""
    over = _f32(colour)
    if over.ndim == 1:
        over = np.full_like(image, over)
    cv2.blendLinear(over, image, weight, 1 - weight, image)


def _lines(curves: list[Array], widths: list[float], values: list[int], size: int) -> Array:
    """Antialiased curves (points in image shares, widths in 1/128 of the side) as coverage 0..1."""
    fine = 2 if size <= 256 else 1
    side = size * fine
    canvas = np.zeros((side, side), np.uint8)
    for points, width, value in zip(curves, widths, values, strict=True):
        thick = width * side / 128
        # A line cannot be thinner than a pixel, so a finer one is drawn fainter.
        shade = int(value * min(1.0, thick))
        cv2.polylines(
            canvas, [np.round((points * side - 0.5) * 16).astype(np.int32)], False, shade, max(1, round(thick)),
            cv2.LINE_AA, 4,
        )  # fmt: skip
    small = canvas if fine == 1 else cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def _dots(points: Array, radii: Array, size: int) -> Array:
    """Antialiased discs (centres and radii in image shares) as coverage 0..1."""
    fine = 2 if size <= 256 else 1
    side = size * fine
    canvas = np.zeros((side, side), np.uint8)
    for (x, y), r in zip(np.round((points * side - 0.5) * 16).astype(int), radii * side * 16, strict=True):
        cv2.circle(canvas, (int(x), int(y)), max(6, int(r)), 255, -1, cv2.LINE_AA, 4)
    small = canvas if fine == 1 else cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


# ---------------------------------------------------------------------------------------------- skin


def skin_lab(ita: float, blush: float = 0.5) -> tuple[float, float, float]:
    """Base skin in Lab from the individual typology angle.

    Melanin sets the angle; yellow (b*) peaks at middling melanin, red (a*) is haemoglobin (`blush`, 0..1) plus a share
    of melanin; lightness then follows from the definition ita = atan((L - 50) / b).
    """
    melanin = float(np.clip((ITA_ENDS[0] - ita) / (ITA_ENDS[0] - ITA_ENDS[1]), 0, 1))
    b = 10.5 + 9.0 * np.sin(np.pi * min(1.0, 0.1 + melanin)) ** 1.2
    a = 0.5 + 8.5 * blush + 3.0 * melanin
    return float(50 + b * np.tan(np.radians(ita))), float(a), float(b)


def _skin(rng: np.random.Generator, base: tuple[float, float, float], s: PhantomSettings, size: int) -> Array:
    """Mottled, finely lined skin in Lab."""
    mottle, grain = rng.uniform(*s.mottle), rng.uniform(*s.grain)
    coarse = _noise(rng, 5, size, 3) * _f32([1.0, 0.9, 0.9]) + _noise(rng, 18, size, 3) * _f32([0.9, 0.9, 0.8])
    skin = _f32(base) + coarse * np.float32(mottle)
    fine = _noise(rng, 40, size) * 0.5 + _noise(rng, 96, size) * 0.6
    skin[..., 0] += fine * np.float32(grain) + _skin_lines(rng, size) * np.float32(grain * rng.uniform(0, 1.1))
    return skin


def _skin_lines(rng: np.random.Generator, size: int) -> Array:
    """Two crossing sets of furrows: noise stretched along a direction, then turned."""
    lines = np.zeros((size, size), np.float32)
    for _ in range(2):
        strip = cv2.resize(
            rng.standard_normal((90, 16), dtype=np.float32), (size, size), interpolation=cv2.INTER_LINEAR
        )
        turn = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), float(rng.uniform(0, 180)), 1.45)
        lines += np.minimum(cv2.warpAffine(strip, turn, (size, size), borderMode=cv2.BORDER_REFLECT_101), 0.4)
    return lines


def _freckles(rng: np.random.Generator, skin: Array, size: int) -> None:
    """Brown spots that are not the lesion."""
    count = int(rng.integers(3, 45))
    spots = _dots(rng.uniform(0, 1, (count, 2)), rng.uniform(0.003, 0.022, count) * rng.uniform(0.5, 1.1), size)
    spots = _blur(spots, rng.uniform(0.004, 0.012) * size)
    skin += _spread(spots, _f32([-11, 4.5, 7]) * np.float32(rng.uniform(0.3, 1.1)))


def _follicles(rng: np.random.Generator, skin: Array, size: int) -> None:
    """A loose lattice of pores, darker or paler than the skin."""
    step = rng.uniform(0.05, 0.11)
    line = np.arange(-step, 1 + step, step)
    points = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    points = points + rng.normal(0, step * 0.25, points.shape)
    pores = _blur(_dots(points, np.full(len(points), rng.uniform(0.004, 0.010)), size), 0.006 * size)
    skin += _spread(pores, _f32([-9, 2, 3]) * np.float32(rng.choice([-0.5, 0.6, 1.0, 1.3])))


# ---------------------------------------------------------------------------------------------- lesion


def _edge(rng: np.random.Generator, cover: Array, radius: float, crispness: float, s: PhantomSettings) -> Array:
    """Pigment strength 0..1: the filled contour, blurred sector by sector and frayed.

    The visible edge lies a little inside the contour where it is blurred, as observers draw around the whole fade.
    """
    size = cover.shape[0]
    crisp = min(rng.uniform(*s.crisp), 0.14 * radius)
    soft = crisp + (min(rng.uniform(*s.soft), 0.26 * radius) - crisp) * (1 - crispness)
    where = np.clip(0.5 + 0.7 * _noise(rng, 4, size), 0, 1)
    sharp = _blur(cover, crisp * size)
    edge = sharp + (_blur(cover, max(soft, crisp) * size) - sharp) * where
    fray = _noise(rng, 18, size) + _noise(rng, 44, size) + 0.8 * _noise(rng, 80, size)
    edge += fray * edge * (1 - edge) * np.float32(rng.uniform(0.2, 1.2))
    edge = np.clip((edge - 0.3) / 0.55, 0, 1)
    return edge * edge * (3 - 2 * edge)


def _tints(skin: tuple[float, float, float], dull: float) -> dict[str, Array]:
    """The six dermoscopic colours in Lab, as seen on this skin; `dull` pulls them towards grey-brown."""
    light, a, b = skin
    keep = 1 - 0.45 * dull
    tints = {
        "white": (min(94, light + 9), a * 0.6, b * 0.45),
        "red": (light * 0.75, a + 20 * keep, b + 8),
        "light-brown": (light * 0.76, a + 12 * keep, b + 17 * keep),
        "dark-brown": (light * 0.47, a * 0.7 + 15 * keep, b * 0.7 + 16 * keep),
        "blue-gray": (light * 0.58, a * 0.3, -5.0 + b * 0.1),
        "black": (light * 0.2 + 3, 6.0, 6.0),
    }
    return {name: _f32(tint) for name, tint in tints.items()}


def _painted(rng: np.random.Generator, contour: Array, colors: tuple[str, ...]) -> tuple[Array, Array, float]:
    """Colour index of each cell of the lesion frame, relative radius there, and the half-side of the frame.

    Every colour gets a share of the true area fixed in advance (5% at least), so the truth needs no threshold.
    """
    radius, vertex = _polar()
    radii = np.hypot(contour[:, 0], contour[:, 1]).astype(np.float32)
    half = float(radii.max()) * 1.03
    rho = radius * np.float32(half) / radii[vertex]
    inside = np.flatnonzero(rho.ravel() < 1)
    labels = np.zeros(_PIGMENT * _PIGMENT, np.intp)
    shares = rng.uniform(0.07, 0.32, len(colors) - 1)
    shares = np.maximum(0.05, shares * min(1.0, 0.7 / max(shares.sum(), 1e-6)))
    x, y = (2 * g - 1 for g in _grid(_PIGMENT))
    for k, share in enumerate(shares, start=1):
        target = rng.uniform(-0.6, 0.6, 2)
        away = np.hypot(x - target[0], y - target[1])
        shape = (away, away, rho, -rho)[rng.integers(4)] * np.float32(rng.uniform(0.5, 3.0))
        want = shape + 0.6 * _noise(rng, 6, _PIGMENT) + rng.uniform(0.1, 0.6) * _noise(rng, 18, _PIGMENT)
        free = inside[labels[inside] == 0]
        take = min(len(free), int(np.ceil(share * len(inside))))
        labels[free[np.argpartition(want.ravel()[free], take - 1)[:take]]] = k
    return labels.reshape(_PIGMENT, _PIGMENT), rho, half


def _pigment(
    rng: np.random.Generator, at: Attributes, base: tuple[float, float, float], size: int
) -> tuple[Array, Array]:
    """Lab colour of the pigment and relative radius, warped from the lesion frame to the image."""
    keratosis = at.diagnosis == "seborrheic_keratosis"
    tints = _tints(base, rng.uniform(0.3, 1.0) if keratosis else rng.uniform(0, 0.4))
    labels, rho, half = _painted(rng, at.contour, at.colors)
    table = np.stack([tints[c] for c in at.colors]) + rng.normal(0, 2.5, (len(at.colors), 3)).astype(np.float32)
    paint = _blur(table[labels], rng.uniform(0.8, 3.2))
    paint[..., 0] += (rho - 0.6) * np.float32(rng.normal(7.0, 7.0))
    scale = 2 * half * at.radius * size / _PIGMENT  # image pixels per cell
    shift = [c * size - half * at.radius * size + 0.5 * scale - 0.5 for c in at.centre]
    warp = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    both = np.dstack([paint, np.minimum(rho, 2)])
    both = cv2.warpAffine(both, warp, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return both[..., :3].copy(), both[..., 3]


def _mesh(rng: np.random.Generator, size: int, period: float) -> Array:
    """A warped honeycomb, about -1 in the lines and +1 in the holes."""
    x, y = _grid(size)
    bend = _noise(rng, 11, size, 2) * np.float32(0.6 * period)
    turn = rng.uniform(0, np.pi)
    total = np.zeros((size, size), np.float32)
    for k in range(3):
        a = turn + k * np.pi / 3
        wave = (x + bend[..., 0]) * np.float32(np.cos(a)) + (y + bend[..., 1]) * np.float32(np.sin(a))
        total += np.cos(wave * np.float32(2 * np.pi / (0.866 * period)))
    # Plain noise of the same period breaks the lattice, which skin never keeps for long.
    return total * np.float32(0.45) + _noise(rng, int(0.8 / period), size) * np.float32(rng.uniform(0.3, 0.8))


def _network(rng: np.random.Generator, paint: Array, size: int) -> None:
    """Pigment network: dark mesh, lighter holes, line width and strength varying over the lesion."""
    mesh = _mesh(rng, size, rng.uniform(0.026, 0.05))
    lines = np.clip(0.5 - mesh + 0.4 * _noise(rng, 8, size), 0, 1) - 0.5
    strength = np.clip(0.5 + 0.7 * _noise(rng, 6, size), 0, 1.5) * np.float32(rng.uniform(4, 13))
    paint[..., 0] -= lines * strength
    paint[..., 2] -= lines * strength * 0.3


def _cobblestone(rng: np.random.Generator, paint: Array, size: int) -> None:
    """Large polygonal globules packed side by side."""
    mesh = _mesh(rng, size, rng.uniform(0.05, 0.09))
    paint[..., 0] -= np.clip(mesh, -0.4, 0.9) * np.float32(rng.uniform(3, 8))


def _ridges(rng: np.random.Generator, paint: Array, size: int) -> None:
    """Brain-like fissures: the zero crossings of smooth noise."""
    field_ = np.abs(_noise(rng, int(rng.integers(12, 26)), size))
    paint[..., 0] -= np.clip(1 - field_ * 2.5, 0, 1) * np.float32(rng.uniform(5, 13))


def _inside(rng: np.random.Generator, at: Attributes, count: int, low: float, high: float) -> Array:
    """Points between two relative radii of the lesion, in image shares."""
    vertex = rng.integers(0, _ANGLES, count)
    reach = np.sqrt(rng.uniform(low**2, high**2, count))[:, None]
    return at.contour[vertex] * reach * at.radius + np.array(at.centre)


def _globules(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Round dark clods, scattered or along the rim."""
    low = rng.choice([0.0, 0.0, 0.7])
    points = _inside(rng, at, int(rng.integers(8, 60)), low, 0.95)
    spots = _dots(points, rng.uniform(0.004, 0.013, len(points)), size)
    paint += _spread(_blur(spots, 0.004 * size), _f32([-15, 1, 0]) * np.float32(rng.uniform(0.5, 1.3)))


def _blotch(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """A dark structureless area, usually off the middle."""
    points = _inside(rng, at, int(rng.integers(1, 4)), 0.0, 0.6)
    spot = _dots(points, at.radius * rng.uniform(0.15, 0.45, len(points)), size)
    spot = _blur(spot, at.radius * rng.uniform(0.05, 0.2) * size)
    paint[..., 0] *= 1 - spot * np.float32(rng.uniform(0.2, 0.5))


def _streaks(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Radial lines that end at the border."""
    count = int(rng.integers(15, 45))
    start = int(rng.integers(_ANGLES))
    vertex = (start + rng.integers(0, rng.integers(120, _ANGLES), count)) % _ANGLES
    rays = [
        at.contour[v] * np.array([[r], [1.0]]) * at.radius + at.centre
        for v, r in zip(vertex, rng.uniform(0.6, 0.85, count), strict=True)
    ]
    lines = _blur(_lines(rays, [1.6] * count, [255] * count, size), 0.004 * size)
    paint[..., 0] *= 1 - lines * np.float32(rng.uniform(0.3, 0.6))


def _vessels(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Short curved red vessels."""
    count = int(rng.integers(5, 18))
    curves = [
        _curve(rng, p, rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.09)) for p in _inside(rng, at, count, 0, 0.9)
    ]
    lines = _lines(curves, [1.0] * count, [255] * count, size)
    paint += _spread(lines, _f32([-7, 17, 3]))


def _cysts(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Milia-like cysts: small white-yellow dots."""
    points = _inside(rng, at, int(rng.integers(4, 30)), 0, 0.92)
    spots = _blur(_dots(points, rng.uniform(0.004, 0.011, len(points)), size), 0.004 * size)
    paint += _spread(spots, _f32([24, -4, 2]) * np.float32(rng.uniform(0.4, 1)))


def _openings(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Comedo-like openings: brown-black plugs."""
    points = _inside(rng, at, int(rng.integers(3, 18)), 0, 0.92)
    spots = _blur(_dots(points, rng.uniform(0.006, 0.016, len(points)), size), 0.005 * size)
    paint[..., 0] *= 1 - spots * np.float32(rng.uniform(0.3, 0.65))


def _veil(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """A milky blue haze over the blue-gray part, so it deepens a colour that is there already."""
    haze = np.clip(0.3 + _noise(rng, 6, size), 0, 1) * np.clip((9 - paint[..., 2]) / 9, 0, 1)
    paint += (_f32([58, -1, -11]) - paint) * (haze * np.float32(rng.uniform(0.2, 0.5)))[..., None]


def _regression(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Peppering: fine gray dots over the scar-like white part."""
    points = _inside(rng, at, int(rng.integers(15, 60)), 0, 0.9)
    pale = np.clip((paint[..., 0] - 50) / 25, 0, 1)
    spots = _dots(points, np.full(len(points), 0.004), size) * pale
    paint += _spread(spots, _f32([-14, -3, -9]))


def _structured(rng: np.random.Generator, at: Attributes, paint: Array, size: int) -> None:
    """Paint the structures that the diagnosis asked for."""
    textures = {"network": _network, "cobblestone": _cobblestone, "ridges": _ridges}
    marks = {"globules": _globules, "blotch": _blotch, "streaks": _streaks, "vessels": _vessels, "cysts": _cysts,
             "openings": _openings, "blue-white-veil": _veil, "regression": _regression}  # fmt: skip
    for name in at.structures:
        if name in textures:
            textures[name](rng, paint, size)
        else:
            marks[name](rng, at, paint, size)


def _lesion(rng: np.random.Generator, at: Attributes, base: tuple[float, float, float], s: PhantomSettings, lab: Array,
            cover: Array) -> None:  # fmt: skip
    """Pigment and structures over the skin, weighted by the edge."""
    size = cover.shape[0]
    paint, rho = _pigment(rng, at, base, size)
    rough = _noise(rng, 13, size, 3) * _f32([1.0, 0.45, 0.6]) * np.float32(rng.uniform(0.5, 4.5))
    rough[..., 0] += _noise(rng, 30, size) * rng.uniform(0.5, 4) + _noise(rng, 70, size) * rng.uniform(0.5, 4)
    paint += rough
    _structured(rng, at, paint, size)
    crispness = rng.uniform(0.6, 1) if at.diagnosis == "seborrheic_keratosis" else rng.uniform(0, 1) ** 1.6
    edge = _edge(rng, cover, at.radius, crispness, s)
    edge *= 1 - np.float32(0.55 * (1 - crispness) * rng.uniform()) * np.clip(rho, 0, 1) ** 2
    edge *= np.clip(1 + rng.uniform(0, 0.3) * _noise(rng, 7, size), 0.4, 1) * np.float32(rng.uniform(*s.opacity) ** 0.7)
    if rng.uniform() < 0.35:
        _halo(rng, lab, cover, at.radius)
    _mix(lab, paint, edge)


def _halo(rng: np.random.Generator, lab: Array, cover: Array, radius: float) -> None:
    """Redness or a tan around the lesion, fading outwards."""
    reach = _blur(cover, radius * rng.uniform(0.1, 0.25) * cover.shape[0])
    tone = (_f32([-3, 6, 1]), _f32([-3, 3, 6]))[rng.integers(2)]
    lab += _spread(reach, tone * np.float32(rng.uniform(0.3, 1)))


# ---------------------------------------------------------------------------------------------- artefacts


def _curve(rng: np.random.Generator, start: Array, angle: float, length: float, bend: float = 0.8) -> Array:
    """A quadratic curve of twelve points from `start`."""
    t = np.linspace(0, 1, 12)[:, None]
    way = length * np.array([np.cos(angle), np.sin(angle)])
    side = np.array([-way[1], way[0]]) * rng.normal(0, bend)
    return np.asarray(start) + t * way + t * (1 - t) * side


def _hair(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Strands with a common direction and colour; each has its own bend, width and strength."""
    low, high = s.hair_count
    count = int(low + (high - low) * rng.uniform() ** 1.5)
    stubble = rng.uniform() < 0.15
    main, spread = rng.uniform(0, 2 * np.pi), rng.choice([0.25, 0.6, 2.5])
    width = rng.uniform(*s.hair_width)
    curves = [
        _curve(
            rng,
            rng.uniform(-0.15, 1.15, 2),
            rng.normal(main, spread),
            rng.uniform(0.05, 0.15) if stubble else rng.uniform(0.3, 1.3),
            0.7,
        )
        for _ in range(count)
    ]
    cover = _lines(curves, list(width * rng.uniform(0.6, 1.3, count)), list(rng.integers(120, 256, count)), size)
    shades = [(0.10, 0.07, 0.06), (0.17, 0.10, 0.07), (0.32, 0.19, 0.12), (0.48, 0.33, 0.2), (0.80, 0.74, 0.66)]
    colour = _f32(shades[rng.choice(5, p=[0.2, 0.34, 0.28, 0.11, 0.07])])
    _mix(rgb, colour, _blur(cover, rng.uniform(0, 0.004) * size) * np.float32(rng.uniform(0.65, 1)))


def _ink(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Surgical marker: dots, a ring of dashes, or a scribble, in violet."""
    colour = _f32([(0.36, 0.22, 0.6), (0.45, 0.33, 0.62), (0.16, 0.14, 0.5)][rng.integers(3)])
    kind = rng.integers(3)
    if kind == 0:
        around = rng.uniform(0, 2 * np.pi, rng.integers(3, 8))
        points = 0.5 + rng.uniform(0.28, 0.45) * np.stack([np.cos(around), np.sin(around)], axis=1)
        cover = _dots(points, rng.uniform(0.008, 0.016, len(points)), size)
    elif kind == 1:
        around = np.linspace(0, 2 * np.pi, 60)
        wobble = rng.uniform(0.33, 0.46) + 0.012 * rng.normal(size=60)
        loop = 0.5 + wobble[:, None] * np.stack([np.cos(around) * rng.uniform(0.75, 1), np.sin(around)], axis=1)
        cover = _lines([loop], [rng.uniform(1.2, 3)], [255], size) * np.clip(0.5 + _noise(rng, 24, size), 0, 1)
    else:
        at = rng.choice([0.1, 0.88], 2) + rng.normal(0, 0.06, 2)
        strokes = [
            _curve(rng, at + rng.normal(0, 0.04, 2), rng.normal(0.8, 0.5), rng.uniform(0.08, 0.28)) for _ in range(14)
        ]
        cover = _lines(strokes, [1.4] * 14, [230] * 14, size)
    _mix(rgb, colour, _blur(cover, 0.005 * size) * np.float32(rng.uniform(0.35, 0.9)))


def _ruler(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """A graduated scale: a thin one lying near an edge, or bold ticks that enter from the edge."""
    bold = rng.uniform() < 0.25
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
    turned = rng.integers(8)
    flip = {5: lambda p: p[:, ::-1], 6: lambda p: 1 - p, 7: lambda p: 1 - p[:, ::-1]}.get(int(turned), lambda p: p)
    width = rng.uniform(1.5, 3.0) if bold else rng.uniform(0.45, 1.0)
    cover = _lines([flip(p) for p in lines], [width] * len(lines), [255] * len(lines), size)
    _mix(rgb, _f32([0.1, 0.09, 0.1]), cover * np.float32(rng.uniform(0.6, 1)))


def _bubbles(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Air in the gel: bright rims with a faint inside."""
    count = int(rng.integers(1, 10))
    points = rng.uniform(0, 1, (count, 2))
    radii = rng.uniform(0.008, 0.05, count) * rng.choice([0.6, 1.0, 1.8])
    outer, inner = _dots(points, radii, size), _dots(points, radii * 0.8, size)
    rim = np.clip(outer - inner, 0, 1) * np.clip(0.7 + 0.5 * _noise(rng, 10, size), 0, 1)
    _mix(rgb, _f32([1, 0.98, 0.95]), _blur(rim, 0.003 * size) * np.float32(rng.uniform(0.25, 0.8)))
    rgb += _spread(inner * np.float32(rng.uniform(-0.03, 0.05)))


def _glare(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Specular light: fine flecks on the surface, or lamps seen at the edge of the plate."""
    if rng.uniform() < 0.6:
        near = rng.uniform(0.2, 0.8, 2)
        points = near + rng.normal(0, 0.15, (int(rng.integers(5, 40)), 2))
        cover = _blur(_dots(points, rng.uniform(0.002, 0.007, len(points)), size), 0.003 * size)
    else:
        points = np.stack([rng.choice([0.0, 1.0], 3), rng.uniform(0.1, 0.9, 3)], axis=1)
        cover = _blur(_dots(points, rng.uniform(0.02, 0.06, 3), size), rng.uniform(0.01, 0.03) * size)
    _mix(rgb, _f32([1, 1, 1]), cover * np.float32(rng.uniform(0.4, 0.95)))


def _patch(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """A coloured sticker that enters from an edge."""
    colours = [
        (0.1, 0.5, 0.8),
        (0.95, 0.55, 0.1),
        (0.25, 0.75, 0.7),
        (0.95, 0.8, 0.25),
        (0.55, 0.57, 0.6),
        (0.3, 0.6, 0.3),
    ]
    for _ in range(int(rng.integers(1, 3))):
        edge, along = rng.integers(4), rng.uniform(0, 1)
        radius = rng.uniform(0.12, 0.3)
        out = radius * rng.uniform(0.1, 0.7)
        x, y = [(-out, along), (1 + out, along), (along, -out), (along, 1 + out)][edge]
        cover = _dots(np.array([[x, y]]), np.array([radius]), size)
        colour = _f32(colours[rng.integers(6)]) * np.float32(rng.uniform(0.7, 1.05))
        _mix(rgb, colour, cover)
        if rng.uniform() < 0.4:
            _mix(rgb, _f32(colours[rng.integers(6)]), _dots(np.array([[x, y]]), np.array([radius * 0.6]), size))


def _far(rng: np.random.Generator, size: int) -> Array:
    """Distance from about the middle, in half-sides, with the aspect of a stretched frame."""
    x, y = _grid(size)
    cx, cy = rng.normal(0.5, 0.02, 2)
    aspect = rng.uniform(0.75, 1.0)
    return np.hypot((x - np.float32(cx)) * np.float32(2), (y - np.float32(cy)) * np.float32(2 * aspect))


def _vignette(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """The dark tube around the view: only the corners, or a full circle, with a hard or a soft edge."""
    far = _far(rng, size)
    radius = rng.uniform(0.9, 1.05) if rng.uniform() < 0.4 else rng.uniform(1.02, 1.3)
    width = rng.choice([0.015, 0.03, 0.1, 0.3])
    lit = np.clip((radius - far) / np.float32(width) + 0.5, 0, 1)
    floor = np.float32(rng.uniform(0.0, 0.12)) * _f32([1.1, 1.0, 0.95])
    _mix(rgb, floor, 1 - lit * lit * (3 - 2 * lit))


def _ring(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """The rim of the contact plate: a faint ellipse, with another tone outside."""
    far = _far(rng, size)
    radius = np.float32(rng.uniform(0.6, 0.98))
    rgb *= _spread(1 + np.clip((far - radius) * 40, 0, 1) * np.float32(rng.uniform(-0.10, 0.08)))
    rim = np.exp(-(((far - radius) / np.float32(rng.uniform(0.012, 0.03))) ** 2))
    rgb += _spread(rim * np.clip(0.5 + 0.5 * _noise(rng, 5, size), 0, 1) * np.float32(rng.choice([-0.06, 0.05, 0.1])))


_ARTEFACTS = {"ink": _ink, "hair": _hair, "bubbles": _bubbles, "glare": _glare, "ring": _ring, "ruler": _ruler,
              "patch": _patch}  # fmt: skip


# ---------------------------------------------------------------------------------------------- camera


def _light(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Uneven illumination, exposure and white balance, all multiplicative."""
    x, y = _grid(size)
    strength, a = rng.uniform(*s.illumination), rng.uniform(0, 2 * np.pi)
    slope = (x - np.float32(0.5)) * np.float32(np.cos(a)) + (y - np.float32(0.5)) * np.float32(np.sin(a))
    bowl = (x - np.float32(0.5)) ** 2 + (y - np.float32(0.5)) ** 2
    field_ = 1 + np.float32(strength) * slope - np.float32(2 * strength * rng.uniform()) * bowl
    spread, blue = s.cast
    tilt = rng.normal(0, spread)
    gain = _f32([1 - tilt, 1 + rng.normal(0, 0.25 * spread), 1 + tilt + rng.uniform(0, 2 * blue)])
    rgb *= _spread(field_, gain * np.float32(np.exp(rng.uniform(*np.log(s.exposure))) / gain.mean()))


def _camera(rng: np.random.Generator, grain: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> Array:
    """Defocus, sensor noise and compression; returns the eight-bit image."""
    rgb = _blur(rgb, rng.uniform(*s.blur) * size / 128)
    level_ = np.float32(rng.uniform(*s.noise) / 255)
    rgb = rgb + _spread(grain.standard_normal((size, size), dtype=np.float32) * level_)
    image = (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)
    quality, pressed = int(rng.integers(55, 92)), rng.uniform() < s.jpeg
    if pressed:
        _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR))
    return image


# ---------------------------------------------------------------------------------------------- the phantom


def _artefacts(rng: np.random.Generator, s: PhantomSettings) -> tuple[str, ...]:
    names = ("freckles", "follicles", *_ARTEFACTS, "vignette")
    return tuple(name for name in names if rng.uniform() < getattr(s, name))


def _photograph(
    at: Attributes, cover: Array, seed: int, index: int, s: PhantomSettings
) -> tuple[Array, tuple[str, ...]]:
    """Paint the scene in Lab and take its picture. Each stage has a stream of its own, so none shifts another."""
    size = cover.shape[0]
    rng, skin_rng, spoil = (_generator(seed, index, k) for k in (1, 2, 3))
    base = skin_lab(at.ita, float(skin_rng.uniform(0, 1)))
    artefacts = _artefacts(spoil, s)
    lab = _skin(skin_rng, base, s, size)
    for name, paint in (("freckles", _freckles), ("follicles", _follicles)):
        if name in artefacts:
            paint(skin_rng, lab, size)
    _lesion(rng, at, base, s, lab, cover)
    rgb = cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)
    for name, spoil_with in _ARTEFACTS.items():
        if name in artefacts:
            spoil_with(spoil, rgb, s, size)
    _light(spoil, rgb, s, size)
    if "vignette" in artefacts:
        _vignette(spoil, rgb, s, size)
    return _camera(spoil, _generator(seed, index, 1000 + size), rgb, s, size), artefacts


def draw(seed: int, index: int, size: int = 128, *, settings: PhantomSettings = DEFAULT, **wanted: Any) -> Phantom:
    """Phantom number `index` of `seed`.

    `wanted` may pin `diagnosis`, `skin_type` (1..6), `asymmetry` ("low", "medium", "high") and `colors` (a tuple of
    names from `COLORS`, the base colour first).
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"size must be from {MIN_SIZE} to {MAX_SIZE} px, got {size}; draw at a size in that range and resize"
        )
    at = draw_attributes(seed, index, settings=settings, **wanted)
    cover = _fill((at.contour * at.radius + np.array(at.centre)) * size, size, 4 if size <= 192 else 2)
    image, artefacts = _photograph(at, cover.astype(np.float32) / 255, seed, index, settings)
    return Phantom(
        image=image,
        mask=cover > 127,
        diagnosis=at.diagnosis,
        malignant=at.malignant,
        skin_type=at.skin_type,
        ita=at.ita,
        asymmetry=at.asymmetry,
        asymmetry_axes=at.asymmetry_axes,
        border_irregularity=at.border_irregularity,
        colors=at.colors,
        color_count=at.color_count,
        structures=at.structures,
        artefacts=artefacts,
        diameter_mm=at.diameter_mm,
        index=index,
        seed=seed,
        size=size,
    )


def draw_many(
    seed: int, indices: Iterable[int], size: int = 128, *, settings: PhantomSettings = DEFAULT, **wanted: Any
) -> Iterator[Phantom]:
    """Phantoms of `seed`, one at a time, in the order of `indices`."""
    for index in indices:
        yield draw(seed, index, size, settings=settings, **wanted)
