"""DerMAE's fit (arXiv 2602.19848): latent diffusion by class, from nothing, of a whole base, or as LoRA on one.

The objective is the mean square of the prediction (epsilon or v) on whitened latents that were encoded once. The null
class of guidance is learnt from rows that are drawn for it, each by its own stream; what a DiT of diffusers drops by
itself in train mode is turned off, for it draws from the global seed and in every block anew.

Where the VAE comes with statistics or a scaling factor they are kept, so that a gate that was fitted on it judges these
latents too; a VAE without either is measured on the images of the fit.

Letters: N rows, B of a batch, C latent channels, h and w latent sides, K classes.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from factory import records, taxonomy
from factory.fits.encoded import Arrays, CachedImages, EncodedRows, encoded_rows, taken
from factory.fits.flux import NON_FINITE_LATENTS, TOO_SMALL, square
from factory.fits.joint import STATS_ROWS, FitRows
from factory.fits.objective import Groups, RowNoise
from factory.fits.weighting import snr_weights
from factory.images import read_png
from factory.models import codec
from factory.models.class_conditional import STATS_FILE, ClassConditionalDenoiser
from factory.models.class_lora import add_lora, save_adapter
from factory.models.class_networks import (
    NETWORKS,
    build_network,
    class_prediction,
    stop_own_dropout,
    take_classes,
)
from factory.models.codec import Codec
from factory.models.latents import LatentStats
from factory.models.starter import build_scheduler
from factory.models.weights import family_of, tree_digest
from factory.recipe import LoraSection

NO_DIAGNOSIS, CLASS_NOT_ASKED = "no_diagnosis", "class_not_asked"


class ClassExamples:
    """Scaled latents (N, C, h, w) float16 and the class of each, `labels` (N,) int64; `whiten` is applied to a batch's
    rows. groups: what is shown equally often, see `Groups`."""

    def __init__(
        self, latents: np.ndarray, labels: np.ndarray, whiten: Callable[[Tensor], Tensor], groups: Groups | None = None
    ) -> None:
        self.latents, self.labels, self.whiten, self.groups = latents, labels, whiten, groups

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """`latents` (B, C, h, w) float32 and `label` (B,)."""
        return {
            "latents": self.whiten(torch.from_numpy(self.latents[indices].astype(np.float32))),
            "label": torch.from_numpy(self.labels[indices]),
        }


class ClassEncoder:
    """Images as scaled `latents` (C, h, w) float16 of the middle square at `size` px; a smaller image is `too_small`.
    Of the weights only the VAE is loaded."""

    def __init__(self, weights: Path, size: int) -> None:
        self.weights, self.size = weights, size
        self._vae: Codec | None = None

    @property
    def digest(self) -> str:
        return records.digest("class_conditional", tree_digest(self.weights / "vae"), self.size, "middle_square")

    @property
    def vae(self) -> Codec:
        if self._vae is None:
            self._vae = codec.load_codec(self.weights / "vae").to("cuda" if torch.cuda.is_available() else "cpu")
        return self._vae

    def __call__(self, images: Sequence[bytes], masks: Sequence[bytes | None]) -> list[Arrays | str]:
        found: list[Arrays | str] = [TOO_SMALL] * len(images)
        pictures = [read_png(data) for data in images]
        places = [place for place, rgb in enumerate(pictures) if min(rgb.shape[:2]) >= self.size]
        if not places:
            return found
        squares = np.stack([square(pictures[place], self.size) for place in places])
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 127.5 - 1
        for place, row in zip(places, codec.scaled_modes(self.vae, pixels).half().cpu(), strict=True):
            found[place] = {"latents": row.numpy()} if torch.isfinite(row).all() else NON_FINITE_LATENTS
        return found


class FitClassConditional:
    """Objective: a class-conditional network on latents.

    weights: a class-conditional directory to fit on; or any base with a VAE, on which a network of the section's preset
    is fitted from nothing. images: encoded PNG bytes, or encoded before, each with its diagnosis or None; the middle
    square is scaled to `size` px. classes: the diagnoses to learn; a row of any other is left out, and so are images
    that are smaller than `size` and latents that are not finite. `dropped` counts them by reason. Raises ValueError
    where a class has no example left, and logs where one has a single one. held_out, groups: see `FitLora`; the
    captions are diagnoses.
    """

    def __init__(
        self, weights: Path, images: Sequence[bytes] | CachedImages, diagnoses: Sequence[str | None],
        section: LoraSection, size: int, classes: Sequence[str], held_out: FitRows | None = None,
        groups: Sequence[Sequence[str]] = (),
    ) -> None:  # fmt: skip
        self.weights, self.section, self.classes = weights, section, list(classes)
        self.base_family = family_of(weights)
        fresh = self.base_family != "class_conditional"
        check_mode(self.base_family, section.train_mode)
        self._encoder = ClassEncoder(weights, size)
        places, self.dropped = _asked(diagnoses, self.classes)
        rows = encoded_rows(self._encoder, taken(images, places))
        self.dropped.update(rows.dropped)
        own = np.asarray(places, np.int64)[rows.index]
        names = [str(diagnoses[place]) for place in own]
        self.counts = _checked_counts(self.classes, names)
        base = None if fresh else ClassConditionalDenoiser.load(weights)
        vae = codec.load_codec(weights / "vae") if base is None else base.vae
        factor = vae.config.scaling_factor
        self.denoiser = self._fresh(vae, rows, size) if base is None else self._of(base)
        self.denoiser.latent_shape(size, size)  # which the network must be able to draw
        self._rescaled = vae.config.scaling_factor / factor
        columns = [np.asarray(column)[own] for column in groups]
        self.examples = self._examples(rows, names, Groups(*columns) if columns else None)
        if held_out is not None and len(held_out.images):
            self.held_out = self._held_out(held_out)

    def _held_out(self, held_out: FitRows) -> ClassExamples:
        places, _ = _asked(held_out.prompts, self.classes)
        rows = encoded_rows(self._encoder, taken(held_out.images, places))
        return self._examples(rows, [str(held_out.prompts[places[row]]) for row in rows.index])

    def _examples(self, rows: EncodedRows, names: Sequence[str], groups: Groups | None = None) -> ClassExamples:
        labels = np.array([self.denoiser.labels[name] for name in names], np.int64)
        latents = rows.buckets[0]["latents"] if rows.buckets else np.empty((0, 1, 1, 1), np.float16)
        return ClassExamples(latents, labels, self._whiten, groups)

    def _whiten(self, scaled: Tensor) -> Tensor:
        return self.denoiser.stats.whiten(scaled * self._rescaled)

    def _fresh(self, vae: Codec, rows: EncodedRows, size: int) -> ClassConditionalDenoiser:
        """A network of the preset on this VAE, a function of the seed."""
        own, channels = self.section.class_conditional, int(vae.config.latent_channels)
        kind, config = NETWORKS[own.preset]
        some = np.linspace(0, len(rows) - 1, min(len(rows), STATS_ROWS)).astype(np.int64)
        scaled = rows.batch(some)["latents"]
        stats = _statistics(vae, scaled, self.weights / STATS_FILE, whitened=issubclass(kind, UNet2DModel))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.section.seed)
            network = build_network(kind, config, len(self.classes), channels, size // codec.factor_of(vae))
        return ClassConditionalDenoiser(
            network=network, vae=vae, scheduler=build_scheduler(own.prediction_type), stats=stats,
            labels={name: number for number, name in enumerate(self.classes)},
        )  # fmt: skip

    def _of(self, base: ClassConditionalDenoiser) -> ClassConditionalDenoiser:
        """The base with our classes in its tables: one that it knows keeps its row, another begins as the null class.
        LoRA leaves the tables alone, so it is for classes that the base knows."""
        if self.section.train_mode == "full":
            rows = [base.labels.get(name, base.null) for name in self.classes]
            take_classes(base.network, [*rows, base.null])
            base.labels = {name: number for number, name in enumerate(self.classes)}
        elif unknown := [name for name in self.classes if name not in base.labels]:
            near = taxonomy.nearest(unknown[0], base.labels)
            raise ValueError(
                f"classes must be the base's for train_mode lora, got {unknown[0]!r}; "
                + (f"did you mean {near!r}, or " if near else "")
                + "set fit.lora.train_mode to full, which learns new ones?"
            )
        return base

    def build(self) -> nn.Module:
        """The network at step 0: whole, or frozen below a fresh adapter that is a function of the seed alone."""
        network = stop_own_dropout(copy.deepcopy(self.denoiser.network))
        if self.section.train_mode == "full":
            return network.requires_grad_(True).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.section.seed)
            add_lora(network, self.section.rank)
        return network.train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        latents, kind = batch["latents"], self.denoiser.prediction_type
        dropped = (noise.uniform() < self.section.caption_dropout).to(latents.device)  # (B,)
        classes = torch.where(dropped, self.denoiser.null, batch["label"])
        timesteps = noise.integers(len(self.denoiser.alphas_cumprod)).to(latents.device)
        eps = noise.normal(*latents.shape[1:]).to(latents)
        alpha_bar = self.denoiser.alphas_cumprod.to(latents.device)[timesteps]  # (B,)
        signal, spread = (level.reshape(-1, 1, 1, 1) for level in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
        target = eps if kind == "epsilon" else signal * eps - spread * latents
        found = class_prediction(model, signal * latents + spread * eps, timesteps, classes)
        errors = (found - target).square().mean(dim=(1, 2, 3))  # (B,)
        weights = snr_weights(kind, alpha_bar, self.section.min_snr_gamma)
        return {"loss": (weights * errors).mean(), "mse": errors.mean()}

    def save(self, model: nn.Module, directory: Path) -> None:
        """A whole generator's directory, or `pytorch_lora_weights.safetensors`, and a card of what was fitted."""
        whole = self.section.train_mode == "full"
        if whole:
            self._with(model).save(directory)
        else:
            save_adapter(directory, model)  # type: ignore[arg-type]
        preset = self.section.class_conditional.preset
        card = {
            "mode": self.section.train_mode, "family": "class_conditional", "base_family": self.base_family,
            "classes": self.counts, "num_images": len(self.examples), "dropped": dict(self.dropped),
            **({} if whole else {"rank": self.section.rank}),
            **({} if self.base_family == "class_conditional" else {"preset": preset}),
        }  # fmt: skip
        (directory / "card.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")

    def load(self, directory: Path) -> nn.Module:
        """The network that `save` wrote, or the base's with the adapter merged into it."""
        if self.section.train_mode == "full":
            return ClassConditionalDenoiser.load(directory).network
        return ClassConditionalDenoiser.load(self.weights, directory).network

    def _with(self, network: Any) -> ClassConditionalDenoiser:
        """The denoiser with another network."""
        own = self.denoiser
        return ClassConditionalDenoiser(network.cpu(), own.vae, own.scheduler, own.labels, own.stats)


