"""Readers of published dataset layouts. A reader lists entries and decodes nothing.

Each is a module with ABOUT (what `factory ingest --list` prints) and `entries(path, section)`, a generator in the order
of source_id; where an image is not a file of its own it has `load(entry)` too. Its name is the key under
`corpus.sources`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

from factory import taxonomy
from factory.corpora.base import Entry, Loaded, load_files
from factory.labels import Policy
from factory.recipe import CorpusSection

READERS: tuple[str, ...] = (
    "mednode", "hiba", "derm12345", "isic2019", "isic2020", "isic2024", "milk10k", "pad-ufes-20", "kaggle1", "kaggle2",
    "ddi", "ham10000", "isic2017", "isic2018", "ph2", "derm7pt", "fitzpatrick17k", "cvc-clinicdb", "kvasir-seg",
    "refuge2", "folder", "phantom",
)  # fmt: skip


def reader(name: str) -> ModuleType:
    """The module of a named reader; an unknown name is refused with the nearest right one."""
    taxonomy.check(name, READERS, "corpus.sources")
    return importlib.import_module(f"factory.corpora.{name.replace('-', '_')}")


def described() -> list[str]:
    """What `factory ingest --list` prints: each reader with its title, the layout it expects and its licence."""
    lines = []
    for name in READERS:
        about = reader(name).ABOUT
        layout = about.layout if about.verified else f"{about.layout} (unverified)"
        lines += [f"{name:<15} {about.title}; {about.domain}; {about.licence}", f"{'':<15} {layout}"]
    return lines


def list_entries(section: CorpusSection, policy: Policy | None = None) -> Iterator[Entry]:
    """Every entry of every source of a recipe, judged, in the order of (source, source_id); phantoms where none is
    named. Raises ValueError for a label without a meaning and for an id that a source has twice."""
    policy = policy or Policy.read(section.labels)
    for name, path in sorted((section.sources or {"phantom": ""}).items()):
        last = ""
        for entry in reader(name).entries(path, section):
            if entry.source_id <= last:
                raise ValueError(
                    f"corpus.sources.{name} must name each image once, got {entry.source_id!r} again or out of order; "
                    "remove the double."
                )
            last = entry.source_id
            yield entry.judged(policy)


def load(entry: Entry) -> Loaded:
    """The pixels or bytes of one entry. Raises ImageProblem for a listed defect, or a file that cannot be read."""
    read = getattr(reader(entry.source), "load", load_files)
    loaded: Loaded = read(entry)
    return loaded
