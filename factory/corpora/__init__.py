"""Readers of published dataset layouts. A reader lists entries and decodes nothing.

Each is a module with `entries(path, section) -> list[Entry]`; its name is the key under `corpus.sources`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from factory import taxonomy
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

Reader = Callable[[str, CorpusSection], list[Entry]]

READERS: dict[str, str] = {
    "folder": "factory.corpora.folder",
    "isic2017": "factory.corpora.isic2017",
    "phantoms": "factory.corpora.phantoms",
}


def reader(name: str) -> Reader:
    """The `entries` function of a named reader; an unknown name is refused with the nearest right one."""
    module = importlib.import_module(READERS[taxonomy.check(name, tuple(READERS), "corpus.sources")])
    read: Reader = module.entries
    return read


def list_entries(section: CorpusSection) -> list[Entry]:
    """Every entry of every source of a recipe, in the order of (source, source_id); phantoms where none is named."""
    sources = section.sources or {"phantoms": ""}
    found = [entry for name, path in sources.items() for entry in reader(name)(path, section)]
    return sorted(found, key=lambda entry: (entry.source, entry.source_id))
