"""Where a lesion's mask comes from when its record has none, and how far each can be believed.

    measured     by colour distance from the skin (`quality/attributes`); its confidence is Otsu's separability
    segmenter    the network that the starter's gate judges with, on latents of the starter's VAE; its confidence is
                 the overlap with the lesion that it expects

The two confidences are both from 0 to 1 and are not on one scale. The network was fitted on phantoms alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from factory.images import RGB, Mask, resized
from factory.models.weights import STARTER
from factory.quality.attributes import estimated

SIDE = 128  # px of the shorter side: what the starter was fitted at
_STEP = 8  # px that sides are rounded to: the VAE's factor of 4, and one halving


@dataclass(frozen=True)
class FoundMask:
    """A mask (H, W), what found it (`estimated`, `segmenter`, or the record's own word) and its confidence, 0 to 1."""

    mask: Mask
    source: str | None
    confidence: float | None


MaskSource = Callable[[RGB], FoundMask]


def mask_source(name: str) -> MaskSource:
    """The source that `caption.masks` names."""
    return SegmenterMasks() if name == "segmenter" else measured_mask


def measured_mask(rgb: RGB) -> FoundMask:
    """The lesion of (H, W, 3) by its colour."""
    mask, confidence = estimated(rgb)
    return FoundMask(mask, "estimated", confidence)


class SegmenterMasks:
    """The latent segmenter as a mask source: image to latents by the generator's VAE, latents to a mask.

    generator: a joint generator's directory; segmenter: a directory that `fit gate` wrote for its VAE.
    """

    def __init__(self, generator: str | Path = STARTER, segmenter: str | Path = STARTER / "gate") -> None:
        # Torch is loaded where it is asked for: captions by colour need none.
        from factory.models.joint import JointDenoiser
        from factory.models.segmenter import load_latent_segmenter

        self.denoiser = JointDenoiser.load(generator)
        self.segmenter = load_latent_segmenter(segmenter, self.denoiser.vae_digest)

    def __call__(self, rgb: RGB) -> FoundMask:
        """The lesion of (H, W, 3): probability above one half, at the image's size."""
        height, width = rgb.shape[:2]
        chance = cv2.resize(self.probability(rgb), (width, height), interpolation=cv2.INTER_LINEAR)
        mask = np.asarray(chance > 0.5)
        return FoundMask(mask, "segmenter", expected_overlap(chance, mask))

    def probability(self, rgb: RGB) -> NDArray[Any]:
        """Lesion probability, float32, at about `SIDE` px of the shorter side."""
        import torch

        scale = SIDE / min(rgb.shape[:2])
        height, width = (max(SIDE, round(side * scale / _STEP) * _STEP) for side in rgb.shape[:2])
        small = np.ascontiguousarray(resized(rgb, width, height))
        pixels = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W)
        with torch.inference_mode():
            logits = self.segmenter(self.denoiser.encode_image(pixels))
        return np.asarray(torch.sigmoid(logits)[0, 0].numpy())


def expected_overlap(chance: NDArray[Any], mask: Mask) -> float:
    """The IoU of a mask (H, W) with a lesion that is where `chance` says, pixel by pixel; 0 for an empty mask."""
    if not mask.any():
        return 0.0
    return float(chance[mask].sum() / (mask.sum() + chance[~mask].sum()))
