"""What the accepted rows consist of: scales, missing columns, modality, confirmation, and whose word a label is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from factory import labels as policy
from factory import taxonomy
from factory.release import licences
from factory.release.corpus.crosstab import (
    NOT_STATED,
    Coded,
    CrossTable,
    Flags,
    accepted,
    coded,
    crosstab,
    flags,
    nested,
    sources,
)  # fmt: skip

MEASURED = "measured"  # the source of a skin type that stands in where none is published

# What a row can lack, and the columns that say so (see `_lacks`).
FIELDS: dict[str, str] = {
    "patient_id": "patient id", "lesion_id": "lesion id", "diagnosis": "diagnosis", "age": "age", "sex": "sex",
    "site": "site", "skin_type": "published skin type", "diameter_mm": "diameter", "mask": "mask",
}  # fmt: skip


@dataclass(frozen=True)
class Missing:
    """Accepted rows by source (`of`), and how many lack each of FIELDS."""

    of: tuple[int, ...]
    lacking: CrossTable


@dataclass(frozen=True)
class Disagreement:
    """Rows of one label whose publisher and whose label policy differ on malignancy."""

    source: str
    label: str
    diagnosis: str
    publisher_malignant: bool
    policy_malignant: bool
    rows: int
    accepted: int


@dataclass(frozen=True)
class LabelPolicy:
    """Listed rows by source and by who says what of malignancy, and every label on which they differ."""

    agreement: CrossTable
    disagreements: tuple[Disagreement, ...]


@dataclass(frozen=True)
class LicenceRow:
    """Accepted rows of a source under one licence, as found and as the factory understands it."""

    source: str
    licence: str
    understood: str
    rows: int
    blocks_commercial: bool


@dataclass(frozen=True)
class CorpusLicence:
    """Licences of the accepted rows and their join; None where no row is accepted."""

    rows: tuple[LicenceRow, ...]
    verdict: licences.Verdict | None


def scales(table: pa.Table, rungs: Iterable[int] = ()) -> CrossTable:
    """Accepted rows by source and by the side (px) that they are stored at; `rungs` are columns even when empty."""
    found = set(pc.unique(table["scale"]).drop_null().to_pylist())
    order = [str(rung) for rung in sorted({*rungs, *found})]
    return crosstab(sources(table), coded(table["scale"], order, keep=True), accepted(table), keep=order)


def at_least(stored: CrossTable) -> tuple[int, ...]:
    """Rows that can be had at each scale: those stored at it or above, as smaller ones are made by reducing."""
    counts = [n for scale, n in zip(stored.columns, stored.column_totals, strict=True) if scale != NOT_STATED]
    return tuple(np.cumsum(counts[::-1], dtype=np.int64)[::-1].tolist())


def missing(table: pa.Table) -> Missing:
    """How many accepted rows lack what, by source."""
    of, kept = sources(table), accepted(table)
    size = len(of.words)
    counts = np.stack([np.bincount(of.codes[kept & _lacks(table, f)], minlength=size) for f in FIELDS], axis=1)
    rows = np.bincount(of.codes[kept], minlength=size)
    return Missing(tuple(rows.tolist()), CrossTable(of.words, tuple(FIELDS), nested(counts)))


def _lacks(table: pa.Table, field: str) -> Flags:
    if field == "mask":  # a mask that was published empty shows nothing either
        return ~flags(pc.and_kleene(pc.is_valid(table["mask_source"]), pc.not_equal(table["mask_source"], "empty")))
    if field == "skin_type":
        return ~published_skin(table)
    column = table[field]
    if pa.types.is_string(column.type):
        return flags(pc.or_kleene(pc.is_null(column), pc.equal(column, "")))
    return flags(pc.is_null(column, nan_is_null=pa.types.is_floating(column.type)))


def published_skin(table: pa.Table) -> Flags:
    """Which rows have a skin type that is not a band of a measured angle, (N,)."""
    measured = flags(pc.equal(table["skin_type_source"], MEASURED))
    return flags(pc.is_valid(table["skin_type"])) & ~measured


def modality(table: pa.Table) -> CrossTable:
    """Accepted rows by source and modality."""
    return crosstab(sources(table), coded(table["modality"], taxonomy.MODALITIES), accepted(table))


def domain(table: pa.Table) -> CrossTable:
    """Accepted rows by source and domain."""
    return crosstab(sources(table), coded(table["domain"], policy.DOMAINS), accepted(table))


def confirmation(table: pa.Table) -> CrossTable:
    """Accepted rows by source and how their diagnosis was confirmed."""
    return crosstab(sources(table), coded(table["confirmation"], taxonomy.CONFIRMATIONS), accepted(table))


def label_policy(table: pa.Table) -> LabelPolicy:
    """What publishers state of malignancy beside what the label policy makes of their labels, over all listed rows."""
    stated, ours = table["stated_malignant"], table["malignant"]
    both = flags(pc.and_(pc.is_valid(stated), pc.is_valid(ours)))
    differ = flags(pc.not_equal(stated, ours))
    words = ("they agree", "they differ", "publisher only", "policy only", "neither says")
    who = np.select([both & ~differ, both & differ, flags(pc.is_valid(stated)), flags(pc.is_valid(ours))], range(4), 4)
    columns = ["source", "label", "diagnosis", "stated_malignant", "malignant"]
    rows = table.select(columns).append_column("accepted", pa.array(accepted(table).astype(np.int64)))
    rows = rows.filter(pa.array(both & differ))
    groups = rows.group_by(columns).aggregate([([], "count_all"), ("accepted", "sum")]).to_pylist()
    found = [
        Disagreement(
            row["source"] or "unnamed", row["label"] or NOT_STATED, row["diagnosis"] or NOT_STATED,
            row["stated_malignant"], row["malignant"], row["count_all"], row["accepted_sum"],
        )
        for row in groups
    ]  # fmt: skip
    ordered = sorted(found, key=lambda d: (d.source, -d.rows, d.label))
    return LabelPolicy(crosstab(sources(table), Coded(who.astype(np.int64), words), keep=words), tuple(ordered))


def corpus_licence(table: pa.Table) -> CorpusLicence:
    """The licences of the accepted rows, source by source, and what they come to together."""
    rows = table.select(["source", "licence"]).filter(pa.array(accepted(table)))
    groups = rows.group_by(["source", "licence"]).aggregate([([], "count_all")]).to_pylist()
    parents = {licences.Parent("corpus", g["source"] or "unnamed", g["licence"] or ""): g["count_all"] for g in groups}
    verdict = licences.join(parents) if parents else None
    found = tuple(
        LicenceRow(p.name, p.licence, licences.classify(p.licence), n, verdict is not None and p in verdict.blocking)
        for p, n in sorted(parents.items())
    )
    return CorpusLicence(found, verdict)
