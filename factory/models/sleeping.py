"""A generator that costs a fixed time and nothing else: what is left of a measurement is the factory's own work.

It sleeps in place of a network, as a process sleeps that waits for its GPU, so that many of them can share two cores.
Its latents are the sample's own noise, shrunk by each call; its mask is the sign of one channel.

Letters: B samples, L tokens, D token width, H and W pixels; latents are (B, 8, H / 8, W / 8).
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from factory.models.denoiser import Prediction, PredictionType
from factory.models.segmenter import LatentSegmenter, save_segmenter

FACTOR, CHANNELS, IMAGE_CHANNELS = 8, 8, 4
DIGEST = "0" * 64  # of its weights, and of its VAE: it has neither


class SleepingDenoiser:
    """A `Denoiser` whose call takes `call_s` seconds, whatever the batch; 0: a few additions."""

    family, digest, vae_digest, factor = "sleeping", DIGEST, DIGEST, FACTOR
    prediction_type: PredictionType = "epsilon"
    mask_source: str | None = "joint"
    alphas_cumprod = torch.linspace(0.999, 0.01, 1000)

    def __init__(self, call_s: float = 0.0) -> None:
        if call_s < 0:
            raise ValueError(f"call_s must be 0 or more seconds, got {call_s}; give how long a call is to take.")
        self.call_s = call_s

    def shift(self, width: int, height: int) -> float:
        return 1.0

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return CHANNELS, height // FACTOR, width // FACTOR

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(len(image), *self.latent_shape(image.shape[-1], image.shape[-2]))

    def condition(self, prompts: list[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> SleepingDenoiser:
        return self

    def compile(self) -> None:
        pass

    def predict(self, z: Tensor, t: Tensor, condition: Tensor, guidance: Tensor, unconditional: Tensor) -> Prediction:
        time.sleep(self.call_s)
        return Prediction(z, z)

    def clean(self, latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        return prediction

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        image = latents[:, :3].clamp(-1, 1).repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
        return image, self.mask(latents)

    def mask(self, latents: Tensor) -> Tensor:
        inside = latents[:, IMAGE_CHANNELS : IMAGE_CHANNELS + 1] > 0
        return inside.float().repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)

    def image_latents(self, latents: Tensor) -> Tensor:
        return latents[:, :IMAGE_CHANNELS]


def save_gate(directory: str | Path) -> None:
    """A gate of random weights for its latents, of the class and in the layout of the shipped one."""
    torch.manual_seed(0)
    save_segmenter(LatentSegmenter(factor=FACTOR, width=8), directory, DIGEST)
