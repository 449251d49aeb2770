"""Segmenters: of image latents for the gate, of pixels for the worth experiment.

The latent segmenter reads the clean estimate in the sampler's hand (DiffAug, arXiv 2508.17844, section on latent
validation) and answers at image resolution, because a lesion of a few latent cells cannot be judged on their raster.
It is worth nothing on another VAE's latents, so it records the digest of its own.

Letters: B samples, h and w latent sides, H and W pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

M = TypeVar("M", bound=nn.Module)


class ResidualBlock(nn.Module):
    """Two convolutions with group norm, added to their input."""

    def __init__(self, width: int, groups: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class LatentSegmenter(nn.Module):
    """Image latents to lesion logits at image resolution; `factor` is the VAE's, a power of two.

    A U-Net over three rasters, of the latents, of half and of a quarter of their sides, at the last of which a lesion
    is seen as a whole. The pixels of a cell are one channel each (Shi et al. 2016, arXiv 1609.05158): convolutions at
    image resolution cost more than all the others together.
    """

    def __init__(self, latent_channels: int = 4, factor: int = 4, width: int = 32) -> None:
        super().__init__()
        check_factor(factor)
        self.config = {"latent_channels": latent_channels, "factor": factor, "width": width}
        wide = 2 * width
        self.fine = nn.Sequential(nn.Conv2d(latent_channels, width, 3, padding=1), ResidualBlock(width))
        self.middle = nn.Sequential(nn.Conv2d(width, wide, 3, stride=2, padding=1), ResidualBlock(wide))
        self.coarse = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride=2, padding=1), ResidualBlock(wide), ResidualBlock(wide)
        )
        self.rise = nn.Sequential(ResidualBlock(wide), nn.Conv2d(wide, width, 1))
        self.merge = nn.Sequential(nn.Conv2d(wide, width, 3, padding=1), ResidualBlock(width))
        self.pixels = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, factor**2, 3, padding=1), nn.PixelShuffle(factor)
        )

    def forward(self, image_latents: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> logits (B, 1, h * factor, w * factor)."""
        fine = self.fine(image_latents)  # (B, width, h, w)
        middle = self.middle(fine)
        middle = self.rise(middle + _grown(self.coarse(middle), middle))
        return self.pixels(self.merge(torch.cat([fine, _grown(middle, fine)], dim=1)))


def _grown(coarse: Tensor, like: Tensor) -> Tensor:
    """Features at the sides of others."""
    return F.interpolate(coarse, size=like.shape[-2:], mode="nearest")


def upsampler(width: int, factor: int) -> nn.Sequential:
    """Features (B, width, h, w) -> one logit per pixel (B, 1, h * factor, w * factor), narrowing as it grows."""
    layers: list[nn.Module] = []
    for _ in range(factor.bit_length() - 1):
        narrower = min(width, max(16, width * 2 // 3 // 8 * 8))
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, narrower, 3, padding=1), nn.SiLU()]
        width = narrower
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))


def check_factor(factor: int) -> None:
    """Refuse a factor that doubling cannot reach."""
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"factor must be a power of two, got {factor}; use the VAE's own.")


class PixelUNet(nn.Module):
    """The standard U-Net (Ronneberger et al. 2015, arXiv 1505.04597) with batch norm and padded convolutions.

    `depth` levels, the first `width` wide and each next twice that. Sides must be multiples of 2 ** (depth - 1).
    """

    def __init__(self, in_channels: int = 3, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "width": width, "depth": depth}
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(_double_conv(a, b) for a, b in zip([in_channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(_double_conv(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, 1, H, W)."""
        self._check_sides(image)
        kept: list[Tensor] = []
        x = self.down[0](image)
        for level in list(self.down)[1:]:
            kept.append(x)
            x = level(F.max_pool2d(x, 2))
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], dim=1))
        return self.head(x)

    def _check_sides(self, image: Tensor) -> None:
        step = 2 ** (self.config["depth"] - 1)
        if image.shape[-1] % step or image.shape[-2] % step:
            raise ValueError(
                f"image sides must be multiples of {step}, got {image.shape[-1]}x{image.shape[-2]}; resize the images."
            )


def _double_conv(into: int, out_of: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (into, out_of):
        layers += [nn.Conv2d(channels, out_of, 3, padding=1, bias=False), nn.BatchNorm2d(out_of), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def dice_bce_rows(logits: Tensor, mask: Tensor) -> Tensor:
    """Per sample, (B,): mean binary cross entropy plus soft Dice loss (Milletari et al. 2016), smoothed by one pixel
    so that an empty mask has a loss of zero when it is found empty."""
    mask = mask.to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1).mean(1)
    found, true = logits.sigmoid().flatten(1), mask.flatten(1)
    dice = (2 * (found * true).sum(1) + 1) / (found.sum(1) + true.sum(1) + 1)
    return bce + 1 - dice


def dice_bce_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over the batch of `dice_bce_rows`; logits and mask (B, 1, H, W), mask in {0, 1}."""
    return dice_bce_rows(logits, mask).mean()


def save_segmenter(model: LatentSegmenter | PixelUNet, directory: str | Path, vae_digest: str | None = None) -> None:
    """Write `model.safetensors` and `config.json`; a latent segmenter needs the digest of the VAE it was fitted on."""
    kind = type(model).__name__
    if isinstance(model, LatentSegmenter) and not vae_digest:
        raise ValueError("vae_digest must be given for a latent segmenter, got none; pass the denoiser's vae_digest.")
    config = {"class": kind, **model.config, "vae_digest": vae_digest}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_latent_segmenter(directory: str | Path, vae_digest: str) -> LatentSegmenter:
    """The latent segmenter in a directory, in eval mode and float32; refused on latents of another VAE."""
    config = _config(directory, "LatentSegmenter")
    recorded = config.pop("vae_digest")
    if recorded != vae_digest:
        raise ValueError(
            f"vae_digest must be the one the segmenter in {directory} was fitted on ({recorded[:12]}), got "
            f"{vae_digest[:12]}; fit a segmenter on this VAE's latents (factory fit gate) or use the other weights."
        )
    return _filled(LatentSegmenter(**config), directory)


def load_pixel_unet(directory: str | Path) -> PixelUNet:
    """The pixel U-Net in a directory, in eval mode and float32."""
    config = _config(directory, "PixelUNet")
    config.pop("vae_digest")
    return _filled(PixelUNet(**config), directory)


def _config(directory: str | Path, kind: str) -> dict[str, Any]:
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"segmenter must be a directory with config.json and model.safetensors, got {directory}.")
    config: dict[str, Any] = json.loads(path.read_text())
    found = config.pop("class", None)
    if found != kind:
        raise ValueError(f"segmenter in {directory} must be a {kind}, got {found}; name the right directory.")
    return config


def _filled(model: M, directory: str | Path) -> M:
    weights = load_file(Path(directory) / "model.safetensors")
    if weights.keys() != model.state_dict().keys():
        raise ValueError(
            f"segmenter in {directory} must have the layers of this version's {type(model).__name__}, got others; fit "
            "it again (factory fit gate)."
        )
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return model.eval()
