"""DermaFlux's fit (arXiv 2603.16392): LoRA on a frozen FLUX.1, at several resolutions in one fit.

The objective is rectified flow's, the mean square of v - (eps - z0) at z_s = (1 - s) z0 + s eps. Noise levels are
logit-normal and then shifted by the resolution, as the sampler shifts them; they come from each row's own stream and
never from a scheduler's table, which `set_timesteps` overwrites in place.

Latents are encoded once, and a row's latents and caption are read by one index, so the two can never come apart.

Letters: N rows, B of a batch, C latent channels, h and w latent sides, U different captions, L tokens, D token width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from factory import records
from factory.fits.encoded import Arrays, CachedImages, EncodedRows, encoded_rows
from factory.fits.joint import NON_FINITE_LATENTS, TEXT_CACHE, FitRows
from factory.fits.objective import Groups, RowNoise, rows_of_step
from factory.fits.presets import Preset, preset_of
from factory.images import RGB, read_png, resized
from factory.models import codec
from factory.models.flux import FluxDenoiser, resolution_shift, velocity
from factory.models.flux_lora import TARGETS, adapter_state, add_lora, load_adapter, save_adapter
from factory.models.quantise import check_quantised, compute_dtype, load_base
from factory.models.text_cache import TextEmbeddings
from factory.models.weights import text_encoder_digest, tree_digest
from factory.recipe import LoraSection
from factory.storage import Store

TOO_SMALL = "too_small"  # why a row is left out


class ScaledExamples:
    """Latents of several resolutions, one bucket each, with their captions.

    buckets: (N_b, C, h_b, w_b) float16 each; index: which of the conditions (U, L, D) is each row's, (N,), bucket after
    bucket; groups: columns of values per row (N,), whose groups each bucket shows equally often. A batch is of one
    bucket. Each has a share of the batches by its size, a bucket smaller than a batch fills it by showing rows again,
    and within a bucket without groups all rows are shown before any is shown twice.
    """

    def __init__(
        self, buckets: Sequence[Tensor], conditions: Tensor, index: np.ndarray, groups: Sequence[np.ndarray] = ()
    ) -> None:
        self.buckets = [bucket for bucket in buckets if len(bucket)]
        self.conditions, self.index = conditions, index
        self.starts = np.cumsum([0, *(len(bucket) for bucket in self.buckets)])
        ends = zip(self.starts, self.starts[1:], strict=False)
        self._groups = [Groups(*(column[start:end] for column in groups)) for start, end in ends] if groups else None

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
        if self._groups is not None:
            return self.starts[bucket] + self._groups[bucket].rows_of_step(seed, before, batch_size)
        return self.starts[bucket] + rows_of_step(seed, before, batch_size, len(self.buckets[bucket]))


class FitFluxLora:
    """Objective: LoRA on a frozen FLUX.1 transformer.

    images: encoded PNG bytes, or encoded before; prompts: their captions. An image is fitted at the largest of the
    scales (px) that is not above its short side, its middle square scaled down to it; one that is below all of them is
    left out, and so is one whose latents are not finite. `dropped` counts both. cache, held_out, groups: see `FitLora`.
    """

    def __init__(
        self, weights: Path, images: Sequence[bytes] | CachedImages, prompts: Sequence[str], section: LoraSection,
        size: int, cache: Store | None = None, held_out: FitRows | None = None, groups: Sequence[Sequence[str]] = (),
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
        encoder = FluxEncoder(weights, self.scales)
        rows = encoded_rows(encoder, images)
        self.dropped = rows.dropped
        digest = records.digest(
            text_encoder_digest(weights), str(own.max_sequence_length), str(dtype).removeprefix("torch.")
        )
        self.texts = TextEmbeddings(cache, TEXT_CACHE, denoiser.condition, digest, dtype)
        own_groups = [np.asarray(column)[rows.index] for column in groups]
        self.examples = self._examples(rows, prompts, own_groups)
        if held_out is not None and len(held_out.images):
            self.held_out = self._examples(encoded_rows(encoder, held_out.images), held_out.prompts)
        self.scheduler = denoiser.scheduler
        self._transformer: FluxTransformer2DModel | None = None
        self.texts.embed = _embedded_before  # so that the text encoders and the VAE are let go

    def _examples(self, rows: EncodedRows, prompts: Sequence[str], groups: Sequence[np.ndarray] = ()) -> ScaledExamples:
        found, index = self.texts.of([*(prompts[place] for place in rows.index), ""])
        self._empty = found[index[-1]][None].float()  # (1, L, D)
        return ScaledExamples([torch.from_numpy(b["latents"]) for b in rows.buckets], found, index[:-1], groups)

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


class FluxEncoder:
    """Images as `latents` (C, h, w) float16: the middle square at the largest of the scales (px) that is not above its
    short side. One that is below all of them is `too_small`. Of the weights only the VAE is loaded."""

    def __init__(self, weights: Path, scales: Sequence[int]) -> None:
        self.weights, self.scales = weights, sorted(scales)
        self._vae: codec.Codec | None = None

    @property
    def digest(self) -> str:
        return records.digest("flux", tree_digest(self.weights / "vae"), *self.scales, "middle_square")

    def _latents(self, pixels: Tensor) -> Tensor:
        if self._vae is None:
            self._vae = codec.load_codec(self.weights / "vae").to("cuda" if torch.cuda.is_available() else "cpu")
        return codec.scaled_modes(self._vae, pixels).half().cpu()

    def __call__(self, images: Sequence[bytes], masks: Sequence[bytes | None]) -> list[Arrays | str]:
        found: list[Arrays | str] = [TOO_SMALL] * len(images)
        waiting: dict[int, list[tuple[int, RGB]]] = {}
        for place, data in enumerate(images):
            rgb = read_png(data)
            if fitting := [scale for scale in self.scales if scale <= min(rgb.shape[:2])]:
                waiting.setdefault(fitting[-1], []).append((place, square(rgb, fitting[-1])))
        for rows in waiting.values():
            pixels = torch.from_numpy(np.stack([rgb for _, rgb in rows])).permute(0, 3, 1, 2).float() / 127.5 - 1
            for (place, _), row in zip(rows, self._latents(pixels), strict=True):
                found[place] = {"latents": row.numpy()} if torch.isfinite(row).all() else NON_FINITE_LATENTS
        return found


def square(rgb: RGB, size: int) -> RGB:
    """The middle square of an image (H, W, 3) at size x size px."""
    height, width = rgb.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.asarray(resized(np.ascontiguousarray(rgb[top : top + side, left : left + side]), size, size))


def _embedded_before(prompts: list[str]) -> Tensor:
    raise AssertionError(f"embedded after the text encoders were let go: {prompts[:3]}")
