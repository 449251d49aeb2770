"""Fits of the joint generator: the starter from nothing, and LoRA on whatever base is given.

Both minimise `joint_loss` on whitened latents of image and mask; they differ in what trains. Latents are encoded
once, and captions are read by the same index, so the two can never come apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from factory import records
from factory.fits.encoded import Arrays, CachedImages, EncodedRows, encoded_rows
from factory.fits.objective import Groups, RowNoise
from factory.fits.perceptual import DecodedTerms
from factory.fits.presets import preset_of
from factory.fits.weighting import snr_weights
from factory.images import read_mask, read_png
from factory.models.joint import JointDenoiser, joint_loss
from factory.models.joint_arms import load_joint
from factory.models.latents import LatentStats
from factory.models.lora import add_lora, save_lora
from factory.models.segmenter import dice_bce_loss
from factory.models.text_cache import TextEmbeddings
from factory.models.weights import text_encoder_digest, tree_digest
from factory.recipe import LoraSection
from factory.storage import Store

ENCODE_BATCH = 8
NON_FINITE_LATENTS = "non_finite_latents"  # why a row is left out
STATS_ROWS = 4096  # that statistics are measured on, evenly spaced
TEXT_CACHE = "cache/text"  # in a run's store


class _Pairs:
    """Joint latents (N, 8, h, w) float16 with their masks (N, H, W) bool. `whiten` is applied to a batch's rows."""

    def __init__(
        self, latents: np.ndarray, masks: np.ndarray, whiten: Callable[[Tensor], Tensor] = lambda latents: latents
    ) -> None:
        self.latents, self.masks, self.whiten = latents, masks, whiten

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {
            "latents": self.whiten(torch.from_numpy(self.latents[indices].astype(np.float32))),
            "mask": torch.from_numpy(self.masks[indices][:, None].astype(np.float32)),
        }


class LatentExamples(_Pairs):
    """Whitened pairs with their captions' tokens, (N, L) int, for a fit that trains the text encoder too.
    `caption_dropout` of the rows, drawn by (step, row), train the unconditional half; their tokens are the empty
    prompt's."""

    def __init__(self, latents: np.ndarray, masks: np.ndarray, tokens: np.ndarray) -> None:
        super().__init__(latents, masks)
        self.tokens = tokens

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return super().batch(indices) | {"tokens": torch.from_numpy(self.tokens[indices].astype(np.int64))}


class EmbeddedExamples(_Pairs):
    """Pairs with captions embedded before: conditions (U, L, D) float32 of the U different captions, and which of them
    is each row's, index (N,). groups: what is shown equally often, see `Groups`."""

    def __init__(
        self, latents: np.ndarray, masks: np.ndarray, conditions: Tensor, index: np.ndarray,
        whiten: Callable[[Tensor], Tensor] = lambda latents: latents, groups: Groups | None = None,
    ) -> None:  # fmt: skip
        super().__init__(latents, masks, whiten)
        self.conditions, self.index, self.groups = conditions, index, groups

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return super().batch(indices) | {"condition": self.conditions[torch.from_numpy(self.index[indices])]}


def tokens_of(denoiser: JointDenoiser, prompts: Sequence[str]) -> np.ndarray:
    """Prompts -> token ids (N, L), padded to the tokenizer's length as `condition` pads them."""
    length = denoiser.tokenizer.model_max_length
    found = denoiser.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(found["input_ids"], np.int32)


