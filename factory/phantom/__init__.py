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

from factory.phantom.contour import level, measure_asymmetry, measure_irregularity
from factory.phantom.pigment import painted as _painted
from factory.phantom.scene import Phantom, draw, draw_many
from factory.phantom.settings import (
    ASYMMETRY_LEVELS,
    BORDER_LEVELS,
    COLORS,
    DEFAULT,
    DIAGNOSES,
    FIELD_MM,
    HELD_OUT,
    ITA_EDGES,
    LEVELS,
    NEVUS_SHARE,
    PhantomSettings,
)
from factory.phantom.skin import skin_lab
from factory.phantom.truth import Attributes, draw_attributes, malignancy_probability

__all__ = [
    "ASYMMETRY_LEVELS",
    "BORDER_LEVELS",
    "COLORS",
    "DEFAULT",
    "DIAGNOSES",
    "FIELD_MM",
    "HELD_OUT",
    "ITA_EDGES",
    "LEVELS",
    "NEVUS_SHARE",
    "Attributes",
    "Phantom",
    "PhantomSettings",
    "_painted",
    "draw",
    "draw_attributes",
    "draw_many",
    "level",
    "malignancy_probability",
    "measure_asymmetry",
    "measure_irregularity",
    "skin_lab",
]
