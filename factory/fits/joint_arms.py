"""Fits of the joint generator's two ablations (`models/joint_arms.py`), and the choice among them all.

Letters: B samples, h and w latent sides, L tokens, D token width, H and W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from factory.fits.encoded import CachedImages, EncodedRows
from factory.fits.joint import FitLora, FitRows, lesion_square
from factory.fits.loop import Worker, train
from factory.fits.objective import RowNoise
from factory.images import read_mask
from factory.models.joint import JointDenoiser
from factory.models.joint_arms import RGB, CascadedDenoiser, Pixel4Denoiser, save_cascade, widen_vae
from factory.models.joint_loss import latent_loss
from factory.models.latents import mask_to_vae_input
from factory.models.loading import load_part
from factory.models.lora import add_lora, save_lora
from factory.models.segmenter import dice_bce_rows
from factory.models.starter import LATENT_CHANNELS
from factory.recipe import FitSection, LoraSection
from factory.storage import Store

VAE_SHARE = 5  # the VAE is fitted for one step to each of so many of the U-Net's


def fit_of(
    weights: Path, images: Sequence[bytes] | CachedImages, masks: Sequence[bytes | None], prompts: Sequence[str],
    section: LoraSection, size: int, cache: Store | None = None, held_out: FitRows | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> FitLora:  # fmt: skip
    """The objective of the section's arm; arguments as of `FitLora`."""
    own = section.joint
    kind = FitCascaded if own.pipeline == "cascaded" else FitPixel4 if own.encoding == "pixel4" else FitLora
    return kind(weights, images, masks, prompts, section, size, cache, held_out, groups)


class FitCascaded(FitLora):
    """Objective: one U-Net for both calls of the cascade, the image's with empty mask latents and the mask's with clean
    image latents. Each row is shown both, so a step costs twice that of joint denoising, as sampling does."""

    def _denoiser(self, images: Sequence[bytes] | CachedImages, masks: Sequence[bytes | None]) -> JointDenoiser:
        return CascadedDenoiser(**CascadedDenoiser.parts(self.weights), mask_steps=self.section.joint.mask_steps)

    def _network(self, model: nn.Module, latents: Tensor) -> Callable[..., Any]:
        """Both calls as one of twice the batch; the mask's is under the empty prompt, as in sampling."""

        def network(noisy: Tensor, timesteps: Tensor, condition: Tensor, return_dict: bool) -> tuple[Tensor]:
            image, mask = noisy.split(LATENT_CHANNELS, dim=1)
            shown = torch.cat([image, torch.zeros_like(mask)], 1), torch.cat([latents[:, :LATENT_CHANNELS], mask], 1)
            both = torch.cat([condition, self._empty.to(condition).expand_as(condition)])  # (2B, L, D)
            said = model(torch.cat(shown), torch.cat([timesteps, timesteps]), both, return_dict=return_dict)[0]
            of_image, of_mask = said.chunk(2)  # (B, 8, h, w) each
            return (torch.cat([of_image[:, :LATENT_CHANNELS], of_mask[:, LATENT_CHANNELS:]], dim=1),)

        return network

    def _save_adapter(self, model: nn.Module, directory: Path) -> None:
        super()._save_adapter(model, directory)
        save_cascade(directory, self.section.joint.mask_steps)


