"""A drawn lesion put into the picture it was drawn for, and how well the drawing kept that picture.

A VAE changes every pixel a little, so an inpainted image is not its background outside the mask until it is pasted
there. The seam is softened within the mask alone: outside it every pixel is the background's to the bit, which is what
makes such a pair a controlled change.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from factory.images import RGB, Mask
from factory.quality.normal_skin import grown

FEATHER = 1 / 64  # of the shorter side, inside the mask
MARGIN = 0.05  # of the shorter side: what a lesion may change around itself before it counts as the background
MAX_PSNR = 99.0  # dB, where no pixel differs


def pasted(drawn: RGB, background: RGB, mask: Mask, feather: float = FEATHER) -> RGB:
    """The drawn image inside the mask and the background outside, all (H, W): pixels outside are bit-equal to the
    background's, and those within `feather` of the shorter side of the mask's edge are a mixture."""
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)  # 1 at the edge
    share = np.minimum(depth / (1 + round(feather * min(mask.shape))), 1.0)[..., None]
    mixed = (share * drawn + (1 - share) * background).round().astype(np.uint8)
    return np.where(mask[..., None], mixed, background)


def background_psnr(drawn: RGB, background: RGB, mask: Mask, margin: float = MARGIN) -> float | None:
    """Peak signal-to-noise ratio in dB of the drawn image before it is pasted, against the background, outside the mask
    and its margin; at most MAX_PSNR. None where nothing is outside."""
    outside = ~grown(mask, round(margin * min(mask.shape)))
    if not outside.any():
        return None
    error = float(np.square(drawn[outside].astype(np.float64) - background[outside]).mean())
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / error))
