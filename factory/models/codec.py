"""What families on a VAE's latents share: codecs, the image's latents, CLIP's states, the scheduler.

    pixels --encode--> raw --shift, scaling factor--> scaled --image statistics--> latents that are denoised

Letters: B samples, C latent channels, h and w latent sides, L tokens, D token width, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from factory.models.latents import LatentStats
from factory.models.loading import load_part, module_digest

CODECS = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderDC, AutoencoderTiny)}
Codec: TypeAlias = AutoencoderKL | AutoencoderDC | AutoencoderTiny
PROMPT_BATCH = 8  # prompts are encoded at one shape, so that an embedding never depends on its neighbours
STATS_FILE = "latent_stats.json"


def load_codec(folder: Path) -> Codec:
    """The VAE in a folder, if it is one of CODECS, in eval mode and float32."""
    path = folder / "config.json"
    name = json.loads(path.read_text()).get("_class_name") if path.is_file() else None
    if name not in CODECS:
        raise ValueError(f"vae must be one of {', '.join(CODECS)}, got {name} in {folder}; use a base with such a VAE.")
    codec: Codec = load_part(CODECS[name], folder)
    return codec


def load_scheduler(folder: Path) -> DDIMScheduler:
    """A scheduler's noise levels, whichever class wrote them. `clip_sample` is for pixels, and is off."""
    stored = DDIMScheduler.from_pretrained(folder, local_files_only=True)
    return DDIMScheduler.from_config(stored.config, clip_sample=False)


def factor_of(vae: Codec) -> int:
    """Pixels of an image per cell of its latents, along a side."""
    levels = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
    return int(2 ** (len(levels) - 1))


def shift_of(vae: Codec) -> float:
    """What a codec's latents are shifted by, 0 for most."""
    return getattr(vae.config, "shift_factor", None) or 0.0


@torch.no_grad()
def scaled_modes(vae: Codec, pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32: the modes (no sampling), by the VAE's shift and
    scaling."""
    found = vae.encode(pixels.to(vae.device, vae.dtype))
    if isinstance(vae, AutoencoderKL):
        modes = found.latent_dist.mode()
    else:
        modes = found.latent if isinstance(vae, AutoencoderDC) else found.latents
    return ((modes - shift_of(vae)) * vae.config.scaling_factor).float()


def decoded(vae: Codec, scaled: Tensor) -> Tensor:
    """The inverse of `scaled_modes`, (B, 3, H, W) float32, not clamped."""
    raw = scaled / vae.config.scaling_factor + shift_of(vae)
    return vae.decode(raw.to(vae.dtype), return_dict=False)[0].float()


def image_stats(scaled: Tensor | None = None, channels: int = 4) -> LatentStats:
    """Statistics of images alone: measured on scaled latents (N, C, h, w), or those that change nothing."""
    if scaled is None:
        return LatentStats(image_mean=(0.0,) * channels, image_std=(1.0,) * channels)
    mean, std = scaled.mean(dim=(0, 2, 3)), scaled.std(dim=(0, 2, 3)).clamp_min(1e-4)
    return LatentStats(image_mean=tuple(mean.tolist()), image_std=tuple(std.tolist()))


def vae_digest(vae: Codec, stats: LatentStats) -> str:
    """Of the VAE's values in float32, its scaling and the image's whitening: the same however it was stored, and for
    every family that denoises these latents, so a gate that was fitted for one serves the others."""
    scaling = [vae.config.scaling_factor, shift_of(vae), stats.image_mean, stats.image_std]
    return hashlib.sha256(f"{json.dumps(scaling)} {module_digest(vae)}".encode()).hexdigest()


def in_prompt_batches(embed: Callable[[list[str]], Tensor], prompts: list[str]) -> Tensor:
    """`embed` over prompts, always with PROMPT_BATCH of them, the last batch padded with empty ones: (B, L, D)."""
    found = []
    for start in range(0, len(prompts), PROMPT_BATCH):
        part = prompts[start : start + PROMPT_BATCH]
        found.append(embed(part + [""] * (PROMPT_BATCH - len(part)))[: len(part)].float())
    return torch.cat(found)


@torch.no_grad()
def clip_states(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: list[str]) -> Tensor:
    """Last hidden states (B, L, D) float32 of prompts padded or cut to the tokenizer's `model_max_length`."""

    def embed(padded: list[str]) -> Tensor:
        length = tokenizer.model_max_length
        tokens = tokenizer(padded, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text_encoder(tokens.input_ids.to(text_encoder.device))[0]

    return in_prompt_batches(embed, prompts)
