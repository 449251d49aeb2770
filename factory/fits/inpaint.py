"""DiffAug's fit (arXiv 2508.17844): LoRA on a frozen inpainting U-Net, over images with masks and captions.

    L = mean |e - e_hat|^2 + lambda_preserve mean over the background of (1 - M) |z0_hat - z_n|^2

M is the lesion's mask, dilated so that no rim of the lesion shows beside it; the network sees the image with grey where
M is. z_n are the latents of the image itself, which outside M is normal skin, and z0_hat is the clean estimate of
Eq. 11. That estimate means little where noise prevails, so the second term is of timesteps below a share of the
schedule only. The public text gives no lambda_preserve: 0.1 keeps the term below the first one there. A base that had
to be widened has its `conv_in` trained whole, for its new columns are zero.

Latents are encoded once, and a row's latents, mask and caption are read by one index, so they can never come apart.

Letters: N rows, B of a batch, h and w latent sides, U different captions, L tokens, D token width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from factory import records
from factory.fits.encoded import Arrays, CachedImages, EncodedRows, encoded_rows
from factory.fits.joint import TEXT_CACHE, FitRows, lesion_square
from factory.fits.objective import Groups, RowNoise
from factory.fits.presets import Preset, preset_of
from factory.fits.weighting import snr_weights
from factory.images import read_mask
from factory.models import codec
from factory.models.denoiser import clean_estimate
from factory.models.inpaint import WHOLE, InpaintDenoiser, context_of, load_stats, load_unet, predicted
from factory.models.lora import ATTENTION, add_lora, load_adapter, save_lora
from factory.models.text_cache import TextEmbeddings
from factory.models.weights import text_encoder_digest, tree_digest
from factory.recipe import LoraSection
from factory.storage import Store

NO_MASK, EMPTY_MASK, FULL_MASK = "no_mask", "empty_mask", "full_mask"
NON_FINITE_LATENTS = "non_finite_latents"


class MaskedExamples:
    """`latents` (4, h, w) and `context` (5, h, w) of encoded rows, with captions embedded before: conditions (U, L, D)
    float32 and which of them is each row's, index (N,). groups: what is shown equally often, see `Groups`."""

    def __init__(self, rows: EncodedRows, conditions: Tensor, index: np.ndarray, groups: Groups | None = None) -> None:
        self.rows, self.conditions, self.index, self.groups = rows, conditions, index, groups

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return self.rows.batch(indices) | {"condition": self.conditions[torch.from_numpy(self.index[indices])]}


class InpaintEncoder:
    """Pairs cut about the lesion and scaled to `size` px, as `latents` (4, h, w) and `context` (5, h, w), float16; or
    why they are lost. Of the weights only the VAE is loaded."""

    def __init__(self, weights: Path, size: int, dilation: float) -> None:
        self.weights, self.size, self.dilation = weights, size, dilation
        self._vae: codec.Codec | None = None
        self.stats = load_stats(weights)

    @property
    def digest(self) -> str:
        vae = tree_digest(self.weights / "vae")
        return records.digest("inpaint", vae, str(self.stats), self.size, self.dilation, "lesion_square")

    def __call__(self, images: Sequence[bytes], masks: Sequence[bytes | None]) -> list[Arrays | str]:
        found: list[Arrays | str] = [
            NO_MASK if mask is None else EMPTY_MASK if not read_mask(mask).any() else "" for mask in masks
        ]
        places = [place for place, reason in enumerate(found) if not reason]
        if not places:
            return found
        pairs = [lesion_square(images[place], masks[place] or b"", self.size) for place in places]
        pixels = torch.from_numpy(np.stack([rgb for rgb, _ in pairs])).permute(0, 3, 1, 2).float() / 127.5 - 1
        outlines = torch.from_numpy(np.stack([mask for _, mask in pairs])[:, None]).float()
        if self._vae is None:
            self._vae = codec.load_codec(self.weights / "vae").to("cuda" if torch.cuda.is_available() else "cpu")
        device = self._vae.device
        latents = self.stats.whiten(codec.scaled_modes(self._vae, pixels)).cpu().half()
        around = context_of(self._vae, self.stats, self.dilation, pixels.to(device), outlines.to(device)).cpu().half()
        for place, row, context in zip(places, latents, around, strict=True):
            found[place] = _unfit(row, context) or {"latents": row.numpy(), "context": context.numpy()}
        return found