def check_mode(base_family: str, train_mode: str) -> None:
    """Refuse a LoRA on a base that has no network of classes."""
    if base_family != "class_conditional" and train_mode != "full":
        raise ValueError(
            f"fit.lora.train_mode must be full on a base of {base_family}, which has no network of classes, got "
            f"{train_mode}; set it to full, or name a class-conditional base in synthesize.weights."
        )


def _statistics(vae: Codec, scaled: Tensor, known: Path, *, whitened: bool) -> LatentStats:
    """How latents come to unit scale. A scaling factor other than 1 and statistics in the base's directory are kept.
    Without whitening (a DiT, whose pipeline knows none) a VAE of factor 1 is given one, in place."""
    bare = vae.config.scaling_factor == 1.0
    if whitened and known.is_file():
        found = LatentStats.load(known)
        return LatentStats(image_mean=found.image_mean, image_std=found.image_std)
    if whitened and bare:
        return codec.image_stats(scaled)
    if bare:
        vae.register_to_config(scaling_factor=float(1 / scaled.std().clamp_min(1e-4)))
    return codec.image_stats(channels=scaled.shape[1])


def _asked(diagnoses: Sequence[str | None], classes: Sequence[str]) -> tuple[list[int], Counter[str]]:
    """The places of the rows of the classes asked for, and how many were left out by reason."""
    reasons = [NO_DIAGNOSIS if one is None else "" if one in classes else CLASS_NOT_ASKED for one in diagnoses]
    return [place for place, reason in enumerate(reasons) if not reason], Counter(filter(None, reasons))


def _checked_counts(classes: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Examples by class. One without any is refused, one with a single example is worth a line in the log."""
    counts = Counter(names)
    missing = [name for name in classes if not counts[name]]
    if missing:
        raise ValueError(
            f"every class must have a training image, got none of {', '.join(missing)}; ingest some, or leave it out "
            "of fit.lora.class_conditional.classes."
        )
    for name in classes:
        if counts[name] == 1:
            logging.getLogger(__name__).warning(
                "%s has a single training image; its samples will be copies of it", name
            )
    return {name: counts[name] for name in classes}
