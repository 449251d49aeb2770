"""What a classifier answers, and what a frozen encoder's features tell: a linear probe and nearest neighbours.

`Probe` asks both of a fit on its way.

N images  D encoder width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from factory import records
from factory.fits.examples import ImageExamples
from factory.fits.objective import evenly
from factory.fits.streamed import Shard, images_of, shards_of
from factory.models.classifier import Normalised
from factory.tables import Table

NEIGHBOURS = 20
MOST = 1024  # images of either side that a fit is probed with on its way
FOLDS = 3  # of that cross-validation
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of a probe's regularisation (C); chosen by cross-validation on its own rows

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


def answers(model: nn.Module, examples: ImageExamples) -> Rows:
    """The class (N,) that a classifier says of whole images."""
    return np.concatenate([found.argmax(1) for found in _batches(model, examples, model)])


def features(encoder: Normalised, examples: ImageExamples) -> Floats:
    """The mean of a timm ViT's patch tokens, (N, D), of whole images."""
    vit = encoder.model

    def pooled(pixels: Tensor) -> Tensor:
        tokens = vit.forward_features((pixels - encoder.mean) / encoder.std)  # (B, P + L, D)
        found: Tensor = tokens[:, vit.num_prefix_tokens :].mean(1)
        return found

    return np.concatenate(list(_batches(encoder, examples, pooled)))


def scores(said: Rows, examples: ImageExamples) -> dict[str, float]:
    """Accuracy, F1 averaged over the classes that the images show, and balanced accuracy, of answers (N,)."""
    from sklearn.metrics import f1_score

    labels = examples.labels
    assert labels is not None
    shown = np.unique(labels)
    return {
        "accuracy": float(np.mean(said == labels)),
        "macro_f1": float(f1_score(labels, said, labels=shown, average="macro", zero_division=0.0)),
        "balanced_accuracy": float(np.mean([np.mean(said[labels == one] == one) for one in shown])),
    }


def linear_probe(encoder: Normalised, train: ImageExamples, test: ImageExamples) -> dict[str, float]:
    """Scores on `test` of a logistic regression, classes weighed alike, on frozen features of `train`."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = LogisticRegressionCV(
        Cs=STRENGTHS, cv=FOLDS, class_weight="balanced", scoring="balanced_accuracy", max_iter=2000, l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )  # fmt: skip
    return _probed(make_pipeline(StandardScaler(), fitted), encoder, train, test)


def nearest_neighbours(encoder: Normalised, train: ImageExamples, test: ImageExamples) -> dict[str, float]:
    """Scores on `test` of the vote of the nearest images of `train` by the cosine of their features."""
    from sklearn.neighbors import KNeighborsClassifier

    count = min(NEIGHBOURS, len(train.encoded))
    return _probed(KNeighborsClassifier(count, metric="cosine", weights="distance"), encoder, train, test)


@dataclass
class Probe:
    """Labelled images, read when they are first asked about. splits: shards and labels (N,), to learn from and to test
    on."""

    splits: tuple[tuple[list[Shard], Rows], tuple[list[Shard], Rows]]
    image_size: int

    def __call__(self, encoder: Normalised) -> dict[str, float]:
        """Balanced accuracy of a linear probe and of the nearest neighbours."""
        train, test = self._examples
        return {
            "linear_probe": linear_probe(encoder, train, test)["balanced_accuracy"],
            "nearest_neighbours": nearest_neighbours(encoder, train, test)["balanced_accuracy"],
        }

    @cached_property
    def _examples(self) -> tuple[ImageExamples, ImageExamples]:
        found = []
        for shards, labels in self.splits:
            rows = _of_each(labels, MOST)
            found.append(ImageExamples(images_of(shards, rows), self.image_size, labels[rows].tolist()))
        return found[0], found[1]


def _of_each(labels: Rows, most: int) -> Rows:
    """At most so many rows, of every class alike as far as it has them, evenly over those of the class."""
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([own[evenly(len(own), max(1, most // len(classes)))] for own in classes]))


def probe_of(corpus: Table, image_size: int) -> Probe:
    """A probe on the diagnoses of a corpus's training and validation images, of those that training shows at least
    `FOLDS` times. Raises ValueError for fewer than two of them in either split."""
    light = corpus.read(["split", "outcome", "diagnosis"], records.accepted())
    seen = light.filter(pc.field("split") == "train")["diagnosis"].value_counts()
    classes = sorted(one["values"].as_py() for one in seen if one["values"].is_valid and one["counts"].as_py() >= FOLDS)
    known = pc.field("diagnosis").isin(classes)
    splits = []
    for split in ("train", "val"):
        shards, rows = shards_of(corpus, records.accepted(split) & known, ["split", "outcome", "diagnosis"])
        labels = pc.index_in(rows["diagnosis"], pa.array(classes, pa.string())).to_numpy().astype(np.int64)
        if len(np.unique(labels)) < 2:
            raise ValueError(
                f"fit.mae.probe_every must have images of two diagnoses in training and validation, got "
                f"{len(np.unique(labels))} in {split}; ingest more, or set it to 0."
            )
        splits.append((shards, labels))
    return Probe((splits[0], splits[1]), image_size)


def _probed(learner: Any, encoder: Normalised, train: ImageExamples, test: ImageExamples) -> dict[str, float]:
    assert train.labels is not None
    learner.fit(features(encoder, train), train.labels[train.order])
    return scores(learner.predict(features(encoder, test)), test)


def _batches(model: nn.Module, examples: ImageExamples, call: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(examples), 64):
        batch = examples.batch(np.arange(start, min(start + 64, len(examples))))
        with torch.no_grad():
            yield call(batch["image"].to(device).float() / 255).cpu().numpy()
