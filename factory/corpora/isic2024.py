"""ISIC 2024 challenge (SLICE-3D), as published on Kaggle: crops of lesions from 3D total body photographs.

    ROOT/train-metadata.csv      isic_id, target, patient_id, lesion_id, iddx_full, iddx_1 .. iddx_5, ...
    ROOT/train-image.hdf5        one encoded JPEG per isic_id, or ROOT/train-image/image/ISIC_0015670.jpg
    ROOT/test-metadata.csv, ROOT/test-image.hdf5      three rows, without any label

401,059 tiles of 1,042 patients, 393 of them malignant. The label is the most particular of iddx_3, iddx_2 and iddx_1,
else what `target` says. A diagnosis beyond `Benign` came from histology; the others were judged at the visit. The test
rows are hinted `test`; the real test set is hidden, so the training rows have no hint. The licence is stated row by
row. Source: Kurtansky et al. 2024, doi:10.1038/s41597-024-03743-w.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from factory.corpora import isic_archive, published
from factory.corpora.base import MISSING_IMAGE, MISSING_LABEL, Entry, Loaded, load_files
from factory.images import ImageProblem
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="ISIC 2024 (SLICE-3D)",
    layout="train-metadata.csv with train-image.hdf5 or train-image/image/, and the same for test",
    licence="CC-BY-NC-4.0",
    verified=True,
)
COLUMNS = (
    "isic_id", "patient_id", "age_approx", "sex", "anatom_site_general", "clin_size_long_diam_mm", "image_type",
    "copyright_license",
)  # fmt: skip
_LEVELS = ("iddx_3", "iddx_2", "iddx_1")
_TARGETS = {"0": "Benign", "1": "Malignant"}


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every tile or metadata row of both splits, by id; nothing is decoded."""
    root = published.folder(path, "isic2024", "train-metadata.csv", "test-metadata.csv")
    splits = [split for split in ("train", "test") if (root / f"{split}-metadata.csv").exists()]
    yield from heapq.merge(*(_split(root, split, section) for split in splits), key=lambda entry: entry.source_id)


def load(entry: Entry) -> Loaded:
    """The encoded tile of one entry, from its HDF5 file where it is in one. Raises ImageProblem."""
    if entry.member is None:
        return load_files(entry)
    path = entry.require_image()
    try:
        with _h5py().File(path, "r") as tiles:
            return Loaded(bytes(tiles[entry.member][()]), None)
    except KeyError as error:
        raise ImageProblem(
            MISSING_IMAGE, f"{path.name} must hold {entry.member}, but it is gone; download it again."
        ) from error
    except OSError as error:
        raise ImageProblem(
            "unreadable_file", f"{path.name} must be an HDF5 file ({error}); download it again."
        ) from error


def _split(root: Path, split: str, section: CorpusSection) -> Iterator[Entry]:
    file, archive = root / f"{split}-metadata.csv", root / f"{split}-image.hdf5"
    optional = (*_LEVELS, "target", "lesion_id")
    rows = published.by_key(published.table(file, COLUMNS, optional=optional), "isic_id", file)
    stored, folder = archive.exists(), root / f"{split}-image" / "image"
    images = _members(archive) if stored else published.images_in(section, "isic2024", folder)
    for name, image, _, row, problem in published.paired(images, {}, rows):
        known = row or {}
        label = isic_archive.deepest(known, _LEVELS) or _TARGETS.get(known.get("target", ""))
        yield Entry(
            source="isic2024", source_id=name, image=image, member=name if stored and image else None, label=label,
            problem=problem or (MISSING_LABEL if label is None else None),
            licence=isic_archive.licence(known.get("copyright_license"), ABOUT.licence, file),
            modality=published.translated(known.get("image_type"), isic_archive.MODALITIES, "image_type", file),
            stated_malignant=published.stated_malignant(known.get("target")),
            confirmation=label and ("clinical" if label == "Benign" else "histology"),
            site=published.translated(
                known.get("anatom_site_general"), isic_archive.SITES, "anatom_site_general", file
            ),
            age=published.number(known.get("age_approx")), sex=published.known(known.get("sex")),
            diameter_mm=published.number(known.get("clin_size_long_diam_mm")),
            patient_id=published.known(known.get("patient_id")), lesion_id=published.known(known.get("lesion_id")),
            split_hint="test" if split == "test" else None,
        )  # fmt: skip


def _members(archive: Path) -> dict[str, Path]:
    """The ids that an HDF5 file holds. Raises ValueError where it is none."""
    try:
        with _h5py().File(archive, "r") as tiles:
            return dict.fromkeys(tiles, archive)
    except OSError as error:
        raise ValueError(
            f"{archive.name} must be an HDF5 file, got something else ({error}); download it again."
        ) from error


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            "corpus.sources.isic2024 must be read with h5py, got an environment without it; "
            "run `pip install h5py`, or give the images unpacked in train-image/image."
        ) from error
    return h5py  # type: ignore[no-any-return]
