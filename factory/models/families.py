"""Which family a directory of weights holds, and its denoiser."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL

from factory.models.flux import FluxDenoiser, vae_digest
from factory.models.joint import JointDenoiser
from factory.models.loading import load_part
from factory.models.weights import is_flux


def load_denoiser(directory: str | Path, adapter: str | Path | None = None) -> FluxDenoiser | JointDenoiser:
    """The denoiser of a diffusers directory, `flux` where a transformer denoises and `joint` where a U-Net does, with
    an adapter merged into it."""
    return FluxDenoiser.load(directory, adapter) if is_flux(directory) else JointDenoiser.load(directory, adapter)


def vae_digest_of(directory: str | Path, adapter: str | Path | None = None) -> str:
    """The `vae_digest` of that denoiser, without loading the 12 billion parameters that it does not depend on."""
    if is_flux(directory):
        return vae_digest(load_part(AutoencoderKL, Path(directory) / "vae"))
    return JointDenoiser.load(directory, adapter).vae_digest
