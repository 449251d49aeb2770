"""The starter's autoencoder, fitted on phantoms alone so that it carries real skin.

It is diffusers' AutoencoderDC (see `models/starter.build_vae`). It first learns by L1 and MSE on pixels and L1 on their
gradients (hair and network are edges), then by the logarithm of each crop's MSE, which is what a mean PSNR sums:
without it, the few crops of most contrast are all that counts. Noise on the latents keeps the space smooth enough to
be denoised in. Half of the work is in the examples: phantoms are cut at random, recoloured and relit, because real skin
is more varied than any renderer, and masks are shown as grey pictures too, because the joint generator encodes masks
with this VAE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from factory import phantom
from factory.fits.objective import RowNoise
from factory.models.starter import build_vae, load_vae

MSE_WEIGHT = 2.0
GRADIENT_WEIGHT = 0.25
LOG_WEIGHT = 0.1
LATENT_NOISE = 0.01  # of the latents' deviation
MSE_FLOOR = 2e-5  # of the logarithm; half a grey level, squared, where white is 1 and black -1
MASK_SHARE = 0.12  # of the crops are masks


class PhantomCrops:
    """Two random square crops per phantom, (2 rows, 3, crop, crop) in [-1, 1], a function of (seed, index).

    `broad` ones are also tinted, textured, blurred or sharpened, and pasted into each other, far beyond what skin does:
    stickers, gloves, ink and weave are in real images too, and no renderer has them all. Cameras sharpen, and reduced
    photographs fall off more slowly with frequency than a rendering does.
    """

    def __init__(self, seed: int, count: int, size: int = 128, crop: int = 64, *, broad: bool = False) -> None:
        self.seed, self.count, self.size, self.crop, self.broad = seed, count, size, crop, broad

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        crops = [crop for index in indices for crop in self._crops(int(index))]
        return {"image": torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous() * 2 - 1}

    def _crops(self, index: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, index, 7])
        drawn = phantom.draw(self.seed, index, self.size)
        image = drawn.image.astype(np.float32) / 255
        crops = [self._crop(rng, image, drawn.mask) for _ in range(2)]
        return [_broadened(rng, crop, crops[0]) for crop in crops] if self.broad else crops

    def _crop(self, rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        top, left = rng.integers(0, self.size - self.crop + 1, 2)
        window = np.s_[top : top + self.crop, left : left + self.crop]
        if rng.random() < MASK_SHARE:
            return np.repeat(mask[window][..., None].astype(np.float32), 3, axis=2)
        return _relight(rng, np.rot90(image[window], int(rng.integers(4))))


def _broadened(rng: np.random.Generator, image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Each change comes with its own small chance, so that most crops have one or two."""
    if rng.random() < 0.3:
        image = _tinted(rng, image)
    if rng.random() < 0.3:
        image = image + _texture(rng, image.shape[0]) * np.float32(abs(rng.normal(0, 0.12)))
    if rng.random() < 0.15:
        image = np.where(_texture(rng, image.shape[0])[..., :1] > 0.5, _tinted(rng, np.rot90(other)), image)
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), rng.uniform(0.4, 1.2))
    if rng.random() < 0.5:
        blurred = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), rng.uniform(0.6, 1.3))
        image = image + np.float32(rng.uniform(0.2, 1.2)) * (image - blurred)
    return np.clip(image, 0, 1, dtype=np.float32)


def _tinted(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Another hue, more or less saturated."""
    hsv = cv2.cvtColor(np.clip(image, 0, 1).astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(0, 360)) % 360
    hsv[..., 1] = np.clip(hsv[..., 1] * np.exp(rng.normal(0.4, 0.6)), 0, 1)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Coloured or grey noise of one random grain, unit variance, (side, side, 3)."""
    grain = int(rng.integers(2, side // 2))
    noise = rng.standard_normal((grain, grain, 3 if rng.random() < 0.5 else 1)).astype(np.float32)
    field = cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC).reshape(side, side, -1)
    return np.broadcast_to(field / field.std(), (side, side, 3))


def _relight(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Another camera and lamp: gamma, contrast, channel gains, and now and then mixed channels."""
    if rng.random() < 0.05:
        mix = np.eye(3) + rng.normal(0, 0.25, (3, 3))
        image = image @ (mix / mix.sum(axis=1, keepdims=True)).astype(np.float32).T
    gains = rng.normal(1.0, 0.07, 3).astype(np.float32)
    image = np.clip(image, 1e-4, 1) ** np.float32(np.exp(rng.normal(0, 0.2)))
    image = (image * gains - 0.5) * np.float32(np.exp(rng.normal(0, 0.15))) + 0.5
    return np.clip(image + np.float32(rng.normal(0, 0.05)), 0, 1)


class FitVae:
    """Objective: an AutoencoderDC over phantom crops, from nothing or from the one in `start`. `by_log` sums the
    logarithm of each crop's MSE in place of the first loss."""

    def __init__(
        self, seed: int = 1, count: int = 1_000_000, size: int = 128, *, broad: bool = False, by_log: bool = False,
        start: Path | None = None, **architecture: Any,
    ) -> None:  # fmt: skip
        self.examples = PhantomCrops(seed, count, size, broad=broad)
        self.by_log, self.start, self.architecture = by_log, start, architecture

    def build(self) -> AutoencoderDC:
        if self.start is not None:
            return self.load(self.start).train()
        torch.manual_seed(0)
        return build_vae(**self.architecture).train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        image = batch["image"]
        latents = model.encode(image).latent  # type: ignore[operator]
        spread = latents.detach().std()
        eps = noise.normal(2, *latents.shape[1:]).flatten(0, 1)
        error = model.decode(latents + LATENT_NOISE * spread * eps).sample - image  # type: ignore[operator]
        pixels, crop_mse = error.abs().mean(), error.square().mean((1, 2, 3))
        mse, log_mse = crop_mse.mean(), torch.log(crop_mse + MSE_FLOOR).mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = LOG_WEIGHT * log_mse if self.by_log else pixels + MSE_WEIGHT * mse + GRADIENT_WEIGHT * edges
        return {"loss": loss, "pixels": pixels, "edges": edges, "mse": mse, "log_mse": log_mse, "spread": spread}

    def save(self, model: nn.Module, directory: Path) -> None:
        model.save_pretrained(directory)  # type: ignore[operator]

    def load(self, directory: Path) -> AutoencoderDC:
        return load_vae(directory)