class FitInpaintLora:
    """Objective: LoRA on a frozen inpainting U-Net, and `conv_in` whole where it was widened.

    images and masks: encoded PNG bytes, a mask may be None, or images were encoded before; prompts: their captions.
    Images that are not `size` px square are cut about the lesion and scaled. A row is left out that has no mask
    (`no_mask`), whose mask is empty or covers the whole image at the latents' size (`empty_mask`, `full_mask`), or
    whose latents are not finite; `dropped` counts them. cache, held_out, groups: see `FitLora`.
    """

    def __init__(
        self, weights: Path, images: Sequence[bytes] | CachedImages, masks: Sequence[bytes | None],
        prompts: Sequence[str], section: LoraSection, size: int, cache: Store | None = None,
        held_out: FitRows | None = None, groups: Sequence[Sequence[str]] = (),
    ) -> None:  # fmt: skip
        own = section.inpaint
        self.weights, self.section, self.size = weights, section, size
        self.preset = Preset("attention", section.rank, "") if own.preset is None else preset_of("inpaint", own.preset)
        device = "cuda" if torch.cuda.is_available() else "cpu"  # of the worker, which builds its objective itself
        denoiser = InpaintDenoiser.load(weights)
        denoiser.dilation = own.dilation
        denoiser.to(device)
        encoder = InpaintEncoder(weights, size, own.dilation)
        rows = encoded_rows(encoder, images, masks)
        self.dropped = rows.dropped
        self.texts = TextEmbeddings(cache, TEXT_CACHE, denoiser.condition, _text_digest(weights, denoiser))
        columns = [np.asarray(column)[rows.index] for column in groups]
        self.examples = self._examples(rows, prompts, Groups(*columns) if columns else None)
        if held_out is not None and len(held_out.images):
            self.held_out = self._examples(encoded_rows(encoder, held_out.images, held_out.masks), held_out.prompts)
        self.kind, self.alphas_cumprod = denoiser.prediction_type, denoiser.alphas_cumprod.cpu()
        self.factor, self._unet = denoiser.factor, denoiser.unet.to("cpu")
        self.whole: tuple[str, ...] = WHOLE if denoiser.widened else ()
        self._fresh = {name: value.clone() for name, value in self._unet.conv_in.state_dict().items()}
        self.texts.embed = _embedded_before  # so that the text encoders and the VAE are let go

    def _examples(self, rows: EncodedRows, prompts: Sequence[str], groups: Groups | None = None) -> MaskedExamples:
        found, index = self.texts.of([*(prompts[place] for place in rows.index), ""])
        self._empty = found[index[-1]][None]  # (1, L, D)
        return MaskedExamples(rows, found, index[:-1], groups)

    def build(self) -> nn.Module:
        """The U-Net with a fresh adapter, a function of the seed alone."""
        unet = self._unet
        if getattr(unet, "peft_config", None):  # built before
            unet.unload_lora()
            unet.conv_in.load_state_dict(self._fresh)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.section.seed)
            add_lora(unet, self.preset.rank, ATTENTION, self.whole)
        if self.section.inpaint.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet.train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        latents, context, own = batch["latents"], batch["context"], self.section.inpaint
        dropped = (noise.uniform(1, 1) < self.section.caption_dropout).to(latents.device)
        condition = torch.where(dropped, self._empty.to(latents.device), batch["condition"])
        timesteps = noise.integers(len(self.alphas_cumprod))  # (B,)
        alpha_bar = self.alphas_cumprod[timesteps].to(latents.device)
        eps = noise.normal(*latents.shape[1:]).to(latents)
        signal, spread = _levels(alpha_bar)
        noisy = signal * latents + spread * eps
        found = predicted(model, noisy, timesteps.to(latents.device), condition, context, self.factor)
        early = timesteps >= own.preserve_below * len(self.alphas_cumprod)
        return inpaint_loss(
            self.kind, alpha_bar, latents=latents, noise=eps, predicted=found, mask=context[:, :1],
            lambda_preserve=own.lambda_preserve, counted=~early.to(latents.device),
            gamma=self.section.min_snr_gamma,
        )  # fmt: skip

    def save(self, model: nn.Module, directory: Path) -> None:
        """`pytorch_lora_weights.safetensors`, `dual_io.safetensors` where `conv_in` was trained, and a card."""
        save_lora(directory, model.eval(), self.whole)  # type: ignore[arg-type]
        own = self.section.inpaint
        card = {
            "preset": own.preset, "rank": self.preset.rank, "targets": self.preset.targets, "size": self.size,
            "lambda_preserve": own.lambda_preserve, "preserve_below": own.preserve_below, "dilation": own.dilation,
            "widened": bool(self.whole), "num_images": len(self.examples), "dropped": dict(self.dropped),
        }  # fmt: skip
        (directory / "card.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")

    def load(self, directory: Path) -> nn.Module:
        """The U-Net with the adapter that `save` wrote over it."""
        return load_adapter(load_unet(self.weights)[0], directory, WHOLE)


