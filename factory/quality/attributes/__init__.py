"""The ABC and D of a lesion, measured from its image and mask.

The ABCD rule was made for melanocytic lesions seen through a dermatoscope. These numbers describe a lesion; they
decide nothing, and no record is dropped for them.

    measurement                 what it is                                              after
    asymmetry, asymmetry_axes   area(shape XOR mirror image) / (2 area) across both     Stolz et al. 1994 (axes),
                                principal axes, major first, and their mean             Stoecker et al. 1992 (area)
    color_asymmetry             mean Delta E 76 between lesion and mirror image         Seidenari et al. 2006
    border_irregularity         compactness, perimeter^2 / (4 pi area) - 1              Golston et al. 1992
    radial_variance             deviation over mean of the distance from the centroid   Maglogiannis & Doukas 2009
    fractal_dimension           slope of length over chord, divider method              Claridge et al. 1992
    abrupt_octants              eighths of the border that end abruptly, 0..8           Stolz et al. 1994, B
    colors, color_shares        which of six colours cover a stated share               Stolz et al. 1994, C
    relative_diameter           largest Feret diameter over the image's shorter side    Abbasi et al. 2004, D
    diameter_mm                 the same in mm, where there is a scale                  Abbasi et al. 2004, D

Shape is read from the sub-pixel outline of the slightly smoothed mask, never from its staircase, and asymmetry and
compactness by the same two functions that state a phantom's truth from its analytic contour. A picture that was
squeezed to a square must be unstretched first (`measure(..., unstretch=4 / 3)`), or its shape is not the lesion's.

Abbasi et al., JAMA 292, 2004. Claridge et al., J. Biomed. Eng. 14, 1992. Golston, Stoecker & Moss, Comput. Med.
Imaging Graph. 16, 1992. Maglogiannis & Doukas, IEEE Trans. Inf. Technol. Biomed. 13, 2009. Otsu, IEEE
Trans. Syst. Man Cybern. 9, 1979. Seidenari, Pellacani & Grana, Acta Derm. Venereol. 86, 2006. Stoecker, Li & Moss,
Comput. Med. Imaging Graph. 16, 1992. Stolz et al., Eur. J. Dermatol. 4, 1994.
"""

from __future__ import annotations

from factory.quality.attributes.border import (
    abrupt_octants,
    border_irregularity,
    compactness,
    fractal_dimension,
    radial_variance,
)
from factory.quality.attributes.color import COLOR_SHARE, View, color_asymmetry, color_shares, colors, view
from factory.quality.attributes.masks import estimate_mask, estimated, separability
from factory.quality.attributes.measured import Measurements, measure, unstretched
from factory.quality.attributes.shape import MIN_PIXELS, asymmetry, asymmetry_axes, diameter, largest_piece, outline

__all__ = [
    "COLOR_SHARE", "MIN_PIXELS", "Measurements", "View", "abrupt_octants", "asymmetry", "asymmetry_axes",
    "border_irregularity", "color_asymmetry", "color_shares", "colors", "compactness", "diameter", "estimate_mask",
    "estimated", "fractal_dimension", "largest_piece", "measure", "outline", "radial_variance", "separability",
    "unstretched", "view",
]  # fmt: skip
