"""Masked pre-training (MAE or SimMIM) of a timm ViT on the corpus, on the accepted samples, or on both.

Images are streamed from the tables' parts (`fits/streamed.py`). With `probe_every`, what the features tell of the
validation images' diagnoses is measured on the way: nothing is chosen by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from factory import records
from factory.fits.card import checkpoint_at, digest_of, write_card
from factory.fits.examples import ImageExamples, augment
from factory.fits.objective import Examples, RowNoise, decay_groups, evenly
from factory.fits.probing import probe_of
from factory.fits.streamed import StreamedImages, images_of, shards_of
from factory.fits.validation import MAX_ROWS
from factory.models.classifier import Normalised, normalised
from factory.models.mae import MaskedAutoencoder, begin_from, load_mae, save_mae
from factory.models.simmim import SimMIM
from factory.models.student import cost
from factory.recipe import MaeSection
from factory.tables import Table

# RandomResizedCrop's least area in the paper; of its augmentations only crop and flip are used.
MIN_AREA = 0.2


def autoencoder(section: MaeSection) -> MaskedAutoencoder | SimMIM:
    """The model of a section, with random weights."""
    s = section
    if s.objective == "simmim":
        return SimMIM(s.encoder, s.image_size, s.patch_size)
    return MaskedAutoencoder(
        s.encoder, s.image_size, s.patch_size,
        decoder_width=s.decoder_width, decoder_depth=s.decoder_depth, norm_pix_loss=s.norm_pix_loss,
    )  # fmt: skip


class MaeObjective:
    """Fills in masked patches. The model is a Normalised MaskedAutoencoder or SimMIM: pixels in [0, 1] go in."""

    def __init__(
        self,
        section: MaeSection,
        examples: Examples,
        provenance: Mapping[str, object] | None = None,
        probe: Callable[[Normalised], dict[str, float]] | None = None,
        held_out: ImageExamples | None = None,
    ) -> None:
        self.section, self.examples, self.provenance = section, examples, dict(provenance or {})
        self.probe, self.held_out = probe, held_out

    def build(self) -> Normalised:
        """The autoencoder at step 0, a function of the seed and of the weights it begins from."""
        s = self.section
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            model = autoencoder(s)
        if s.weights is not None:
            begin_from(model, checkpoint_at(s.weights, "fit.mae.weights"))
        return self._wrapped(model)

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

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Biases and norms without weight decay, as MAE's authors have it."""
        return decay_groups(model, self.section.weight_decay)

    def probed(self, model: nn.Module) -> dict[str, float]:
        """What the encoder's features tell; the loop asks every `probe_every` steps."""
        assert isinstance(model, Normalised) and self.probe is not None
        return self.probe(normalised(model.model.encoder).to(model.mean.device))

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
            "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(),
            "begun_from": None if s.weights is None else digest_of(Path(s.weights)),
        }  # fmt: skip
        write_card(directory, cost(model.model.encoder, s.image_size), self.provenance | fields)

    def load(self, directory: Path) -> Normalised:
        """The autoencoder that `save` wrote, decoder included."""
        return self._wrapped(load_mae(autoencoder(self.section), directory))


def mae_objective(section: MaeSection, corpus: Table, samples: Table | None = None) -> MaeObjective:
    """The objective over a run's tables: the corpus's training images, the accepted samples, or both.

    Raises ValueError where there are none, and where features are to be probed and no labelled images are there.
    """
    parts, licences, counts = [], set[str](), {"num_real": 0, "num_synthetic": 0}
    if section.include_corpus:
        shards, rows = shards_of(corpus, records.accepted("train"), ["split", "outcome", "licence"])
        parts, counts["num_real"] = shards, len(rows)
        licences = set(rows["licence"].to_pylist()) - {None}
    if section.include_samples and samples is not None:
        shards, rows = shards_of(samples, records.accepted(), ["outcome"])
        parts, counts["num_synthetic"] = [*parts, *shards], len(rows)
    if not parts:
        raise ValueError(
            "fit mae must have images of the tables that it includes, got none; ingest a corpus or synthesize samples."
        )
    examples = StreamedImages(
        parts, section.image_size, shuffle_rows=section.shuffle_rows, keep_bytes=int(section.keep_gib * 2**30)
    )
    probe = probe_of(corpus, section.image_size) if section.probe_every else None
    held_out = _held_out(corpus, section.image_size) if section.validate_every else None
    return MaeObjective(section, examples, counts | {"licences": sorted(licences)}, probe, held_out)


def _held_out(corpus: Table, image_size: int) -> ImageExamples:
    """Some of the validation images, on which the fit's loss is taken."""
    shards, _ = shards_of(corpus, records.accepted("val"), ["split", "outcome"])
    return ImageExamples(images_of(shards, evenly(sum(shard.count for shard in shards), MAX_ROWS)), image_size)
