"""A plain labelled image folder: `ROOT/<diagnosis>/...`, with a mask beside an image where there is one.

The mask of `a.jpg` is `a_mask.png` or `a_segmentation.png`. Folder names are diagnoses of the label policy, of any
domain. Every file below them is an entry, save hidden ones and notes (.txt, .md, .csv, .json), so that a file that is
no image becomes a failed row and is not lost. An id is the path below ROOT. Neither the modality nor the licence of
such a folder is known to the reader: the one is null, the other says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from factory.corpora import published
from factory.corpora.base import ORPHAN_MASK, Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="A labelled folder",
    layout="a folder per diagnosis, with masks beside the images as NAME_mask.png or NAME_segmentation.png",
    licence="LicenseRef-unstated",
    domain="any",
    verified=True,
)
_MASK_ENDINGS = ("_mask", "_segmentation")
_NOTES = (".txt", ".md", ".csv", ".json")


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image and every orphan mask under `path`, by relative path; nothing is decoded."""
    root = Path(path)
    folders = sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".") if root.is_dir() else []
    if not folders:
        raise ValueError(
            f"corpus.sources.folder must be a folder of folders named after diagnoses, got {path!r}; "
            f"put the images under folders such as {root / 'melanoma'}."
        )
    found = [entry for folder in folders for entry in _of_diagnosis(root, folder)]
    yield from sorted(found, key=lambda entry: entry.source_id)


def _of_diagnosis(root: Path, folder: Path) -> list[Entry]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _is_note(file)]
    masks = {_stem_of_mask(file): file for file in files if _is_mask(file)}
    images = [file for file in files if not _is_mask(file)]
    found = [_entry(root, folder, file, image=file, mask=masks.get(file.with_suffix(""))) for file in images]
    owned = {file.with_suffix("") for file in images}
    orphans = [file for stem, file in masks.items() if stem not in owned]
    return found + [_entry(root, folder, file, mask=file, problem=ORPHAN_MASK) for file in orphans]


def _is_note(file: Path) -> bool:
    return file.name.startswith(".") or file.suffix.lower() in _NOTES


def _is_mask(file: Path) -> bool:
    return file.suffix.lower() == ".png" and file.stem.endswith(_MASK_ENDINGS)


def _stem_of_mask(file: Path) -> Path:
    stem = file.stem
    for ending in _MASK_ENDINGS:
        stem = stem.removesuffix(ending)
    return file.with_name(stem)


def _entry(
    root: Path, folder: Path, file: Path, image: Path | None = None, mask: Path | None = None,
    problem: str | None = None,
) -> Entry:  # fmt: skip
    return Entry(
        source="folder", source_id=published.relative_name(file, root), licence=ABOUT.licence, image=image, mask=mask,
        problem=problem, label=folder.name,
    )  # fmt: skip
