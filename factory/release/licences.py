"""The licence join: what a release may be used for, given the licences of everything that it was made from.

The licences that the factory knows form a small lattice, each a set of conditions that includes those below it:

    CC0 < Apache-2.0 < CC-BY < CC-BY-SA, CC-BY-NC < CC-BY-NC-SA < research-only < unknown

The join of several is the least licence that carries every condition of each. Words that are not known count as
`unknown`, the most restrictive of all, and are quoted as they were found. This is bookkeeping, not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NOTICE = frozenset({"notice"})
_BY = _NOTICE | {"attribution"}
_ALL_CC = _BY | {"share_alike", "non_commercial"}

# From free to unusable; the join is the first of these that holds every condition.
CONDITIONS: dict[str, frozenset[str]] = {
    "CC0": frozenset(),
    "Apache-2.0": _NOTICE,
    "CC-BY": _BY,
    "CC-BY-SA": _BY | {"share_alike"},
    "CC-BY-NC": _BY | {"non_commercial"},
    "CC-BY-NC-SA": _ALL_CC,
    "research-only": _ALL_CC | {"research_only"},
    "unknown": _ALL_CC | {"research_only", "unsettled"},
}
_NOT_COMMERCIAL = {"non_commercial", "research_only", "unsettled"}

# The identifiers of the Hugging Face hub; anything else is `other` there.
HUB_IDS: dict[str, str] = {
    "CC0": "cc0-1.0", "Apache-2.0": "apache-2.0", "CC-BY": "cc-by-4.0", "CC-BY-SA": "cc-by-sa-4.0",
    "CC-BY-NC": "cc-by-nc-4.0", "CC-BY-NC-SA": "cc-by-nc-sa-4.0", "unknown": "unknown",
}  # fmt: skip

# Other spellings, after `_plain`; permissive software licences ask for a notice, as Apache-2.0 does.
_ALIASES: dict[str, str] = {
    "CC-0": "CC0", "CCZERO": "CC0", "CC-ZERO": "CC0", "PUBLIC-DOMAIN": "CC0", "PDM": "CC0",
    "APACHE": "Apache-2.0", "APACHE2": "Apache-2.0", "MIT": "Apache-2.0", "BSD-2-CLAUSE": "Apache-2.0",
    "BSD-3-CLAUSE": "Apache-2.0", "CC-BY-SA-NC": "CC-BY-NC-SA",
    "RESEARCH": "research-only", "ACADEMIC": "research-only", "NON-COMMERCIAL-RESEARCH": "research-only",
    "FLUX-1-DEV-NON-COMMERCIAL-LICENSE": "research-only",
}  # fmt: skip
_RESEARCH = re.compile(r"LICENSEREF-.*-RESEARCH-USE")  # terms of a dataset's own, as its reader names them
_URL = re.compile(r"creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Parent:
    """Something a release was made from: its kind (`corpus`, `weights`), its name and its licence as found."""

    kind: str
    name: str
    licence: str


@dataclass(frozen=True)
class Verdict:
    """The licence of a release, whether commercial use is settled, and the parents that say no."""

    licence: str
    commercial: bool
    parents: tuple[Parent, ...]
    blocking: tuple[Parent, ...]
    notes: tuple[str, ...]


def classify(licence: str | None) -> str:
    """The licence of the lattice that these words mean; `unknown` for none, and for terms that forbid derivatives.

    Of an expression `A AND B`, as the cards of weights have it, the join.
    """
    parts = (licence or "").split(" AND ")
    if len(parts) > 1:
        return join_names(classify(part) for part in parts)
    plain = _plain(licence or "")
    if _RESEARCH.fullmatch(plain):
        return "research-only"
    known = {name.upper(): name for name in CONDITIONS} | _ALIASES
    return known.get(plain) or known.get(re.sub(r"-\d+(\.\d+)*$", "", plain)) or "unknown"


def _plain(licence: str) -> str:
    """`CC BY-NC 4.0`, `cc-by-nc-4.0` and the licence's address all become `CC-BY-NC` with or without a version."""
    address = _URL.search(licence)
    if address:
        word = address.group(1)
        return "CC0" if word in ("zero", "mark") else f"CC-{word}".upper()
    return re.sub(r"[\s_/-]+", "-", licence.strip()).upper()


def join_names(names: Iterable[str]) -> str:
    """The least licence of the lattice that carries every condition of each; of none it is CC0."""
    needed = frozenset[str]().union(*(CONDITIONS[name] for name in names))
    return next(name for name, conditions in CONDITIONS.items() if needed <= conditions)


def join(parents: Iterable[Parent]) -> Verdict:
    """One verdict over all parents. No parents at all is `unknown`: nothing is known about where it came from."""
    distinct = tuple(sorted(set(parents)))
    classes = [classify(parent.licence) for parent in distinct]
    licence = join_names(classes) if distinct else "unknown"
    blocking = tuple(p for p, name in zip(distinct, classes, strict=True) if CONDITIONS[name] & _NOT_COMMERCIAL)
    commercial = not CONDITIONS[licence] & _NOT_COMMERCIAL
    return Verdict(licence, commercial, distinct, blocking, _notes(distinct, classes))


def _notes(parents: tuple[Parent, ...], classes: list[str]) -> tuple[str, ...]:
    notes = []
    if "CC-BY-SA" in classes and {"CC-BY-NC", "CC-BY-NC-SA", "research-only"} & set(classes):
        notes.append(
            "A share-alike parent asks for its own licence and another parent forbids commercial use; "
            "no single licence satisfies both, so ask before publishing."
        )
    for parent, name in zip(parents, classes, strict=True):
        if name == "unknown":
            notes.append(f"The licence of {parent.name} is not settled: {parent.licence or 'none is stated'}.")
    return tuple(notes)


def require(verdict: Verdict, allow: str) -> None:
    """Refuse a release whose recipe asks for commercial use when its parents do not allow it."""
    if allow != "commercial" or verdict.commercial:
        return
    listed = ", ".join(f"{p.name} ({p.licence or 'no licence stated'})" for p in verdict.blocking) or "no known parents"
    raise ValueError(
        f"release.allow must be 'any' for what this run was made from, got 'commercial'; "
        f"leave out or replace the parents that block commercial use: {listed}."
    )
