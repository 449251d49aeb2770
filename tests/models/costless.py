"""A generator that costs nothing and a gate that decides by name: what is left is the sampler's own doing.

Letters: B samples, h and w latent sides.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from factory.models.denoiser import Prediction
from factory.models.sampler import Stage, Verdict
from factory.records import ACCEPTED, REJECTED


class Costless:
    """A `Denoiser` of two numbers per sample, without masks: a prediction is the latents."""

    family, prediction_type, digest, vae_digest, mask_source = "costless", "epsilon", "0" * 64, "0" * 64, None
    alphas_cumprod = torch.linspace(0.999, 0.01, 1000)

    def shift(self, width: int, height: int) -> float:
        return 1.0

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 2, 1, 1

    def condition(self, prompts: list[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def predict(self, z: Tensor, t: Tensor, condition: Tensor, guidance: Tensor, unconditional: Tensor) -> Prediction:
        return Prediction(z, z)

    def clean(self, latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        return prediction

    def image_latents(self, latents: Tensor) -> Tensor:
        return latents


class GateByName:
    """Rejects a sample or not by a hash of its id alone, and costs nothing.

    rejected: the share of all samples that it rejects. early: the share of those that it knows at a checkpoint; the
    others it rejects when they are finished.
    """

    def __init__(self, rejected: float, early: float = 1.0) -> None:
        self.rejected, self.early = rejected, early

    def submit(self, ids: list[str], image_latents: Tensor, masks: Tensor | None, stage: Stage) -> list[Verdict]:
        share = self.rejected * self.early if stage == "checkpoint" else self.rejected
        return [self._verdict(name, share) for name in ids]

    def result(self, ticket: list[Verdict]) -> list[Verdict]:
        return ticket

    def _verdict(self, name: str, share: float) -> Verdict:
        drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64  # uniform in [0, 1)
        return Verdict(REJECTED, "by_name") if drawn < share else Verdict(ACCEPTED)
