"""ISIC 2018 challenge, as published: labelled images (Task 3), and images with lesion masks (Tasks 1 and 2).

    ROOT/ISIC2018_Task3_Training_Input/ISIC_0024306.jpg
    ROOT/ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv     image, MEL, NV, ..., VASC
    ROOT/ISIC2018_Task3_Training_LesionGroupings.csv     image, lesion_id, diagnosis_confirm_type
    ROOT/ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg
    ROOT/ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png

and the same for Validation and Test, where present; tables may also lie beside the folders. Training images are hinted
`train`, the others `test`. The Task 3 training images are HAM10000's, and AKIEC is its mixed class. An image of Tasks 1
and 2 has a mask and no diagnosis: that is no defect. There are no patient ids. The layout is unverified: it follows the
challenge's description. Licence CC BY-NC 4.0. Sources: Codella et al. 2019, arXiv:1902.03368; Tschandl et al. 2018,
doi:10.1038/sdata.2018.161.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from factory.corpora import isic_archive, published
from factory.corpora.base import MISSING_LABEL, Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="ISIC 2018",
    layout="ISIC2018_Task3_Training_Input/, ISIC2018_Task3_Training_GroundTruth/, "
    "ISIC2018_Task3_Training_LesionGroupings.csv, ISIC2018_Task1-2_Training_Input/, "
    "ISIC2018_Task1_Training_GroundTruth/, and the same for Validation and Test",
    licence="CC-BY-NC-4.0",
)
CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
# In this order: an image of two phases counts for the one that is held out.
_HINTS = {"Test": "test", "Validation": "test", "Training": "train"}
_GROUPINGS = ("image", "lesion_id", "diagnosis_confirm_type")


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image, mask or label row of every task and phase, by id; nothing is decoded."""
    inputs = {phase: [f"ISIC2018_{task}_{phase}_Input" for task in ("Task3", "Task1-2")] for phase in _HINTS}
    root = published.folder(path, "isic2018", *(name for names in inputs.values() for name in names))
    directories = {root / name: _HINTS[phase] for phase, names in inputs.items() for name in names}
    images = published.images_in(section, "isic2018", *directories)
    masks, labels, groupings = _masks(root), _labels(root), _groupings(root)
    for name, image, mask, _, problem in published.paired(images, masks, {name: {} for name in labels}):
        label, doubt = labels.get(name, (None, None))
        if problem == MISSING_LABEL and mask is not None:
            problem = None
        known = groupings.get(name, {})
        yield Entry(
            source="isic2018", source_id=name, licence=ABOUT.licence, modality="dermoscopic", image=image, mask=mask,
            label=label, domain=ABOUT.domain if label is None else None, problem=problem or doubt,
            confirmation=published.translated(
                known.get("diagnosis_confirm_type"), isic_archive.CONFIRMATIONS, "diagnosis_confirm_type", root
            ),
            lesion_id=published.known(known.get("lesion_id")),
            split_hint=directories[image.parent] if image else None,
        )  # fmt: skip


def _labels(root: Path) -> dict[str, tuple[str | None, str | None]]:
    """The label of each Task 3 image of every phase, or its problem; validation and test may have no table."""
    labels: dict[str, tuple[str | None, str | None]] = {}
    for phase in _HINTS:
        name = f"ISIC2018_Task3_{phase}_GroundTruth"
        file = published.first(root, f"{name}/{name}.csv", f"{name}.csv")
        if file.exists() or (phase == "Training" and (root / "ISIC2018_Task3_Training_Input").exists()):
            rows = published.by_key(published.table(file, ("image", *CLASSES)), "image", file)
            labels |= {image: published.one_hot(row, CLASSES, file, "image") for image, row in rows.items()}
    return labels


def _masks(root: Path) -> dict[str, Path]:
    """The Task 1 masks of every phase."""
    found: dict[str, Path] = {}
    for phase in _HINTS:
        found |= published.masks_in(root / f"ISIC2018_Task1_{phase}_GroundTruth", ending="_segmentation")
    return found


def _groupings(root: Path) -> dict[str, published.Row]:
    name = "ISIC2018_Task3_Training_LesionGroupings.csv"
    file = published.first(root, name, f"ISIC2018_Task3_Training_GroundTruth/{name}")
    return published.by_key(published.table(file, _GROUPINGS), "image", file) if file.exists() else {}
