"""Fine-tuning of a masked pre-trained ViT to name the diagnosis, as MAE's authors do it (He et al. 2022, table 9).

Learning rates fall from layer to layer towards the pixels, blocks are skipped at random, rows are mixed, classes are
shown equally often. All draws are a row's own, so a fit that stops and goes on ends at the same bits.

B images  S side in pixels  K classes  M drop paths
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factory.fits.card import checkpoint_at, digest_of, read_card, write_card
from factory.fits.classifiers import accuracy, diagnosed, load_classifier, save_timm
from factory.fits.examples import ImageExamples, augment
from factory.fits.mixing import mixed
from factory.fits.objective import Examples, RowNoise
from factory.models.classifier import PATCHES, Normalised, build_classifier
from factory.models.drop_path import by_row, give
from factory.models.mae import check_encoder
from factory.models.student import cost
from factory.recipe import FinetuneSection

MIN_AREA = 0.6  # of a crop, as in distillation: the whole lesion decides the label


class FinetuneObjective:
    """A classifier from a pre-trained encoder. weights: a safetensors file of the timm model `model`."""

    def __init__(
        self,
        section: FinetuneSection,
        model: str,
        weights: Path,
        examples: ImageExamples,
        classes: Sequence[str],
        *,
        held_out: ImageExamples | None = None,
        provenance: Mapping[str, object] | None = None,
    ) -> None:
        if len(classes) < 2:
            raise ValueError(
                f"finetune must have at least two diagnoses to tell apart, got {list(classes)}; "
                "ingest a corpus with more."
            )
        check_encoder(model, examples.image_size, _patch_size(weights))
        self.section, self.model, self.weights, self.images = section, model, weights, examples
        self.examples: Examples = examples
        self.classes, self.held_out, self.provenance = list(classes), held_out, dict(provenance or {})
        self.paths = 0  # M, known once a model is built

    def build(self) -> Normalised:
        """The pre-trained encoder under a new head whose weights are a function of the seed."""
        s, size = self.section, self.images.image_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            found = build_classifier(
                self.model, len(self.classes), size, self.weights,
                global_pool=s.global_pool, drop_path_rate=s.drop_path,
            )  # fmt: skip
        self.paths = by_row(found)
        return found

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """timm's: a group for each layer, with its `lr_scale`, and within it one without weight decay for norms, biases
        and tokens."""
        from timm.optim import param_groups_layer_decay

        assert isinstance(model, Normalised)
        s, vit = self.section, model.model
        groups: list[dict[str, Any]] = param_groups_layer_decay(
            vit, weight_decay=s.weight_decay, layer_decay=s.layer_decay, no_weight_decay_list=vit.no_weight_decay()
        )
        return groups

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        """Cross-entropy with soft targets. In evaluation rows are whole, unmixed and unsmoothed."""
        labels = batch["label"]
        if not model.training:
            logits = model(batch["image"].float() / 255)  # (B, K)
            return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy(logits, labels)}
        s = self.section
        pixels = augment(batch["image"], noise, MIN_AREA)  # (B, 3, S, S)
        others = self.examples.batch(noise.integers(len(self.examples)).numpy())
        pixels, targets = mixed(
            pixels, labels, augment(others["image"].to(pixels.device), noise, MIN_AREA),
            others["label"].to(labels.device), noise, len(self.classes),
            mixup=s.mixup, cutmix=s.cutmix, smoothing=s.smoothing,
        )  # fmt: skip
        give(model, noise.uniform(max(1, self.paths)).to(pixels.device))
        logits = model(pixels)  # (B, K)
        return {"loss": F.cross_entropy(logits, targets), "accuracy": accuracy(logits, labels)}

    def save(self, model: nn.Module, directory: Path) -> None:
        """The classifier as a timm directory with its card."""
        assert isinstance(model, Normalised)
        s = self.section
        save_timm(model, directory)
        fields: dict[str, object] = {
            "objective": "finetune", "architecture": self.model, "classes": self.classes, "steps": s.steps,
            "options": {"global_pool": s.global_pool}, "batch_size": s.batch_size,
            "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(),
            "num_images": len(self.images.encoded), "pretrained": digest_of(self.weights),
        }  # fmt: skip
        write_card(directory, cost(model, self.images.image_size), self.provenance | fields)

    def load(self, directory: Path) -> Normalised:
        """The classifier that `save` wrote."""
        return load_classifier(directory)


def finetune_objective(
    section: FinetuneSection, encoder: Path | None, corpus: pa.Table, samples: pa.Table | None = None
) -> FinetuneObjective:
    """The objective over a run's tables, from the encoder of a fitted MAE or from `section.weights`.

    Raises ValueError for a checkpoint that is not there or not safetensors.
    """
    if section.weights is not None:
        weights, model, size = checkpoint_of(section), section.model, section.image_size
    else:
        assert encoder is not None
        card, weights = read_card(encoder), encoder / "model.safetensors"
        model, size = str(card["architecture"]), int(card["image_size"])
    chosen = samples if section.include_samples else None
    data = diagnosed(corpus, chosen, size, balanced=section.balanced, rare=section.rare)
    return FinetuneObjective(
        section, model, weights, data.examples, data.classes, held_out=data.held_out, provenance=data.provenance
    )


def checkpoint_of(section: FinetuneSection) -> Path:
    """The checkpoint that a section names. Raises ValueError if it is not there or not safetensors."""
    return checkpoint_at(section.weights or "", "fit.finetune.weights")


def _patch_size(weights: Path) -> int:
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as stored:
        if PATCHES not in stored.keys():  # noqa: SIM118
            raise ValueError(f"a checkpoint must be of a timm ViT, got {weights} without {PATCHES}; name another file.")
        return int(stored.get_slice(PATCHES).get_shape()[-1])
