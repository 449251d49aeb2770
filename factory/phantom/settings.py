"""What can be set, and what is fixed: ranges of the renderer, names, levels, and the coefficients of malignancy."""

from __future__ import annotations

from dataclasses import dataclass

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
    mottle: tuple[float, float] = (0.2, 3.4)  # small values more often
    grain: tuple[float, float] = (0.3, 1.8)
    freckles: float = 0.3
    follicles: float = 0.12
    neighbours: float = 0.2  # further lesions, which nobody outlined
    hair: float = 0.42
    hair_count: tuple[int, int] = (2, 45)
    hair_width: tuple[float, float] = (0.3, 1.2)  # in 1/128 of the image side
    vignette: float = 0.26
    ring: float = 0.14
    ruler: float = 0.3
    bubbles: float = 0.16
    glare: float = 0.22
    ink: float = 0.16
    patch: float = 0.27
    drape: float = 0.05
    illumination: tuple[float, float] = (0.0, 0.26)
    exposure: tuple[float, float] = (0.95, 1.42)
    red_light: float = 0.06
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
    mottle=(3.4, 4.6),
    grain=(1.8, 3.2),
    freckles=0.5,
    follicles=0.3,
    hair=0.75,
    hair_count=(30, 80),
    hair_width=(1.0, 2.2),
    vignette=0.5,
    bubbles=0.35,
    glare=0.4,
    illumination=(0.26, 0.4),
    exposure=(0.78, 0.95),
    cast=(0.1, 0.24),
    blur=(0.6, 1.5),
    noise=(2.6, 5.0),
    jpeg=0.6,
)
