"""What generators with a VAE and a schedule of alpha bars share.

Letters: B samples, C latent channels, h and w latent sides.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

from diffusers import DDIMScheduler
from torch import Tensor, nn

from factory.models import codec
from factory.models.compiled import compile_network
from factory.models.denoiser import PredictionType, clean_estimate
from factory.models.latents import LatentStats
from factory.models.loading import module_digest, tensor_bytes


class Scheduled:
    """The part of a `Denoiser` that follows from its VAE, its statistics and its scheduler."""

    vae: codec.Codec
    stats: LatentStats
    scheduler: DDIMScheduler

    def _modules(self) -> dict[str, nn.Module]:
        """Its networks by name, the denoising one first."""
        raise NotImplementedError

    @property
    def prediction_type(self) -> PredictionType:
        kind: PredictionType = self.scheduler.config.prediction_type
        return kind

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32, on the denoising network's device."""
        device = next(next(iter(self._modules().values())).parameters()).device
        return self.scheduler.alphas_cumprod.to(device)

    @cached_property
    def vae_digest(self) -> str:
        """See `codec.vae_digest`: families on one VAE share it, and so their segmenters of image latents."""
        return codec.vae_digest(self.vae, self.stats)

    def compile(self) -> None:
        """See `compile_network`."""
        compile_network(next(iter(self._modules().values())))

    def shift(self, width: int, height: int) -> float:
        """1: a noise schedule of alpha bars is the same at every size."""
        return 1.0

    def clean(self, latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """Eq. 11, (B, C, h, w)."""
        return clean_estimate(self.prediction_type, latents, prediction, self.alphas_cumprod[timesteps])

    def _tensors_digest(self, known: list[Any]) -> str:
        """Of a denoiser made in memory: what is known beside its tensors, its noise levels, its networks."""
        total = hashlib.sha256(json.dumps(known).encode())
        total.update(tensor_bytes(self.alphas_cumprod))
        for name, module in self._modules().items():
            total.update(f"{name} {module_digest(module)}\n".encode())
        return total.hexdigest()