def inpaint_loss(
    kind: str,
    alpha_bar: Tensor,
    *,
    latents: Tensor,
    noise: Tensor,
    predicted: Tensor,
    mask: Tensor,
    lambda_preserve: float,
    counted: Tensor,
    gamma: float | None = None,
) -> dict[str, Tensor]:
    """The objective above, of what the network predicted: `loss`, `noise_mse`, `preserve`.

    alpha_bar (B,); latents, noise and predicted (B, 4, h, w); mask (B, 1, h, w) in {0, 1}; counted (B,) bool: the rows
    whose clean estimate is to keep the background, the others count as zero there, so that the mean does not depend on
    how a batch is split over workers. gamma: see `snr_weights`.
    """
    signal, spread = _levels(alpha_bar)
    target = noise if kind == "epsilon" else signal * noise - spread * latents
    rows = (predicted - target).square().flatten(1).mean(1)  # (B,)
    noise_mse = (snr_weights(kind, alpha_bar, gamma) * rows).mean()
    estimate = clean_estimate(kind, signal * latents + spread * noise, predicted, alpha_bar)
    changed = torch.where(counted, background_error(estimate, latents, mask), 0.0).mean()
    return {"loss": noise_mse + lambda_preserve * changed, "noise_mse": noise_mse, "preserve": changed}


def background_error(estimate: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
    """Mean square of what a clean estimate changed outside the mask, (B,); 0 for a mask that leaves nothing outside."""
    outside = 1 - mask  # (B, 1, h, w)
    errors = (outside * (estimate - latents).square()).flatten(1).sum(1)
    return errors / (outside.flatten(1).sum(1) * latents.shape[1]).clamp_min(1)


def _unfit(latents: Tensor, context: Tensor) -> str | None:
    """Why a row (4, h, w) with its context (5, h, w) cannot be fitted."""
    if not context[0].any():
        return EMPTY_MASK
    if context[0].all():
        return FULL_MASK
    finite = torch.isfinite(latents).all() and torch.isfinite(context).all()
    return None if finite else NON_FINITE_LATENTS


def _levels(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and spread of a level, (B, 1, 1, 1)."""
    level = alpha_bar.reshape(-1, 1, 1, 1)
    return level.sqrt(), (1 - level).sqrt()


def _text_digest(weights: Path, denoiser: InpaintDenoiser) -> str:
    """Of what decides how a prompt is packed: SDXL's encoders, and whether its empty prompt is zeros."""
    found = text_encoder_digest(weights)
    return records.digest(found, denoiser.zero_empty) if denoiser.xl else found


def _embedded_before(prompts: list[str]) -> Tensor:
    raise AssertionError(f"embedded after the text encoders were let go: {prompts[:3]}")
