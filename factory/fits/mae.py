"""Masked pre-training (MAE or SimMIM) of a timm ViT on the corpus and, if the recipe says so, the accepted samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from factory.fits.card import write_card
from factory.fits.examples import ImageExamples, accepted_rows, augment, image_bytes, training_rows
from factory.fits.objective import Examples, RowNoise
from factory.models.classifier import Normalised, normalised
from factory.models.mae import MaskedAutoencoder, load_mae, save_mae
from factory.models.simmim import SimMIM
from factory.models.student import cost
from factory.recipe import MaeSection

# RandomResizedCrop's least area in the paper; of its augmentations only crop and flip are used.
MIN_AREA = 0.2


class MaeObjective:
    """Fills in masked patches. The model is a Normalised MaskedAutoencoder or SimMIM: pixels in [0, 1] go in."""

    def __init__(self, section: MaeSection, examples: Examples, provenance: Mapping[str, object] | None = None) -> None:
        self.section, self.examples, self.provenance = section, examples, dict(provenance or {})

    def build(self) -> Normalised:
        """The autoencoder at step 0, a function of the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.section.seed)
            return self._wrapped(self._architecture())

    def _architecture(self) -> MaskedAutoencoder | SimMIM:
        s = self.section
        if s.objective == "simmim":
            return SimMIM(s.encoder, s.image_size, s.patch_size)
        return MaskedAutoencoder(
            s.encoder,
            s.image_size,
            s.patch_size,
            decoder_width=s.decoder_width,
            decoder_depth=s.decoder_depth,
            norm_pix_loss=s.norm_pix_loss,
        )

    @staticmethod
    def _wrapped(mae: MaskedAutoencoder | SimMIM) -> Normalised:
        wrapper = normalised(mae.encoder)
        wrapper.model = mae
        return wrapper

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        """The reconstruction error of the masked patches; crop, flips and mask come from each row's own noise."""
        pixels = augment(batch["image"], noise, MIN_AREA)  # (B, 3, S, S)
        length = (self.section.image_size // self.section.patch_size) ** 2
        loss, _, _ = model(pixels, self.section.mask_ratio, noise.uniform(length).to(pixels.device))
        return {"loss": loss}

    def save(self, model: nn.Module, directory: Path) -> None:
        """The encoder as a timm directory, the decoder beside it, and the card of the encoder."""
        assert isinstance(model, Normalised)
        directory.mkdir(parents=True, exist_ok=True)
        save_mae(model.model, directory)
        s = self.section
        fields = {
            "objective": "mae", "pretraining": s.objective, "architecture": s.encoder,
            "patch_size": s.patch_size, "mask_ratio": s.mask_ratio,
            "norm_pix_loss": s.norm_pix_loss, "steps": s.steps, "batch_size": s.batch_size,
            "num_images": len(self.examples),
        }  # fmt: skip
        write_card(directory, cost(model.model.encoder, s.image_size), self.provenance | fields)

    def load(self, directory: Path) -> Normalised:
        """The autoencoder that `save` wrote, decoder included."""
        return self._wrapped(load_mae(self._architecture(), directory))


def mae_objective(section: MaeSection, corpus: pa.Table, samples: pa.Table | None = None) -> MaeObjective:
    """The objective over a run's tables: training images, then accepted samples where `include_samples` says so."""
    real = training_rows(corpus)
    encoded = image_bytes(real)
    made = image_bytes(accepted_rows(samples)) if samples is not None and section.include_samples else []
    provenance = {
        "num_real": len(encoded), "num_synthetic": len(made),
        "licences": sorted(set(real["licence"].to_pylist()) - {None}),
    }  # fmt: skip
    return MaeObjective(section, ImageExamples(encoded + made, section.image_size), provenance)
