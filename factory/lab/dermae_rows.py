"""The rows of DerMAE's table: what each arm learns from, and the real images that all are tested on.

S side in pixels  K classes
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from factory import records
from factory.fits.classifiers import Diagnosed, diagnosed, held_out_rows
from factory.fits.examples import ImageExamples, accepted_rows, image_bytes, training_rows, with_images

REAL, SYNTHETIC = DATA = ("real", "real_synthetic")


@dataclass(frozen=True)
class Arm:
    """What one arm learns from: labelled images with every class equally often, and images alone for pre-training."""

    labelled: Diagnosed
    pretraining: ImageExamples
    digest: str  # of both


@dataclass(frozen=True)
class Rows:
    """Both arms, the test images and what was left out, by reason."""

    arms: dict[str, Arm]
    test: ImageExamples
    test_digest: str
    classes: list[str]
    counts: dict[str, int]


def rows_of(corpus: pa.Table, samples: pa.Table, image_size: int, *, pretrain_on: str = "arm") -> Rows:
    """The rows of a run. The classes are those of the training split; test images are real and of the split `test`.

    A sample with a parent in a group of the validation or test split is left out, and counted. Raises ValueError where
    a group is of two splits, and where there are no samples, fewer than two classes or no test images of them.
    """
    _check_groups(corpus)
    made = accepted_rows(samples)
    kin = _kin_of_held_out(corpus, made)
    made = made.filter(pa.array([not one for one in kin], pa.bool_()))
    if not len(made):
        raise ValueError("dermae-table must have accepted samples, got none; synthesize some first.")
    arms = {name: diagnosed(corpus, chosen, image_size) for name, chosen in zip(DATA, (None, made), strict=True)}
    classes = arms[REAL].classes
    test = held_out_rows(corpus, classes, image_size, "test")
    if len(classes) < 2 or not len(test):
        raise ValueError(
            f"dermae-table must have test images of at least two diagnoses of the training split, got {len(test)} of "
            f"{', '.join(classes) or 'none'}; ingest a larger corpus or raise corpus.test_share."
        )
    real = image_bytes(training_rows(corpus))
    more = image_bytes(made)
    images = {REAL: real, SYNTHETIC: more if pretrain_on == "synthetic" else real + more}
    found = {
        name: Arm(
            labelled, ImageExamples(images[name], image_size),
            digest_of(labelled.examples, classes) + digest_of(ImageExamples(images[name], image_size), ()),
        )
        for name, labelled in arms.items()
    }  # fmt: skip
    counts = {
        "num_real": int(str(arms[REAL].provenance["num_real"])),
        "num_synthetic": int(str(arms[SYNTHETIC].provenance["num_synthetic"])),
        "num_test": len(test),
        "kin_of_held_out": sum(kin),
        "sample_of_unknown_class": len(made) - int(str(arms[SYNTHETIC].provenance["num_synthetic"])),
        "test_of_unknown_class": _num_tested(corpus) - len(test),
    }
    return Rows(found, test, digest_of(test, classes), classes, counts)


def digest_of(examples: ImageExamples, classes: Sequence[str]) -> str:
    """The digest of images with their labels, in their order."""
    labels = [] if examples.labels is None else examples.labels.tolist()
    content = [hashlib.sha256(one).hexdigest() for one in examples.encoded]
    return records.digest(*classes, *content, *labels)[:16]


def _check_groups(corpus: pa.Table) -> None:
    """Raises ValueError where the rows of one group (patient, lesion, near copies) are of more than one split."""
    split_of: dict[str, str] = {}
    for group, split in zip(corpus["group_id"].to_pylist(), corpus["split"].to_pylist(), strict=True):
        if group is not None and split is not None and split_of.setdefault(group, split) != split:
            raise ValueError(
                f"a group must be of one split, got {group} in {split_of[group]} and in {split}; ingest the corpus "
                "anew."
            )


def _kin_of_held_out(corpus: pa.Table, samples: pa.Table) -> list[bool]:
    """Which samples have a parent in a group of the validation or test split."""
    held_out = corpus.filter(pc.is_in(corpus["split"], pa.array(["val", "test"])))
    away = {name for column in ("row_id", "record_id") for name in held_out[column].to_pylist()} - {None}
    return [bool(away & set(parents or ())) for parents in samples["parents"].to_pylist()]


def _num_tested(corpus: pa.Table) -> int:
    return len(with_images(corpus.filter(records.accepted("test"))))
