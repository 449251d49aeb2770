"""The gate's latent segmenter, fitted on phantoms: lesion masks from image latents.

It reads latents of the VAE it will be used with, and is fitted at the noise it will see: clean latents as a finished
sample has them, and blurred ones as a clean estimate at a checkpoint is. Each phantom is shown in several pictures that
other cameras and skins would have given (`fits/disturbed.py`). It never sees the generator or its masks. Beside it lie
an estimator of the true IoU (`fits/iou_estimator.py`) and the shapes that phantoms have (`quality/shape_prior.py`).
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factory import phantom
from factory.fits.disturbed import disturbed
from factory.fits.iou_estimator import agreements, fit_estimator
from factory.fits.joint import ENCODE_BATCH
from factory.fits.objective import RowNoise
from factory.fits.segmenter import turned
from factory.models.encoder import ImageEncoder, load_image_encoder
from factory.models.estimator import IouEstimator, save_estimator
from factory.models.segmenter import LatentSegmenter, dice_bce_loss, load_latent_segmenter, save_segmenter
from factory.quality.shape_prior import FILE as SHAPES_FILE
from factory.quality.shape_prior import ShapePrior
from factory.recipe import GateFitSection

NOISE = 0.35  # of unit-variance latents, at most
NOISED = 0.6  # share of rows with noise
BLURRED = 0.15  # share of rows whose latents are smoothed, as early estimates are


class GateExamples:
    """Image latents (N, C, h, w) as the sampler hands them to the gate, and masks (N, H, W), of `count` phantoms with
    `views` pictures each, encoded once."""

    def __init__(self, encoder: ImageEncoder, seed: int, count: int, size: int, views: int = 1) -> None:
        latents, masks = [], []
        for start in range(0, count, ENCODE_BATCH):
            indices = range(start, min(count, start + ENCODE_BATCH))
            pairs = [pair for index in indices for pair in _pairs(seed, index, size, views)]
            masks.append(np.stack([mask for _, mask in pairs]))
            latents.append(encoder.encode(_as_pixels(np.stack([image for image, _ in pairs]))).half())
        self.latents, self.masks = torch.cat(latents), np.concatenate(masks)

    def __len__(self) -> int:
        return len(self.masks)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        masks = torch.from_numpy(self.masks[indices][:, None]).float()
        return {"latents": self.latents[torch.from_numpy(indices)].float(), "mask": masks}


class FitGate:
    """Objective: a LatentSegmenter for the VAE of the generator in `weights`, by Dice and cross-entropy (Eq. 12)."""

    def __init__(self, weights: Path, section: GateFitSection, size: int, seed: int = 23) -> None:
        encoder = load_image_encoder(weights, None, None)
        self.section, self.size, self.encoder = section, size, encoder
        self.factor, self.vae_digest = encoder.factor, encoder.vae_digest
        self.examples = GateExamples(encoder, seed, section.phantoms, size, section.views)

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.section.seed)
            return LatentSegmenter(self.examples.latents.shape[1], self.factor).train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        latents, mask = turned(batch["latents"], batch["mask"], noise)
        level = noise.uniform(1, 1, 1).to(latents) * NOISE
        level = torch.where(noise.uniform(1, 1, 1).to(latents) < NOISED, level, 0.0)
        blurred = F.interpolate(F.avg_pool2d(latents, 2), scale_factor=2, mode="bilinear")
        latents = torch.where(noise.uniform(1, 1, 1).to(latents) < BLURRED, blurred, latents)
        logits = model(latents + level * noise.normal(*latents.shape[1:]).to(latents))
        return {"loss": dice_bce_loss(logits, mask)}

    def save(self, model: nn.Module, directory: Path) -> None:
        assert isinstance(model, LatentSegmenter)
        save_segmenter(model, directory, self.vae_digest)
        shapes = ShapePrior.fit(self.examples.masks, [None] * len(self.examples))  # type: ignore[arg-type]
        shapes.save(directory / SHAPES_FILE)
        if self.section.estimator_pairs:
            save_estimator(self._estimator(copy.deepcopy(model).cpu().eval()), directory)

    def _estimator(self, model: nn.Module) -> IouEstimator:
        @torch.inference_mode()
        def find(pictures: np.ndarray) -> np.ndarray:
            latents = self.encoder.encode(_as_pixels(pictures))
            return np.asarray(model(latents).sigmoid()[:, 0].numpy())

        return fit_estimator(*agreements(find, self.section.estimator_pairs, self.size), seed=self.section.seed)

    def load(self, directory: Path) -> nn.Module:
        return load_latent_segmenter(directory, self.vae_digest)


def _as_pixels(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _pairs(seed: int, index: int, size: int, views: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A phantom as it is, or its pictures; each with its mask."""
    drawn = phantom.draw(seed, index, size)
    if views == 1:
        return [(drawn.image, drawn.mask)]
    return [
        (disturbed(drawn.image, np.random.default_rng([seed, index, view, 9])), drawn.mask) for view in range(views)
    ]
