"""What is decided before a pixel is painted: contour, colours, malignancy, diagnosis, structures, place and skin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from factory.phantom.contour import caliper, levelled_contour, measure_irregularity
from factory.phantom.fields import Array, generator
from factory.phantom.settings import (
    COLORS,
    DEFAULT,
    DIAGNOSES,
    FIELD_MM,
    ITA_EDGES,
    ITA_ENDS,
    LEVELS,
    LOGIT_0,
    LOGIT_ASYMMETRY,
    LOGIT_BORDER,
    LOGIT_COLORS,
    NEVUS_SHARE,
    PhantomSettings,
)

_TRIES = 64  # attempts at an attribute draw that agrees with what was pinned


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a phantom states of itself.

    `asymmetry` is the mean of `asymmetry_axes`: for the major, then the minor principal axis of the uncropped shape,
    area(shape XOR its reflection across that axis) / (2 * area(shape)). `border_irregularity` is
    perimeter^2 / (4 pi area) - 1 of the 512-vertex contour: 0 for a disc, growing with every lobe and notch.
    `diameter_mm` is the largest caliper of the uncropped contour, `ita` the skin's typology angle in degrees.
    """

    diagnosis: str
    malignant: bool
    skin_type: int
    ita: float
    asymmetry: float
    asymmetry_axes: tuple[float, float]
    border_irregularity: float
    colors: tuple[str, ...]
    structures: tuple[str, ...]
    diameter_mm: float

    @property
    def color_count(self) -> int:
        return len(self.colors)


@dataclass(frozen=True, kw_only=True)
class Attributes(Truth):
    """All that is decided before a pixel is painted; `contour` is (512, 2) in the lesion frame, of area pi."""

    probability: float
    radius: float  # of the disc of equal area, as a share of the image side
    centre: tuple[float, float]
    contour: Array = field(repr=False, compare=False)


class _Shape(NamedTuple):
    """A lesion as a clinician would score it."""

    contour: Array
    axes: tuple[float, float]
    irregularity: float
    colors: tuple[str, ...]
    probability: float

    @property
    def asymmetry(self) -> float:
        return sum(self.axes) / 2


def malignancy_probability(asymmetry: float, border_irregularity: float, color_count: int) -> float:
    """The stated chance that a lesion of these attributes is malignant."""
    logit = LOGIT_0 + LOGIT_ASYMMETRY * asymmetry + LOGIT_BORDER * border_irregularity + LOGIT_COLORS * color_count
    return float(1.0 / (1.0 + np.exp(-logit)))


def _palette(rng: np.random.Generator, atypia: float) -> tuple[str, ...]:
    """Dermoscopic colours, the base first; atypical lesions carry more of them."""
    bases = ("light-brown", "dark-brown", "red", "blue-gray", "black")
    base = bases[rng.choice(5, p=[0.46, 0.38, 0.12, 0.015, 0.025])]
    weights = {"light-brown": 3.0, "dark-brown": 3.2, "red": 1.2, "white": 0.7, "blue-gray": 0.8, "black": 1.1}
    others = [c for c in COLORS if c != base]
    odds = np.array([weights[c] for c in others])
    count = int(rng.binomial(5, 0.12 + 0.36 * atypia))
    chosen = rng.choice(5, size=count, replace=False, p=odds / odds.sum())
    return (base, *(others[c] for c in chosen))


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


def _shape(rng: np.random.Generator, wanted: dict[str, Any]) -> _Shape:
    """A latent atypia, and the contour and colours that come of it."""
    atypia = rng.uniform()
    contour, axes = levelled_contour(rng, atypia, wanted.get("asymmetry"))
    colors = tuple(wanted.get("colors") or _palette(rng, atypia))
    irregularity = measure_irregularity(contour)
    return _Shape(contour, axes, irregularity, colors, malignancy_probability(sum(axes) / 2, irregularity, len(colors)))


def _diagnosed(rng: np.random.Generator, wanted: dict[str, Any]) -> tuple[_Shape, str]:
    """A shape and its diagnosis, drawn until the diagnosis is the pinned one."""
    asked = wanted.get("diagnosis")
    for _ in range(_TRIES):
        shape = _shape(rng, wanted)
        diagnosis = "nevus" if rng.uniform() < NEVUS_SHARE else "seborrheic_keratosis"
        diagnosis = "melanoma" if rng.uniform() < shape.probability else diagnosis
        if asked in (None, diagnosis):
            break
    # After that many tries the pins contradict the model, and a pin outranks it.
    return shape, asked or diagnosis


def draw_attributes(seed: int, index: int, *, settings: PhantomSettings = DEFAULT, **wanted: Any) -> Attributes:
    """The truth of a phantom without its pixels; a pinned diagnosis is met by drawing lesions until one has it."""
    wanted = {name: value for name, value in wanted.items() if value is not None}
    _check(wanted)
    rng = generator(seed, index, 0)
    skin_type = wanted.get("skin_type") or int(rng.choice(6, p=settings.skin_types)) + 1
    ita = _ita(rng, skin_type)
    shape, diagnosis = _diagnosed(rng, wanted)
    radius, centre = _place(rng, settings, diagnosis == "melanoma")
    return Attributes(
        diagnosis=diagnosis,
        malignant=diagnosis == "melanoma",
        probability=shape.probability,
        skin_type=skin_type,
        ita=ita,
        asymmetry=shape.asymmetry,
        asymmetry_axes=shape.axes,
        border_irregularity=shape.irregularity,
        colors=shape.colors,
        radius=radius,
        centre=centre,
        diameter_mm=caliper(shape.contour) * radius * FIELD_MM,
        structures=_structures(rng, diagnosis, shape.colors),
        contour=shape.contour,
    )
