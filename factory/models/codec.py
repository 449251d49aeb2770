"""The codecs of image latents: the autoencoders that diffusers has, their scaling, and the whitening over it.

    pixels --encode--> raw --shift, scaling factor--> scaled --image statistics--> latents that are denoised

Letters: B samples, C latent channels, h and w latent sides, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import Tensor

from factory.models.latents import LatentStats
from factory.models.loading import load_part, module_digest

CODECS = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderDC, AutoencoderTiny)}
Codec: TypeAlias = AutoencoderKL | AutoencoderDC | AutoencoderTiny


def load_codec(folder: Path) -> Codec:
    """The VAE in a `vae/` folder, in eval mode and float32. Raises ValueError for any other class."""
    path = folder / "config.json"
    name = json.loads(path.read_text()).get("_class_name") if path.is_file() else None
    if name not in CODECS:
        raise ValueError(f"vae must be one of {', '.join(CODECS)}, got {name} in {folder}; use a base with such a VAE.")
    loaded: Codec = load_part(CODECS[name], folder)
    return loaded


def factor_of(vae: Codec) -> int:
    """Pixels of an image per cell of its latents, along a side."""
    levels = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
    return int(2 ** (len(levels) - 1))


def shift_of(vae: Codec) -> float:
    """What is taken from raw latents before they are scaled."""
    return float(vae.config.get("shift_factor") or 0.0)


@torch.no_grad()
def scaled_latents(vae: Codec, image: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w) float32: the modes, no sampling."""
    found: Any = vae.encode(image.to(vae.device, vae.dtype))
    if isinstance(vae, AutoencoderKL):
        raw = found.latent_dist.mode()
    else:
        raw = found.latent if isinstance(vae, AutoencoderDC) else found.latents
    return ((raw - shift_of(vae)) * vae.config.scaling_factor).float()


@torch.no_grad()
def decoded(vae: Codec, scaled: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> image (B, 3, H, W) float32, not yet clamped to [-1, 1]."""
    raw = scaled / vae.config.scaling_factor + shift_of(vae)
    return vae.decode(raw.to(vae.dtype), return_dict=False)[0].float()


def image_stats(scaled: Tensor | None = None, channels: int = 4) -> LatentStats:
    """Statistics of images alone: measured on scaled latents (N, C, h, w), or those that change nothing."""
    if scaled is None:
        return LatentStats(image_mean=(0.0,) * channels, image_std=(1.0,) * channels)
    mean, std = scaled.mean(dim=(0, 2, 3)), scaled.std(dim=(0, 2, 3)).clamp_min(1e-4)
    return LatentStats(image_mean=tuple(mean.tolist()), image_std=tuple(std.tolist()))


def whiten(stats: LatentStats, scaled: Tensor) -> Tensor:
    """Scaled image latents (B, C, h, w) by the image's half of the statistics."""
    mean, std = _rows(stats, scaled)
    return (scaled - mean) / std


def unwhiten(stats: LatentStats, latents: Tensor) -> Tensor:
    """The inverse of `whiten`."""
    mean, std = _rows(stats, latents)
    return latents * std + mean


def _rows(stats: LatentStats, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (1, C, 1, 1)."""
    rows = torch.tensor([stats.image_mean, stats.image_std], dtype=like.dtype, device=like.device)
    mean, std = rows.reshape(2, 1, -1, 1, 1)
    return mean, std


def vae_digest(vae: Codec, stats: LatentStats) -> str:
    """Of the VAE's values in float32, its scaling and the image's whitening: the same however it was stored, and for
    every family that denoises these latents, so a gate that was fitted for one serves the others."""
    scaling = [vae.config.scaling_factor, shift_of(vae), stats.image_mean, stats.image_std]
    return hashlib.sha256(f"{json.dumps(scaling)} {module_digest(vae)}".encode()).hexdigest()