def encode_pairs(
    denoiser: JointDenoiser, count: int, pair: Callable[[int], tuple[np.ndarray, np.ndarray]], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scaled, not yet whitened latents (N, C, h, w) float16 and masks (N, H, W) bool of `pair(index)`'s images
    (H, W, 3) uint8 and masks (H, W) bool."""
    latents = np.empty((count, *denoiser.latent_shape(size, size)), np.float16)
    masks = np.empty((count, size, size), bool)
    for start in range(0, count, ENCODE_BATCH):
        pairs = [pair(index) for index in range(start, min(count, start + ENCODE_BATCH))]
        images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2).float() / 127.5 - 1
        stacked = np.stack([mask for _, mask in pairs])
        masks[start : start + len(pairs)] = stacked
        scaled = denoiser.scaled_latents(images, torch.from_numpy(stacked[:, None]).float())
        latents[start : start + len(pairs)] = scaled.half().cpu().numpy()
    return latents, masks


class JointEncoder:
    """Pairs as scaled, not yet whitened `latents` (8, h, w) float16 and `mask` (H, W) bool, cut about the lesion and
    scaled to `size` px. denoiser: what encodes, by default that of the weights."""

    def __init__(self, weights: Path, size: int, denoiser: JointDenoiser | None = None) -> None:
        self.weights, self.size, self._denoiser = weights, size, denoiser

    @property
    def digest(self) -> str:
        return records.digest("joint", tree_digest(self.weights / "vae"), self.size, "lesion_square")

    @property
    def denoiser(self) -> JointDenoiser:
        if self._denoiser is None:
            self._denoiser = JointDenoiser.load(self.weights).to("cuda" if torch.cuda.is_available() else "cpu")
        return self._denoiser

    def __call__(self, images: Sequence[bytes], masks: Sequence[bytes | None]) -> list[Arrays | str]:
        pairs = [lesion_square(image, mask or b"", self.size) for image, mask in zip(images, masks, strict=True)]
        latents, found = encode_pairs(self.denoiser, len(pairs), pairs.__getitem__, self.size)
        return [
            {"latents": row, "mask": mask} if np.isfinite(row).all() else NON_FINITE_LATENTS
            for row, mask in zip(latents, found, strict=True)
        ]


class FitRows(NamedTuple):
    """Rows beside those that a fit learns from: images, masks, and captions or, of a fit by class, diagnoses."""

    images: Sequence[bytes] | CachedImages
    masks: Sequence[bytes | None]
    prompts: Sequence[Any]


class FitStarter:
    """Objective: U-Net and text encoder of a fresh joint denoiser, on latents that were encoded before."""

    def __init__(
        self, base: Callable[[], JointDenoiser], examples: LatentExamples, caption_dropout: float = 0.1
    ) -> None:
        self.base, self.examples, self.caption_dropout = base, examples, caption_dropout
        self.denoiser: JointDenoiser | None = None

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        self.denoiser = self.base()
        self._empty = torch.from_numpy(tokens_of(self.denoiser, [""]).astype(np.int64))
        model = nn.ModuleDict({"unet": self.denoiser.unet, "text_encoder": self.denoiser.text_encoder})
        return model.requires_grad_(True).train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        assert self.denoiser is not None
        latents = batch["latents"]
        dropped = noise.uniform(1) < self.caption_dropout
        tokens = torch.where(dropped, self._empty, batch["tokens"])
        return joint_loss(
            model["unet"],  # type: ignore[index]
            None,
            self.denoiser.scheduler,
            latents=latents,
            noise=noise.normal(*latents.shape[1:]),
            timesteps=noise.integers(len(self.denoiser.alphas_cumprod)),
            condition=model["text_encoder"](tokens)[0],  # type: ignore[index]
            mask=batch["mask"],
            mask_weight=1.0,
            head_weight=0.0,
        )

    def save(self, model: nn.Module, directory: Path) -> None:
        assert self.denoiser is not None
        model.eval()
        self.denoiser.save(directory, dtype=torch.float16)

    def load(self, directory: Path) -> nn.Module:
        return JointDenoiser.load(directory).unet


class FitMaskHead:
    """Objective: the tiny decoder of mask latents, on clean and slightly noised latents of true masks."""

    NOISE = 0.3  # of unit-variance latents: what sampling leaves in them

    def __init__(self, base: Callable[[], JointDenoiser], examples: LatentExamples) -> None:
        self.base, self.examples = base, examples

    def build(self) -> nn.Module:
        head = self.base().mask_head
        assert head is not None
        return head.requires_grad_(True).train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        latents = batch["latents"][:, 4:]
        level = noise.uniform(1, 1, 1) * self.NOISE
        logits = model(latents + level * noise.normal(*latents.shape[1:]))
        return {"loss": dice_bce_loss(logits, batch["mask"])}

    def save(self, model: nn.Module, directory: Path) -> None:
        model.save(directory)  # type: ignore[operator]

    def load(self, directory: Path) -> nn.Module:
        from factory.models.latents import MaskHead

        return MaskHead.load(directory)


class FitLora:
    """Objective: LoRA and both new convolutions on a frozen base, or with `train_mode: full` the whole U-Net.

    images and masks are encoded PNG bytes, or images were encoded before; prompts their captions. Images that are not
    `size` px square are scaled. A pair whose latents are not finite is left out, and `dropped` counts it.
    cache: where the captions' embeddings are kept for the next fit or the next worker; None keeps them nowhere.
    held_out: rows that are never trained on. groups: values per row whose groups are shown equally often.
    """

    def __init__(
        self, weights: Path, images: Sequence[bytes] | CachedImages, masks: Sequence[bytes | None],
        prompts: Sequence[str], section: LoraSection, size: int, cache: Store | None = None,
        held_out: FitRows | None = None, groups: Sequence[Sequence[str]] = (),
    ) -> None:  # fmt: skip
        self.weights, self.section, self.size = weights, section, size
        preset = section.joint.preset
        self.rank = section.rank if preset is None else preset_of("joint", preset).rank
        self.denoiser = self._denoiser(images, masks)
        encoder = JointEncoder(weights, size, self.denoiser)
        rows = encoded_rows(encoder, images, masks)
        self.dropped = rows.dropped
        self._measure(rows)
        self.texts = TextEmbeddings(cache, TEXT_CACHE, self.denoiser.condition, text_encoder_digest(weights))
        own = [np.asarray(column)[rows.index] for column in groups]
        self.examples = self._examples(rows, prompts, Groups(*own) if own else None)
        if held_out is not None and len(held_out.images):
            others = encoded_rows(encoder, held_out.images, held_out.masks)
            self.held_out = self._examples(others, held_out.prompts)
        terms = section.joint
        self._decoded = (
            DecodedTerms(self.denoiser, terms.ssim_weight, terms.edge_weight)
            if terms.ssim_weight or terms.edge_weight
            else None
        )

    def _denoiser(self, images: Sequence[bytes] | CachedImages, masks: Sequence[bytes | None]) -> JointDenoiser:
        return JointDenoiser.load(self.weights)

    def _measure(self, rows: EncodedRows) -> None:
        """A plain base has no mask statistics: they come from the corpus. A joint one keeps those it was fitted on."""
        if self.denoiser.stats == LatentStats() and len(rows):
            some = np.linspace(0, len(rows) - 1, min(len(rows), STATS_ROWS)).astype(np.int64)
            self.denoiser.stats = LatentStats.measure(rows.batch(some)["latents"], whiten_image=False)

    def _whiten(self, scaled: Tensor) -> Tensor:
        return self.denoiser.stats.whiten(scaled)

    def _examples(self, rows: EncodedRows, prompts: Sequence[str], groups: Groups | None = None) -> EmbeddedExamples:
        found = self.texts.of([prompts[place] for place in rows.index])
        bucket = rows.buckets[0] if rows.buckets else {"latents": np.empty((0, 8, 1, 1)), "mask": np.empty((0, 1, 1))}
        return EmbeddedExamples(bucket["latents"], bucket["mask"], *found, self._whiten, groups)

    def build(self) -> nn.Module:
        torch.manual_seed(self.section.seed)
        for module in (self.denoiser.text_encoder, self.denoiser.vae, self.denoiser.mask_head):
            if module is not None:
                module.requires_grad_(False)
        self._empty = self.denoiser.condition([""])
        if self.section.train_mode == "full":
            return self.denoiser.unet.requires_grad_(True).train()
        return self._adapted(self.denoiser.unet).train()

    def _adapted(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        return add_lora(unet, self.rank)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        head, drawn = self.denoiser.mask_head, self._drawn(batch, noise)
        return joint_loss(
            self._network(model, drawn["latents"]),
            None if head is None else head.to(drawn["latents"].device),
            self.denoiser.scheduler,
            mask=batch["mask"],
            mask_weight=self.section.mask_weight,
            head_weight=self.section.head_weight,
            decoded=self._decoded,
            **drawn,
        )

    def _drawn(self, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        """What a loss wants of a batch: latents, noise, timesteps, conditions with captions dropped, rows' weights."""
        latents, levels = batch["latents"], self.denoiser.scheduler.alphas_cumprod
        dropped = (noise.uniform(1, 1) < self.section.caption_dropout).to(latents.device)
        eps, timesteps = noise.normal(*latents.shape[1:]).to(latents), noise.integers(len(levels))
        weights = snr_weights(
            self.denoiser.prediction_type, levels[timesteps.to(levels.device)], self.section.min_snr_gamma
        )
        return {
            "latents": latents, "noise": eps, "timesteps": timesteps.to(latents.device),
            "condition": torch.where(dropped, self._empty.to(latents.device), batch["condition"]),
            "weights": weights.to(latents.device),
        }  # fmt: skip

    def _network(self, model: nn.Module, latents: Tensor) -> Callable[..., Any]:
        """What the loss calls; latents (B, 8, h, w) are the clean ones."""
        return model

    def save(self, model: nn.Module, directory: Path) -> None:
        """The adapter and the statistics, or of `train_mode: full` a whole diffusers directory, and a card."""
        model.eval()
        if self.section.train_mode == "full":
            self.denoiser.unet = model  # the one it was built with may lie in pieces on many workers
            self.denoiser.save(directory)
        else:
            self._save_adapter(model, directory)
        (directory / "card.json").write_text(json.dumps(self._card(), indent=2, sort_keys=True) + "\n")

    def _save_adapter(self, model: nn.Module, directory: Path) -> None:
        save_lora(directory, model)  # type: ignore[arg-type]
        self.denoiser.stats.save(directory / "latent_stats.json")

    def _card(self) -> dict[str, Any]:
        own, lora = self.section.joint, self.section.train_mode == "lora"
        return {
            "mode": self.section.train_mode, "encoding": own.encoding, "pipeline": own.pipeline,
            "prediction_type": self.denoiser.prediction_type, "num_images": len(self.examples),
            "dropped": dict(self.dropped), "rank": self.rank if lora else None,
        }  # fmt: skip

    def load(self, directory: Path) -> nn.Module:
        """The U-Net with what `save` wrote."""
        full = self.section.train_mode == "full"
        return (load_joint(directory) if full else load_joint(self.weights, adapter=directory)).unet


def lesion_square(image: bytes, mask: bytes, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask at size x size px: the longer side cut about the lesion's centre, then scaled."""
    import cv2

    rgb, found = read_png(image), read_mask(mask)
    height, width = found.shape
    side = min(height, width)
    ys, xs = np.nonzero(found)
    centre = (ys.mean(), xs.mean()) if len(ys) else (height / 2, width / 2)
    top = int(np.clip(centre[0] - side / 2, 0, height - side))
    left = int(np.clip(centre[1] - side / 2, 0, width - side))
    rgb, found = rgb[top : top + side, left : left + side], found[top : top + side, left : left + side]
    if side != size:
        shrunk = cv2.resize(found.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
        return cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA).astype(np.uint8), shrunk >= 0.5
    return rgb, found
