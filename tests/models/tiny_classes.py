"""Tiny class-conditional networks of the real classes: latents of 4 channels at 8 x 8, three classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DModel

from factory.models.class_conditional import ClassConditionalDenoiser
from factory.models.class_networks import build_network
from factory.models.codec import image_stats
from factory.models.latents import LatentStats
from factory.models.starter import build_scheduler, build_vae

CLASSES = {"nevus": 0, "melanoma": 1, "seborrheic_keratosis": 2}
DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
STATS = LatentStats(image_mean=(0.1, -0.2, 0.3, 0.0), image_std=(1.5, 0.8, 1.0, 2.0))


def moved(network: Any, seed: int = 0) -> Any:
    """The network away from its initial zeros, always to the same place."""
    rng = torch.Generator().manual_seed(seed)
    for value in network.parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=rng)
    return network


def kl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=1, scaling_factor=0.7,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def build_classes(kind: str = "unet", seed: int = 0, learned_sigma: bool = False, **scheduler: Any) -> Any:
    """A fresh denoiser: `unet` on our own kind of VAE with whitening, or `dit` on a KL VAE, as its pipeline has it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if kind == "unet":
        network, vae = (
            build_network(UNet2DModel, UNET, len(CLASSES), 4, 8),
            build_vae(block_out_channels=(8, 8), layers_per_block=(0, 1)),
        )
    else:
        vae = kl_vae()
        if learned_sigma:
            network = DiTTransformer2DModel(
                **DIT, in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=len(CLASSES)
            )
        else:
            network = build_network(DiTTransformer2DModel, DIT, len(CLASSES), 4, 8)
    return ClassConditionalDenoiser(
        network=moved(network, seed), vae=vae, scheduler=build_scheduler(**scheduler), labels=dict(CLASSES),
        stats=STATS if kind == "unet" else image_stats(),
    )  # fmt: skip


def plain_scheduler(denoiser: Any) -> DDIMScheduler:
    """The library's scheduler of the denoiser, its own to step with."""
    return DDIMScheduler.from_config(denoiser.scheduler.config)