class FitPixel4(FitLora):
    """Objective: LoRA on a plain U-Net over the latents of a VAE with the mask as a fourth pixel channel.

    The VAE comes first: when the objective is made it is fitted for a fifth of the section's steps (`FitPixel4Vae`),
    by each worker for itself and always to the same values on the same hardware. Then pairs are encoded, once.
    `mask_weight` and `head_weight` are without effect: there are no mask latents, and no head reads them.
    """

    def _denoiser(self, images: Sequence[bytes] | CachedImages, masks: Sequence[bytes | None]) -> JointDenoiser:
        parts = Pixel4Denoiser.parts(self.weights)
        assert not isinstance(images, CachedImages), "its VAE is fitted on the pixels"
        area = float(np.mean([read_mask(mask or b"").mean() for mask in masks])) if masks else 0.5
        denoiser = Pixel4Denoiser(**parts | {"vae": widen_vae(parts["vae"], area)})
        if images:
            fit_vae(FitPixel4Vae(denoiser.vae, images, masks, self.size), self.section)
        return denoiser

    def _measure(self, rows: EncodedRows) -> None:
        """There are no mask latents to measure."""

    def _whiten(self, scaled: Tensor) -> Tensor:
        return scaled

    def _adapted(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        return add_lora(unet, self.rank, whole=())

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        return latent_loss(model, self.denoiser.scheduler, decoded=self._decoded, **self._drawn(batch, noise))

    def _save_adapter(self, model: nn.Module, directory: Path) -> None:
        """The adapter, which any Stable Diffusion pipeline loads, and the VAE whole beside it."""
        save_lora(directory, model, whole=())  # type: ignore[arg-type]
        self.denoiser.vae.save_pretrained(directory / "vae", safe_serialization=True)


class PairExamples:
    """Images and masks as pixels, read when they are asked for: a corpus of them does not fit into memory."""

    def __init__(self, images: Sequence[bytes], masks: Sequence[bytes | None], size: int) -> None:
        self.images, self.masks, self.size = images, masks, size

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """`image` (B, 3, H, W) in [-1, 1] and `mask` (B, 1, H, W) in {0, 1}."""
        pairs = [lesion_square(self.images[row], self.masks[row] or b"", self.size) for row in indices.tolist()]
        images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"image": images, "mask": torch.from_numpy(np.stack([mask for _, mask in pairs])[:, None]).float()}


class FitPixel4Vae:
    """Objective: the new channel of a VAE that `widen_vae` widened, and the decoder's last block, by the absolute error
    of the image and BCE and Dice of the mask. All else stays the base's, the old columns of `conv_in` too."""

    def __init__(self, vae: AutoencoderKL, images: Sequence[bytes], masks: Sequence[bytes | None], size: int) -> None:
        self.vae, self.examples = vae, PairExamples(images, masks, size)

    def build(self) -> nn.Module:
        vae = self.vae.requires_grad_(False)
        decoder, entry = vae.decoder, vae.encoder.conv_in.weight
        for part in (decoder.up_blocks[-1], decoder.conv_norm_out, decoder.conv_out):
            part.requires_grad_(True)
        entry.requires_grad_(True)
        entry.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:, :RGB]), gradient[:, RGB:]], dim=1))
        return vae.train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        both = torch.cat([batch["image"], mask_to_vae_input(batch["mask"])[:, :1]], dim=1)  # (B, 4, H, W)
        found = model.decode(model.encode(both).latent_dist.mode()).sample  # type: ignore[operator]
        image = F.l1_loss(found[:, :RGB], batch["image"])
        mask = dice_bce_rows(found[:, RGB:], batch["mask"]).mean()
        return {"loss": image + mask, "image_l1": image, "mask": mask}

    def save(self, model: nn.Module, directory: Path) -> None:
        model.save_pretrained(directory, safe_serialization=True)  # type: ignore[operator]

    def load(self, directory: Path) -> nn.Module:
        loaded: nn.Module = load_part(AutoencoderKL, directory)
        return loaded


def fit_vae(objective: FitPixel4Vae, section: LoraSection) -> None:
    """Fit the objective's VAE in place, and freeze it: a fifth of the section's steps at its rate and batch, without
    weight decay, which would also pull at the columns that have no gradient."""
    steps = max(1, section.steps // VAE_SHARE)
    own = FitSection(
        steps=steps, batch_size=section.batch_size, learning_rate=section.learning_rate, seed=section.seed,
        warmup_steps=min(section.warmup_steps, steps // 2), weight_decay=0.0, clip_norm=section.clip_norm,
        checkpoint_every=steps,
    )  # fmt: skip
    worker = Worker(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        train(objective, own, Path(scratch), worker=worker)
    objective.vae.to("cpu").requires_grad_(False).eval()
