"""A mask as latents and back, and the whitening of latents.

A mask goes through the frozen VAE as a grey picture; a small head reads it back at a small part of the decoder's
cost. Latents are whitened per channel by statistics that are saved with the weights.

Letters: B samples, h and w latent sides, H and W pixels. Latents have eight channels: four image, four mask.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from factory.models.segmenter import ResidualBlock, check_factor, upsampler
from factory.models.starter import LATENT_CHANNELS


class MaskHead(nn.Module):
    """Mask latents to mask logits: what a VAE decoder does, at a small part of its cost.

    `factor` is the VAE's, a power of two. 62 k parameters at factor 4.
    """

    def __init__(self, channels: int = LATENT_CHANNELS, factor: int = 4, width: int = 48) -> None:
        super().__init__()
        check_factor(factor)
        self.config = {"channels": channels, "factor": factor, "width": width}
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), ResidualBlock(width))
        self.rise = upsampler(width, factor)

    def forward(self, mask_latents: Tensor) -> Tensor:
        """Whitened mask latents (B, 4, h, w) -> logits (B, 1, H, W)."""
        return self.rise(self.stem(mask_latents))

    def save(self, directory: Path) -> None:
        """Write `model.safetensors` and `config.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> MaskHead:
        """The head in a directory, in eval mode and float32."""
        head = cls(**json.loads((directory / "config.json").read_text()))
        head.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
        return head.eval()


@dataclass(frozen=True)
class LatentStats:
    """Mean and deviation per channel of scaled latents. Latents are whitened by them, because the noise schedule
    takes unit variance for granted and neither a mask's latents nor a fresh VAE's have it."""

    image_mean: tuple[float, ...] = (0.0,) * LATENT_CHANNELS
    image_std: tuple[float, ...] = (1.0,) * LATENT_CHANNELS
    mask_mean: tuple[float, ...] = (0.0,) * LATENT_CHANNELS
    mask_std: tuple[float, ...] = (1.0,) * LATENT_CHANNELS

    @classmethod
    def measure(cls, scaled: Tensor, *, whiten_image: bool) -> LatentStats:
        """From scaled latents (N, 8, h, w) of a corpus, as `JointDenoiser.scaled_latents` gives them. Leave the
        image alone (`whiten_image=False`) for a base that was trained without whitening."""
        mean, std = scaled.mean(dim=(0, 2, 3)).tolist(), scaled.std(dim=(0, 2, 3)).clamp_min(1e-4).tolist()
        mask = {"mask_mean": tuple(mean[LATENT_CHANNELS:]), "mask_std": tuple(std[LATENT_CHANNELS:])}
        if not whiten_image:
            return cls(**mask)
        return cls(image_mean=tuple(mean[:LATENT_CHANNELS]), image_std=tuple(std[:LATENT_CHANNELS]), **mask)

    @classmethod
    def load(cls, path: Path) -> LatentStats:
        return cls(**{name: tuple(values) for name, values in json.loads(path.read_text()).items()})

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def whiten(self, scaled: Tensor) -> Tensor:
        """Scaled latents (B, 8, h, w) -> unit variance; of an image alone, (B, 4, h, w)."""
        mean, std = self._rows(scaled)
        return (scaled - mean) / std

    def unwhiten(self, latents: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        mean, std = self._rows(latents)
        return latents * std + mean

    def _rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of as many channels as there are, (1, 8, 1, 1)."""
        rows = [[*self.image_mean, *self.mask_mean], [*self.image_std, *self.mask_std]]
        mean, std = torch.tensor(rows, dtype=like.dtype, device=like.device).reshape(2, 1, -1, 1, 1)
        return mean[:, : like.shape[1]], std[:, : like.shape[1]]


def mask_to_vae_input(mask: Tensor) -> Tensor:
    """A mask (B, 1, H, W) in {0, 1} as the grey picture that the VAE encodes: (B, 3, H, W) in [-1, 1]."""
    return (mask.float() * 2 - 1).expand(-1, 3, -1, -1)
