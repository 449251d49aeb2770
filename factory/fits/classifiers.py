"""What fits that name a diagnosis share: the rows that they learn from, and classifiers as timm directories.

K classes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from factory import records
from factory.fits.card import read_card
from factory.fits.examples import ImageExamples, accepted_rows, image_bytes, training_rows, with_images
from factory.models.classifier import Normalised, build_classifier
from factory.sections.fits import Rare


@dataclass(frozen=True)
class Diagnosed:
    """What a fit that names diagnoses learns from: balanced training images, the classes, and held-out images."""

    examples: ImageExamples
    classes: list[str]
    held_out: ImageExamples
    provenance: dict[str, object]


def diagnosed(
    corpus: pa.Table, samples: pa.Table | None, size: int, *, balanced: bool = True, rare: Rare | None = None
) -> Diagnosed:
    """The labelled training images and accepted samples. The classes are those of the corpus's training split, in
    alphabetical order: samples and validation images of others, and images without one, are left out and counted.

    rare: what becomes of a diagnosis with a single training image, real or made; None: it is learned from. Raises
    ValueError for one that is refused, and with `refuse` for validation images of a diagnosis that training lacks.
    """
    training, validation = training_rows(corpus), corpus.filter(records.accepted("val"))
    real, made = _labelled(training), _labelled(accepted_rows(samples)) if samples is not None else None
    counts = Counter(real["diagnosis"].to_pylist())
    known = set(counts)
    if made is not None:
        counts.update(name for name in made["diagnosis"].to_pylist() if name in known)
    single = [name for name, count in sorted(counts.items()) if count == 1] if rare is not None else []
    classes = sorted(known - set(single))
    unknown = Counter(name for name in _labelled(validation)["diagnosis"].to_pylist() if name not in known)
    if rare == "refuse" and (single or unknown):
        raise ValueError(_rare(single, unknown))
    made = real.slice(0, 0) if made is None else made
    kept = [one.filter(pc.is_in(one["diagnosis"], pa.array(classes, pa.string()))) for one in (real, made)]
    encoded, names = zip(*((image_bytes(one), one["diagnosis"].to_pylist()) for one in kept), strict=True)
    examples = ImageExamples(
        encoded[0] + encoded[1], size, [classes.index(name) for name in names[0] + names[1]], balanced=balanced
    )
    held_out = held_out_rows(corpus, classes, size)
    provenance: dict[str, object] = {
        "num_real": len(kept[0]), "num_synthetic": len(kept[1]),
        "licences": sorted(set(kept[0]["licence"].to_pylist()) - {None}),
        "left_out": {
            "training_without_diagnosis": len(training) - len(real), "training_of_rare_class": len(real) - len(kept[0]),
            "samples_of_unknown_class": len(made) - len(kept[1]),
            "validation_of_unknown_class": len(_labelled(with_images(validation))) - len(held_out),
        },
    }  # fmt: skip
    return Diagnosed(examples, classes, held_out, provenance)


def _rare(single: Sequence[str], unknown: Mapping[str, int]) -> str:
    told = [*(f"1 of {name}" for name in single), *(f"none of {name} ({n} validation)" for name, n in unknown.items())]
    return (
        f"each diagnosis must have at least two training images, got {', '.join(told)}; ingest or synthesize more "
        "of it, or set rare=leave_out in the fit's section."
    )


def held_out_rows(corpus: pa.Table, classes: list[str], size: int, split: str = "val") -> ImageExamples:
    """The accepted images of a split whose diagnosis is among the classes."""
    rows = with_images(corpus.filter(records.accepted(split) & pc.field("diagnosis").isin(classes)))
    return ImageExamples(image_bytes(rows), size, [classes.index(name) for name in rows["diagnosis"].to_pylist()])


def _labelled(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_valid(table["diagnosis"]))


def load_classifier(directory: Path) -> Normalised:
    """The classifier that a distillation or a fine-tuning saved: pixels (B, 3, S, S) in [0, 1] -> logits over its
    card's `classes`."""
    card = read_card(directory)
    weights = directory / "model.safetensors"
    options = card.get("options", {})
    return build_classifier(card["architecture"], len(card["classes"]), card["image_size"], weights, **options).eval()


def save_timm(model: Any, directory: Path) -> None:
    """A Normalised timm model as a timm directory."""
    from timm.models import save_for_hf

    directory.mkdir(parents=True, exist_ok=True)
    save_for_hf(model.model, str(directory), safe_serialization=True)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of rows, (), whose largest logit, of (B, K), is that of their label, (B,)."""
    return (logits.argmax(1) == labels).float().mean()
