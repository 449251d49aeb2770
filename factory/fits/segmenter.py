"""A pixel segmenter: lesion masks from images, on phantoms drawn as they are needed or on stored pairs.

Pictures are turned, flipped and relit per row, so that a renderer's lamp and camera are not what is learnt.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from factory import phantom
from factory.fits.objective import Examples, RowNoise
from factory.models.segmenter import PixelUNet, dice_bce_loss, load_pixel_unet, save_segmenter


class PhantomPairs:
    """`image` (B, 3, S, S) uint8 and `mask` (B, 1, S, S) of phantoms, drawn at `drawn` px and scaled to `size`."""

    def __init__(self, seed: int, count: int, size: int, drawn: int = 128) -> None:
        self.seed, self.count, self.size, self.drawn = seed, count, size, drawn

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        found = [phantom.draw(self.seed, int(index), self.drawn) for index in indices]
        return stacked(
            [self._scaled(p.image) for p in found], [self._scaled(p.mask.astype(np.uint8) * 255) for p in found]
        )

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.resize(pixels, (self.size, self.size), interpolation=cv2.INTER_AREA))


class StoredPairs:
    """The same of images (N, S, S, 3) uint8 and masks (N, S, S) uint8 from 0 to 255."""

    def __init__(self, images: np.ndarray, masks: np.ndarray) -> None:
        self.images, self.masks = images, masks

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return stacked(list(self.images[indices]), list(self.masks[indices]))


def stacked(images: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, Tensor]:
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return {"image": pixels, "mask": torch.from_numpy(np.stack(masks))[:, None].float() / 255}


class FitSegmenter:
    """Objective: a PixelUNet by Dice and cross-entropy."""

    def __init__(self, examples: Examples, *, width: int = 16, depth: int = 4, seed: int = 0) -> None:
        self.examples, self.width, self.depth, self.seed = examples, width, depth, seed

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return PixelUNet(width=self.width, depth=self.depth).train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        image, mask = turned(batch["image"].float() / 255, batch["mask"], noise)
        return {"loss": dice_bce_loss(model(relit(image, noise) * 2 - 1), mask)}

    def save(self, model: nn.Module, directory: Path) -> None:
        assert isinstance(model, PixelUNet)
        save_segmenter(model, directory)

    def load(self, directory: Path) -> nn.Module:
        return load_pixel_unet(directory)


def turned(image: Tensor, mask: Tensor, noise: RowNoise) -> tuple[Tensor, Tensor]:
    """Each row turned by a multiple of 90 degrees and flipped or not, image (or its latents) and mask alike."""
    turns, flips = noise.integers(4).tolist(), noise.integers(2).tolist()

    def turn(rows: Tensor) -> Tensor:
        ways = zip(rows, turns, flips, strict=True)
        return torch.stack([torch.rot90(row.flip(-1) if flip else row, turn, (-2, -1)) for row, turn, flip in ways])

    return turn(image), turn(mask)


def relit(image: Tensor, noise: RowNoise) -> Tensor:
    """(B, 3, S, S) in [0, 1] under another lamp and camera: gamma, channel gains, contrast, brightness."""
    gamma = (noise.normal(1, 1, 1) * 0.2).exp()
    gains = 1 + noise.normal(3, 1, 1) * 0.08
    contrast = (noise.normal(1, 1, 1) * 0.15).exp()
    lifted = (image.clamp_min(1e-4) ** gamma * gains - 0.5) * contrast + 0.5
    return (lifted + noise.normal(1, 1, 1) * 0.05).clamp(0, 1)
