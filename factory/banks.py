"""Prompt banks: how much a prompt says, as versioned files (minimal, standard, extended: DiffAug's three arms).

A bank is a sentence and clauses, each with its alternatives: of these the first is said whose words are all known, and
none where something in each is unknown. A bank is known by the SHA-256 of its file.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import yaml

BANKS = ("minimal", "standard", "extended")
_FOLDER = "prompt_banks"


@dataclass(frozen=True)
class Bank:
    """One bank. Alternatives are tried in order; `{clauses}` in the description are those that can be said."""

    id: str
    version: int
    sentence: Sequence[str]
    description: str
    clauses: Sequence[Sequence[str]]
    digest: str

    def worded(self, known: Mapping[str, str]) -> str:
        """The prompt for what is known; a description is added only where it would say something."""
        first = _first(self.sentence, known) or ""
        said = [(alternatives, _first(alternatives, known)) for alternatives in self.clauses]
        clauses = [clause for _, clause in said if clause is not None]
        tells = any(clause is not None and clause not in alternatives for alternatives, clause in said)
        return first + (self.description.replace("{clauses}", ", ".join(clauses)) if tells else "")


def bank(name: str) -> Bank:
    """The bank of a name. Raises ValueError, which names those there are."""
    if name not in BANKS:
        raise ValueError(f"bank must be one of {', '.join(BANKS)}, got {name!r}; choose one of them.")
    return _read(name)


@cache
def _read(name: str) -> Bank:
    data = importlib.resources.files("factory").joinpath(_FOLDER, f"{name}.yaml").read_bytes()
    return Bank(**yaml.safe_load(data), digest=hashlib.sha256(data).hexdigest())


def _first(alternatives: Sequence[str], known: Mapping[str, str]) -> str | None:
    return next((text.format_map(known) for text in alternatives if _words_of(text) <= known.keys()), None)


@cache
def _words_of(text: str) -> frozenset[str]:
    return frozenset(field for _, field, _, _ in string.Formatter().parse(text) if field)
