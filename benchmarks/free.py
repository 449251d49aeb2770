"""A generator whose every answer is a few additions: what is left of a run is the factory's own work.

Shared by the benchmarks of what Ray costs and of a million samples. Letters: n samples, C latent channels, h and w
latent sides, H and W pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from factory.models.denoiser import Denoiser, Prediction
from factory.runtime.synthesize import SynthesizeUnit
from factory.stages.synthesize import SynthesizeSamples

FACTOR = 8
DIGEST = "0" * 64


class Free:
    """A `Denoiser` on latents (n, 8, H / 8, W / 8), none of whose calls costs anything."""

    family, prediction_type, digest, vae_digest = "free", "epsilon", DIGEST, DIGEST
    mask_source = "joint"
    alphas_cumprod = torch.linspace(0.999, 0.01, 1000)

    def shift(self, width: int, height: int) -> float:
        return 1.0

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 8, height // FACTOR, width // FACTOR

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(len(image), *self.latent_shape(image.shape[-1], image.shape[-2]))

    def condition(self, prompts: list[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Free:
        return self

    def predict(self, z: Tensor, t: Tensor, condition: Tensor, guidance: Tensor, unconditional: Tensor) -> Prediction:
        return Prediction(z, z)

    def clean(self, latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        return prediction

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        image = latents[:, :3].clamp(-1, 1).repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
        return image, self.mask(latents)

    def mask(self, latents: Tensor) -> Tensor:
        return (latents[:, 4:5] > 0).float().repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)

    def image_latents(self, latents: Tensor) -> Tensor:
        return latents[:, :4]


class SynthesizeFree(SynthesizeSamples):
    def load_denoiser(self, weights: str | Path, adapter: str | Path | None) -> Denoiser:
        return Free()


class FreeUnit(SynthesizeUnit):
    def stage(self) -> type[SynthesizeSamples]:
        return SynthesizeFree


class Ungated(FreeUnit):
    """As `FreeUnit`, with nothing judged: every sample is accepted without an answer from a gate."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.synthesize.gate = None


def for_workers(*names: str) -> None:
    """Sends the classes of these modules with what is run: workers cannot import a script or its neighbours."""
    from ray import cloudpickle

    for name in (__name__, *names):
        cloudpickle.register_pickle_by_value(sys.modules[name])
