"""Images to the latents that a gate reads, without the network that draws: a gate behind HTTP needs no generator.

Letters: B samples, C latent channels, h and w latent sides, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from factory.models import codec
from factory.models.families import load_denoiser
from factory.models.weights import family_of

RGB = 3


@dataclass(frozen=True)
class ImageEncoder:
    """encode: (B, 3, H, W) in [-1, 1] -> image latents (B, C, h, w), as `Denoiser.image_latents` of `encode` gives
    them; vae_digest: names their space; factor: pixels per latent cell, along a side."""

    encode: Callable[[Tensor], Tensor]
    vae_digest: str
    factor: int


def load_image_encoder(
    directory: str | Path, adapter: str | Path | None = None, family: str | None = None
) -> ImageEncoder:
    """The encoder of a generator's directory with an adapter over it; see `families.load_denoiser`."""
    chosen = family_of(directory) if family is None else family
    if chosen == "flux":  # twelve billion parameters are not read for the VAE beside them
        from diffusers import AutoencoderKL

        from factory.models.flux import vae_digest
        from factory.models.loading import load_part

        vae = load_part(AutoencoderKL, Path(directory) / "vae")
        return ImageEncoder(lambda pixels: codec.scaled_modes(vae, pixels), vae_digest(vae), codec.factor_of(vae))
    if chosen == "inpaint":
        from factory.models.inpaint import load_stats

        stats, vae = load_stats(Path(directory)), codec.load_codec(Path(directory) / "vae")
        return _whitening(vae, stats)
    denoiser: Any = load_denoiser(directory, adapter, chosen)
    if denoiser.vae.config.in_channels != RGB:  # image and mask in one picture: only the family knows how
        return ImageEncoder(denoiser.encode_image, denoiser.vae_digest, denoiser.factor)
    return _whitening(denoiser.vae, denoiser.stats)


def _whitening(vae: codec.Codec, stats: codec.LatentStats) -> ImageEncoder:
    def encode(pixels: Tensor) -> Tensor:
        return stats.whiten(codec.scaled_modes(vae, pixels))

    return ImageEncoder(encode, codec.vae_digest(vae, stats), codec.factor_of(vae))
