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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from factory import taxonomy
from factory.fits.flux import NON_FINITE_LATENTS, TOO_SMALL, square
from factory.fits.joint import ENCODE_BATCH
from factory.fits.objective import RowNoise
from factory.fits.weighting import snr_weights
from factory.images import RGB, read_png
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
from factory.models.weights import family_of
from factory.recipe import LoraSection

NO_DIAGNOSIS, CLASS_NOT_ASKED = "no_diagnosis", "class_not_asked"


class ClassExamples:
    """Latents (N, C, h, w) float16 and the class of each, `labels` (N,) int64."""

    def __init__(self, latents: Tensor, labels: np.ndarray) -> None:
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """`latents` (B, C, h, w) float32 and `label` (B,)."""
        return {
            "latents": self.latents[torch.from_numpy(indices)].float(),
            "label": torch.from_numpy(self.labels[indices]),
        }


class FitClassConditional:
    """Objective: a class-conditional network on latents.

    weights: a class-conditional directory to fit on; or any base with a VAE, on which a network of the section's preset
    is fitted from nothing. images: encoded PNG bytes, each with its diagnosis or None; the middle square is scaled to
    `size` px. classes: the diagnoses to learn; a row of any other is left out, and so are images that are smaller than
    `size` and latents that are not finite. `dropped` counts them by reason. Raises ValueError where a class has no
    example left, and logs where one has a single one.
    """

    def __init__(
        self, weights: Path, images: Sequence[bytes], diagnoses: Sequence[str | None], section: LoraSection, size: int,
        classes: Sequence[str],
    ) -> None:  # fmt: skip
        self.weights, self.section, self.classes = weights, section, list(classes)
        self.base_family = family_of(weights)
        fresh = self.base_family != "class_conditional"
        check_mode(self.base_family, section.train_mode)
        rows, self.dropped = _asked(images, diagnoses, self.classes, size)
        base = None if fresh else ClassConditionalDenoiser.load(weights)
        vae = codec.load_codec(weights / "vae") if base is None else base.vae
        device = "cuda" if torch.cuda.is_available() else "cpu"  # of the worker, which builds its objective itself
        factor = vae.config.scaling_factor
        scaled, names = _encoded(vae.to(device), rows, size, self.dropped)
        vae.to("cpu")
        self.counts = _checked_counts(self.classes, names)
        self.denoiser = self._fresh(vae, scaled, size) if base is None else self._of(base)
        self.denoiser.latent_shape(size, size)  # which the network must be able to draw
        latents = self.denoiser.stats.whiten(scaled.float() * (vae.config.scaling_factor / factor)).half()
        self.examples = ClassExamples(latents, np.array([self.denoiser.labels[name] for name in names], np.int64))

    def _fresh(self, vae: Codec, scaled: Tensor, size: int) -> ClassConditionalDenoiser:
        """A network of the preset on this VAE, a function of the seed."""
        own, channels = self.section.class_conditional, int(vae.config.latent_channels)
        kind, config = NETWORKS[own.preset]
        stats = _statistics(vae, scaled.float(), self.weights / STATS_FILE, whitened=issubclass(kind, UNet2DModel))
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


def _asked(
    images: Sequence[bytes], diagnoses: Sequence[str | None], classes: Sequence[str], size: int
) -> tuple[list[tuple[str, RGB]], Counter[str]]:
    """The rows of the classes asked for, each as its class and middle square at `size` px, and how many were left out
    by reason."""
    kept: list[tuple[str, RGB]] = []
    dropped: Counter[str] = Counter()
    for data, diagnosis in zip(images, diagnoses, strict=True):
        if diagnosis is None:
            dropped[NO_DIAGNOSIS] += 1
        elif diagnosis not in classes:
            dropped[CLASS_NOT_ASKED] += 1
        elif min((rgb := read_png(data)).shape[:2]) < size:
            dropped[TOO_SMALL] += 1
        else:
            kept.append((diagnosis, square(rgb, size)))
    return kept, dropped


def _encoded(vae: Codec, rows: Sequence[tuple[str, RGB]], size: int, dropped: Counter[str]) -> tuple[Tensor, list[str]]:
    """Scaled latents (N, C, h, w) float16 with their classes; what is not finite is left out and counted."""
    side = size // codec.factor_of(vae)
    found, names = [torch.empty(0, vae.config.latent_channels, side, side, dtype=torch.float16)], []
    for start in range(0, len(rows), ENCODE_BATCH):
        part = rows[start : start + ENCODE_BATCH]
        pixels = torch.from_numpy(np.stack([rgb for _, rgb in part])).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = codec.scaled_modes(vae, pixels).half().cpu()
        finite = torch.isfinite(latents).flatten(1).all(dim=1)
        if not finite.all():
            dropped[NON_FINITE_LATENTS] += int((~finite).sum())
        found.append(latents[finite])
        names += [name for (name, _), kept in zip(part, finite.tolist(), strict=True) if kept]
    return torch.cat(found), names


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
