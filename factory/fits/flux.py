"""DermaFlux's fit (arXiv 2603.16392): LoRA on a frozen FLUX.1, at several resolutions in one fit.

The objective is rectified flow's, the mean square of v - (eps - z0) at z_s = (1 - s) z0 + s eps. Noise levels are
logit-normal and then shifted by the resolution, as the sampler shifts them; they come from each row's own stream and
never from a scheduler's table, which `set_timesteps` overwrites in place.

Latents are encoded once, and a row's latents and caption are read by one index, so the two can never come apart.

Letters: N rows, B of a batch, C latent channels, h and w latent sides, U different captions, L tokens, D token width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from factory import records
from factory.fits.joint import ENCODE_BATCH, NON_FINITE_LATENTS, TEXT_CACHE
from factory.fits.objective import RowNoise, rows_of_step
from factory.fits.presets import Preset, preset_of
from factory.images import RGB, read_png, resized
from factory.models.flux import FluxDenoiser, resolution_shift, velocity
from factory.models.flux_lora import TARGETS, adapter_state, add_lora, load_adapter, save_adapter
from factory.models.quantise import check_quantised, compute_dtype, load_base
from factory.models.text_cache import TextEmbeddings
from factory.models.weights import text_encoder_digest
from factory.recipe import LoraSection
from factory.storage import Store

TOO_SMALL = "too_small"  # why a row is left out


class ScaledExamples:
    """Latents of several resolutions, one bucket each, with their captions.

    buckets: (N_b, C, h_b, w_b) float16 each; index: which of the conditions (U, L, D) is each row's, (N,), bucket after
    bucket. A batch is of one bucket. Each has a share of the batches by its size, a bucket smaller than a batch fills
    it by showing rows again, and within a bucket all rows are shown before any is shown twice.
    """

    def __init__(self, buckets: Sequence[Tensor], conditions: Tensor, index: np.ndarray) -> None:
        self.buckets = [bucket for bucket in buckets if len(bucket)]
        self.conditions, self.index = conditions, index
        self.starts = np.cumsum([0, *(len(bucket) for bucket in self.buckets)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """`latents` (B, C, h, w) float32 and `condition` (B, L, D) of rows of one bucket."""
        bucket = int(np.searchsorted(self.starts, indices[0], side="right")) - 1
        latents = self.buckets[bucket][torch.from_numpy(indices - self.starts[bucket])]
        return {"latents": latents.float(), "condition": self.conditions[torch.from_numpy(self.index[indices])].float()}

    def rows_of_step(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Rounds of batches in a shuffled order of the buckets; see `Bucketed`."""
        shares = [-(-len(bucket) // batch_size) for bucket in self.buckets]  # batches of a bucket in a round
        turns = np.repeat(np.arange(len(shares)), shares)
        number, place = divmod(step, len(turns))
        order = np.random.default_rng([seed, len(turns), number]).permutation(turns)
        bucket = order[place]
        before = number * shares[bucket] + int((order[:place] == bucket).sum())  # batches that this bucket has had
        return self.starts[bucket] + rows_of_step(seed, before, batch_size, len(self.buckets[bucket]))


class FitFluxLora:
    """Objective: LoRA on a frozen FLUX.1 transformer.

    images: encoded PNG bytes, prompts: their captions. An image is fitted at the largest of the scales (px) that is not
    above its short side, its middle square scaled down to it; one that is below all of them is left out, and so is one
    whose latents are not finite. `dropped` counts both. cache: see `FitLora`.
    """

    def __init__(
        self, weights: Path, images: Sequence[bytes], prompts: Sequence[str], section: LoraSection, size: int,
        cache: Store | None = None,
    ) -> None:  # fmt: skip
        own = section.flux
        self.weights, self.section, self.scales = weights, section, sorted(set(own.scales)) or [size]
        self.preset = Preset("attention", section.rank, "") if own.preset is None else preset_of("flux", own.preset)
        device = "cuda" if torch.cuda.is_available() else "cpu"  # of the worker, which builds its objective itself
        check_quantised(own.base_dtype, "flux", "fit.lora.flux.base_dtype", device == "cuda")
        dtype = compute_dtype(own.base_dtype)
        # The transformer is read once these are let go, so that a card need not hold both.
        denoiser = FluxDenoiser.load(
            weights, dtype=dtype, max_sequence_length=own.max_sequence_length, encoders_only=True
        )
        denoiser.to(device, dtype)
        buckets, kept, self.dropped = encode_scales(denoiser, images, self.scales)
        digest = records.digest(
            text_encoder_digest(weights), str(own.max_sequence_length), str(dtype).removeprefix("torch.")
        )
        self.texts = TextEmbeddings(cache, TEXT_CACHE, denoiser.condition, digest, dtype)
        found, index = self.texts.of([*(prompts[row] for row in kept), ""])
        self._empty = found[index[-1]][None].float()  # (1, L, D)
        self.examples = ScaledExamples(buckets, found, index[:-1])
        self.scheduler = denoiser.scheduler
        self._transformer: FluxTransformer2DModel | None = None
        self.texts.embed = _embedded_before  # so that the text encoders and the VAE are let go

    def build(self) -> nn.Module:
        """The transformer with a fresh adapter, a function of the seed alone."""
        transformer = self._transformer or load_base(self.weights / "transformer", self.section.flux.base_dtype)
        self._transformer = transformer
        if getattr(transformer, "peft_config", None):  # built before
            transformer.unload_lora()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.section.seed)
            add_lora(transformer, self.preset.rank, TARGETS[self.preset.targets])
        if self.section.flux.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        return transformer.train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        latents = batch["latents"]
        dropped = (noise.uniform(1, 1) < self.section.caption_dropout).to(latents.device)
        condition = torch.where(dropped, self._empty.to(latents.device), batch["condition"])
        levels = noise_levels(noise, self.shift(latents)).to(latents.device)  # (B,)
        eps = noise.normal(*latents.shape[1:]).to(latents)
        s = levels.reshape(-1, 1, 1, 1)
        distilled = model.config.guidance_embeds  # type: ignore[union-attr]
        guidance = latents.new_full((len(latents),), self.section.flux.guidance) if distilled else None
        found = velocity(model, (1 - s) * latents + s * eps, levels, condition, guidance)
        return {"loss": (found - (eps - latents)).square().mean()}

    def shift(self, latents: Tensor) -> float:
        """How far the noise levels of latents (B, C, h, w) move: as in sampling at that size."""
        return resolution_shift(self.scheduler, latents.shape[-1] * latents.shape[-2] // 4)

    def save(self, model: nn.Module, directory: Path) -> None:
        """`pytorch_lora_weights.safetensors`, and a card with what was fitted on what."""
        save_adapter(directory, adapter_state(model))  # type: ignore[arg-type]
        own = self.section.flux
        card = {
            "preset": own.preset, "rank": self.preset.rank, "targets": self.preset.targets, "scales": self.scales,
            "max_sequence_length": own.max_sequence_length, "num_images": len(self.examples),
            "dropped": dict(self.dropped),
        }  # fmt: skip
        (directory / "card.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")

    def load(self, directory: Path) -> nn.Module:
        """The transformer with the adapter that `save` wrote over it."""
        return load_adapter(load_base(self.weights / "transformer", self.section.flux.base_dtype), directory)


def noise_levels(noise: RowNoise, shift: float) -> Tensor:
    """Levels s in (0, 1), (B,): logit-normal(0, 1) (Esser et al., arXiv 2403.03206), then shifted towards noise."""
    level = noise.normal().sigmoid()
    return shift * level / (1 + (shift - 1) * level)


def encode_scales(
    denoiser: FluxDenoiser, images: Sequence[bytes], scales: Sequence[int]
) -> tuple[list[Tensor], list[int], Counter[str]]:
    """Latents (N_b, C, h_b, w_b) float16 by scale, ascending; the image's number of every row of them, bucket after
    bucket; and how many images were left out, by reason."""
    scales = sorted(scales)
    waiting: dict[int, list[tuple[int, RGB]]] = {scale: [] for scale in scales}
    found: dict[int, list[tuple[int, Tensor]]] = {scale: [] for scale in scales}
    dropped: Counter[str] = Counter()

    def encode(scale: int) -> None:
        rows, waiting[scale] = waiting[scale], []
        pixels = torch.from_numpy(np.stack([rgb for _, rgb in rows])).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = denoiser.encode_image(pixels).half().cpu()
        for (number, _), row in zip(rows, latents, strict=True):
            if torch.isfinite(row).all():
                found[scale].append((number, row))
            else:
                dropped[NON_FINITE_LATENTS] += 1

    for number, data in enumerate(images):
        rgb = read_png(data)
        fitting = [scale for scale in scales if scale <= min(rgb.shape[:2])]
        if not fitting:
            dropped[TOO_SMALL] += 1
            continue
        waiting[fitting[-1]].append((number, square(rgb, fitting[-1])))
        if len(waiting[fitting[-1]]) == ENCODE_BATCH:
            encode(fitting[-1])
    for scale in scales:
        if waiting[scale]:
            encode(scale)
    buckets = [
        torch.stack([row for _, row in found[scale]])
        if found[scale]
        else torch.empty(0, *denoiser.latent_shape(scale, scale), dtype=torch.float16)
        for scale in scales
    ]
    return buckets, [number for scale in scales for number, _ in found[scale]], dropped


def square(rgb: RGB, size: int) -> RGB:
    """The middle square of an image (H, W, 3) at size x size px."""
    height, width = rgb.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.asarray(resized(np.ascontiguousarray(rgb[top : top + side, left : left + side]), size, size))


def _embedded_before(prompts: list[str]) -> Tensor:
    raise AssertionError(f"embedded after the text encoders were let go: {prompts[:3]}")
