"""ISIC 2019 challenge, as published: images, one-hot labels and metadata of the training and the test set.

    ROOT/ISIC_2019_Training_Input/ISIC_0000000.jpg, or ISIC_2019_Training_Input/ISIC_2019_Training_Input/...
    ROOT/ISIC_2019_Training_GroundTruth.csv      image, MEL, NV, BCC, AK, BKL, DF, VASC, SCC, UNK
    ROOT/ISIC_2019_Training_Metadata.csv         image, age_approx, anatom_site_general, lesion_id, sex

and the same for Test, where present; its labels were published years later (with score_weight and validation_weight),
its metadata has no lesion_id. Training images are hinted `train`, test images `test`; a test image without published
labels is a row without a label. UNK is any other diagnosis, benign or malignant, and is excluded by the label policy.
The training images hold HAM10000, BCN20000 and MSK, some of them `_downsampled`. There are no patient ids. Licence
CC BY-NC 4.0. Sources: doi:10.1038/sdata.2018.161, arXiv:1710.05006, arXiv:1908.02288.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

from factory.corpora import isic_archive, published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="ISIC 2019",
    layout="ISIC_2019_Training_Input/, ISIC_2019_Training_GroundTruth.csv, ISIC_2019_Training_Metadata.csv, and the "
    "same for Test",
    licence="CC-BY-NC-4.0",
    verified=True,
)
CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
_METADATA = ("image", "age_approx", "anatom_site_general", "sex")
_HINTS = {"Training": "train", "Test": "test"}


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or label row of both phases, by id; nothing is decoded."""
    inputs = {phase: f"ISIC_2019_{phase}_Input" for phase in _HINTS}
    truths = {phase: f"ISIC_2019_{phase}_GroundTruth.csv" for phase in _HINTS}
    root = published.folder(path, "isic2019", *inputs.values(), *truths.values())
    there = [phase for phase in _HINTS if (root / inputs[phase]).is_dir() or (root / truths[phase]).exists()]
    phases = [_phase(root, phase, section) for phase in there]
    yield from heapq.merge(*phases, key=lambda entry: entry.source_id)


def _phase(root: Path, phase: str, section: CorpusSection) -> Iterator[Entry]:
    truth, about = root / f"ISIC_2019_{phase}_GroundTruth.csv", root / f"ISIC_2019_{phase}_Metadata.csv"
    rows, metadata = _table(truth, ("image", *CLASSES), phase), _table(about, _METADATA, phase)
    directory = root / f"ISIC_2019_{phase}_Input"
    images = published.images_in(section, "isic2019", directory, directory / directory.name)
    for name, image, _, row, problem in published.paired(images, {}, rows):
        label, doubt = (None, None) if row is None else published.one_hot(row, CLASSES, truth, "image")
        known = metadata.get(name, {})
        yield Entry(
            source="isic2019", source_id=name, licence=ABOUT.licence, modality="dermoscopic", image=image, label=label,
            problem=problem or doubt, age=published.number(known.get("age_approx")),
            sex=published.known(known.get("sex")), lesion_id=published.known(known.get("lesion_id")),
            site=published.translated(
                known.get("anatom_site_general"), isic_archive.SITES, "anatom_site_general", about
            ),
            split_hint=_HINTS[phase],
        )  # fmt: skip


def _table(file: Path, columns: tuple[str, ...], phase: str) -> dict[str, published.Row]:
    """The rows of a table by image. That of the test set may be absent."""
    if phase == "Test" and not file.exists():
        return {}
    return published.by_key(published.table(file, columns), "image", file)
