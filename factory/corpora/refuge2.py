"""REFUGE2, as redistributed: fundus photographs with masks of the optic disc and cup, by split.

    ROOT/train/images/g0001.jpg, ROOT/train/mask/g0001.bmp       grey: 0 cup, 128 disc, 255 background
    ROOT/val/images/V0001.jpg, ROOT/test/images/T0001.jpg, with their masks
    ROOT/train/index.json      {"0": {"ImgName": "g0001.jpg", "Label": 1, ...}, ...}, where the copy has it

1,200 images of REFUGE, 400 a split; folders may also be `training` and `validation`, or hold `Images` and `gts`. The
mask that is read is the whole disc, with its cup. Label 1 is glaucoma; without index.json a training image named g...
is glaucoma and n... is none, as published, and the others have no label, which is no defect. There are no patient ids.
The layout is unverified: it follows public code that reads it. For research only. Source: Orlando et al. 2020,
doi:10.1016/j.media.2019.101570.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from factory.corpora import published
from factory.corpora.base import MISSING_LABEL, Entry, Loaded, load_files
from factory.images import ImageProblem, Mask, decode_rgb
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="REFUGE2",
    layout="train/, val/ and test/, each with images/, mask/ and, where the copy has it, index.json",
    licence="LicenseRef-REFUGE-research-use",
    domain="fundus",
)
_SPLITS = {"test": ("test",), "train": ("train", "training"), "val": ("val", "validation")}
_DISC_BELOW = 192  # between the disc's 128 and the background's 255
_LABELS = {0: "no_glaucoma", 1: "glaucoma"}
_INITIALS = {"g": "glaucoma", "n": "no_glaucoma"}


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or mask of every split, by split and name; nothing is decoded."""
    root = published.folder(path, "refuge2", *(name for names in _SPLITS.values() for name in names))
    folders = {split: published.first(root, *names) for split, names in _SPLITS.items()}
    for split, folder in folders.items():
        if folder.is_dir():
            yield from _split(folder, split, section)


def load(entry: Entry) -> Loaded:
    """The encoded image and the disc (H, W) bool. Raises ImageProblem."""
    loaded = load_files(entry)
    return Loaded(loaded.image, None if loaded.mask is None else _disc(bytes(loaded.mask), entry.source_id))


def _disc(data: bytes, name: str) -> Mask:
    try:
        return decode_rgb(data, f"the mask of {name}")[..., 0] < _DISC_BELOW
    except ImageProblem as problem:
        raise ImageProblem(f"mask_{problem.reason}", str(problem)) from problem


def _split(folder: Path, split: str, section: CorpusSection) -> Iterator[Entry]:
    images = published.images_in(section, "refuge2", published.first(folder, "images", "Images"))
    masks = published.masks_in(published.first(folder, "mask", "masks", "gts"))
    labels = _labels(folder / "index.json") or _labels_of_names(images if split == "train" else {})
    for name, image, mask, _, problem in published.paired(images, masks, {name: {} for name in labels}):
        label = labels.get(name)
        yield Entry(
            source="refuge2", source_id=f"{split}/{name}", licence=ABOUT.licence, modality="fundus", image=image,
            mask=mask, label=label, domain=ABOUT.domain if label is None else None,
            problem=None if problem == MISSING_LABEL else problem, split_hint=split,
        )  # fmt: skip


def _labels(file: Path) -> dict[str, str]:
    """The published labels by image; an index without them has none."""
    if not file.exists():
        return {}
    try:
        rows = json.loads(file.read_text(encoding="utf-8")).values()
        return {Path(row["ImgName"]).stem: _LABELS[row["Label"]] for row in rows if "Label" in row}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file.name} of {file.parent.name} must map numbers to images with a Label of 0 or 1, got something else "
            f"({error}); download it again, or remove it."
        ) from error


def _labels_of_names(images: dict[str, Path]) -> dict[str, str]:
    return {name: _INITIALS[name[0].lower()] for name in images if name[0].lower() in _INITIALS}
