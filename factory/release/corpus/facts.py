"""The facts of a corpus as one tree of plain values, how a run gives them, and the same as JSON.

`of_run(store)` reads the light columns of the sealed `corpus` (and `copies`, and what `intake` says of published
splits) and `counted` makes the tree, without a look at any picture. The page and `report/corpus.json` show the same
object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from factory import corpora, records
from factory.release.corpus import balance, composition, copies, skin, table1
from factory.release.corpus.crosstab import CrossTable, accepted, sources
from factory.release.provenance import read_json
from factory.storage import Store
from factory.tables import Table

PATH = "report/corpus.json"
VERSION = 1  # of the JSON's shape

# Everything that is counted; no picture, no list.
COLUMNS = [
    "row_id", "record_id", "source", "mask_source", "modality", "label", "domain", "diagnosis", "malignant",
    "stated_malignant", "confirmation", "skin_type", "skin_type_scale", "skin_type_source", "ita", "site", "age", "sex",
    "diameter_mm", "patient_id", "lesion_id", "group_id", "split", "duplicate_of", "source_width", "source_height",
    "scale", "licence", "outcome", "reason",
]  # fmt: skip
_COPIES = ["row_id_a", "row_id_b", "kind"]


@dataclass(frozen=True)
class Check:
    """A statement that was checked on the tables, under a `name` that stays. holds: None where what it needs is not
    there; `found` says what was seen."""

    name: str
    states: str
    holds: bool | None
    found: str


@dataclass(frozen=True)
class Settings:
    """The recipe's keys that shaped this corpus, as the sealed tables say; None where they do not."""

    min_side: int | None = None
    scales: tuple[int, ...] | None = None
    frame: str | None = None
    near_duplicates: str | None = None
    min_likeness: float | None = None
    val_share: float | None = None
    test_share: float | None = None


@dataclass(frozen=True)
class CorpusFacts:
    """Everything that the page says of the corpus. tables: the manifest digest of each sealed table it came from."""

    tables: dict[str, str]
    settings: Settings
    datasets: tuple[table1.Dataset, ...]
    total: table1.Dataset
    failures: CrossTable
    other_reasons: CrossTable
    size_filter: table1.SizeFilter
    scales: CrossTable
    at_least: tuple[int, ...]
    copies: copies.Copies
    missing: composition.Missing
    skin: skin.SkinTone
    modality: CrossTable
    domain: CrossTable
    confirmation: CrossTable
    label_policy: composition.LabelPolicy
    licence: composition.CorpusLicence
    balance: balance.Balance | None
    checks: tuple[Check, ...]
    filters: dict[str, str] = field(default_factory=lambda: dict(table1.FILTERS))

    @property
    def holds(self) -> bool:
        """Whether no check failed."""
        return all(check.holds is not False for check in self.checks)


def of_run(store: Store, corpus: pa.Table | None = None) -> CorpusFacts | None:
    """The facts of a run's corpus; None where it is not sealed. `corpus`: its COLUMNS, if they were read already."""
    table = Table(store, "corpus")
    if table.manifest() is None:
        return None
    if corpus is None:
        corpus = table.read(COLUMNS)
    others = {name: Table(store, name) for name in ("listing", "intake", "copies")}
    sealed = {name: other for name, other in others.items() if other.manifest() is not None}
    return counted(
        corpus,
        copies_table=sealed["copies"].read(_COPIES) if "copies" in sealed else None,
        listed=sealed["listing"].read(["source"]) if "listing" in sealed else None,
        hints=sealed["intake"].read(["row_id", "split"]) if "intake" in sealed else None,
        settings=_settings(store),
        tables={name: t.digest() for name, t in ({"corpus": table} | sealed).items()},
    )


def counted(
    corpus: pa.Table,
    *,
    copies_table: pa.Table | None = None,
    listed: pa.Table | None = None,
    hints: pa.Table | None = None,
    settings: Settings = Settings(),
    tables: Mapping[str, str] | None = None,
) -> CorpusFacts:
    """The facts of a corpus (COLUMNS) with, where they are sealed, `copies` (row_id_a, row_id_b, kind), the `source`
    column of the listing and (row_id, split) of the intake, which are the published splits."""
    stored = composition.scales(corpus, settings.scales or ())
    facts = CorpusFacts(
        tables=dict(tables or {}),
        settings=settings,
        datasets=table1.datasets(corpus, _titles(corpus)),
        total=table1.total(corpus),
        failures=table1.failures(corpus),
        other_reasons=table1.other_reasons(corpus),
        size_filter=table1.size_filter(corpus, settings.min_side),
        scales=stored,
        at_least=composition.at_least(stored),
        copies=copies.count_copies(corpus, copies_table),
        missing=composition.missing(corpus),
        skin=skin.skin_tone(corpus),
        modality=composition.modality(corpus),
        domain=composition.domain(corpus),
        confirmation=composition.confirmation(corpus),
        label_policy=composition.label_policy(corpus),
        licence=composition.corpus_licence(corpus),
        balance=balance.count_balance(corpus),
        checks=(),
    )
    return replace(facts, checks=_checks(corpus, facts, copies_table, listed, hints))


def to_json(facts: CorpusFacts | None) -> bytes:
    """The facts as JSON; of an unsealed corpus, that it is not."""
    if facts is None:
        content: dict[str, Any] = {"version": VERSION, "sealed": False, "remedy": "run `factory ingest` to its end"}
    else:
        content = {"version": VERSION, "sealed": True, "holds": facts.holds, **asdict(facts)}
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _titles(corpus: pa.Table) -> dict[str, str]:
    """The readers' titles of the sources that have a reader."""
    return {name: corpora.reader(name).ABOUT.title for name in sources(corpus).words if name in corpora.READERS}


def _settings(store: Store) -> Settings:
    """From the fingerprints of the sealed tables, else from the run's header."""
    said = (read_json(store, "run.json") or {}).get("recipe", {}).get("corpus", {})
    made = {name: Table(store, name).fingerprint() or {} for name in ("intake", "copies", "corpus")}
    found: dict[str, Any] = {}
    for name in Settings.__dataclass_fields__:
        texts = [prints[f"corpus.{name}"] for prints in made.values() if f"corpus.{name}" in prints]
        found[name] = json.loads(texts[0]) if texts else said.get(name)
    scales = found.pop("scales")
    return Settings(scales=None if scales is None else tuple(scales), **found)


# ------------------------------------------------------------------------------------------------------ checks


def _checks(
    corpus: pa.Table, facts: CorpusFacts, copies_table: pa.Table | None, listed: pa.Table | None,
    hints: pa.Table | None,
) -> tuple[Check, ...]:  # fmt: skip
    """What must be true of any corpus, counted on this one."""
    groups, total = facts.copies.groups, facts.total
    outcomes = {o: int(pc.sum(pc.equal(corpus["outcome"], o)).as_py() or 0) for o in records.OUTCOMES}
    added = sum(outcomes.values())
    orphans, removed = copies.orphans(corpus), len(corpus) - corpus["duplicate_of"].null_count
    return (
        Check(
            "rows_accounted",
            "Every listed row is accepted, rejected or failed, and every lost one fell to one filter.",
            added == corpus.num_rows == total.accepted.total + sum(f.lost.total for f in total.filters)
            and outcomes[records.ACCEPTED] == total.accepted.total,
            f"{corpus.num_rows:,} rows, " + ", ".join(f"{n:,} {o}" for o, n in outcomes.items()),
        ),
        _check_listing(corpus, listed),
        _none(
            "one_split",
            "No group of patient, lesion and copies has accepted rows in two splits.",
            groups.crossing,
            groups.accepted,
            "groups",
        ),
        _check_hints(corpus, hints),
        _none(
            "copies_stay",
            "Every row lost as a copy names an accepted row that stays in its place.",
            orphans,
            removed,
            "rows",
        ),
        *_check_copies(corpus, facts.copies, copies_table),
        _check_sizes(corpus, facts),
    )


def _none(name: str, states: str, count: int, of: int, what: str) -> Check:
    return Check(name, states, count == 0, f"{count:,} of {of:,} {what} break it")


def _check_listing(corpus: pa.Table, listed: pa.Table | None) -> Check:
    states = "Every source has as many rows as were listed when the ingest began."
    if listed is None:
        return Check("listing", states, None, "the listing is not sealed")
    ours, theirs = (dict(_count_by(t)) for t in (corpus, listed))
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return Check(
        "listing", states, not wrong, f"{listed.num_rows:,} listed" + (f"; not so: {', '.join(wrong)}" if wrong else "")
    )


def _count_by(table: pa.Table) -> list[tuple[str, int]]:
    counts = table["source"].value_counts().to_pylist()
    return [(row["values"] or "unnamed", row["counts"]) for row in counts]


def _check_hints(corpus: pa.Table, hints: pa.Table | None) -> Check:
    states = "No accepted row in train or val shares a group with an image that its publisher holds out as test."
    if hints is None:
        return Check("held_out", states, None, "the intake, which holds published splits, is not sealed")
    held = int(pc.sum(pc.equal(hints["split"], "test")).as_py() or 0)
    leaks = copies.held_out_leaks(corpus, hints)
    return Check(
        "held_out", states, leaks == 0, f"{held:,} rows are published as test; {leaks:,} rows share a group with one"
    )


def _check_copies(corpus: pa.Table, found: copies.Copies, copies_table: pa.Table | None) -> tuple[Check, ...]:
    states = "Both images of every pair of copies are in one group."
    sums = "Every row of the table of copies is in the matrix, or is accounted for."
    if copies_table is None or found.reconciled is None:
        return Check("copies_grouped", states, None, "the table of copies is not sealed"), Check(
            "copies_counted", sums, None, "as above"
        )
    apart, r = copies.apart(corpus, copies_table), found.reconciled
    detail = (
        f"{r.rows:,} rows: {r.counted:,} pairs counted, {r.equal_pixels:,} of equal pixels, {r.repeats:,} that repeat "
        f"a pair, {r.unknown:,} of rows that are not in the corpus"
    )
    return _none("copies_grouped", states, apart, r.rows, "pairs"), Check(
        "copies_counted", sums, r.holds and not r.unknown, detail
    )


def _check_sizes(corpus: pa.Table, facts: CorpusFacts) -> Check:
    states = "No accepted image was published smaller than the least side, and none is stored enlarged."
    least = facts.settings.min_side
    kept = corpus.select(["source_width", "source_height", "scale"]).filter(pa.array(accepted(corpus)))
    short = pc.min_element_wise(kept["source_width"], kept["source_height"], skip_nulls=False)
    known = kept.num_rows - short.null_count
    if least is None or not known:
        return Check("sizes", states, None, "the least side is not recorded" if known else "no published size is known")
    small = int(pc.sum(pc.less(short, least)).as_py() or 0)
    # A picture that was padded to a square has its longer side on all sides.
    side = pc.max_element_wise(kept["source_width"], kept["source_height"]) if facts.settings.frame == "pad" else short
    larger = int(pc.sum(pc.greater(kept["scale"], side)).as_py() or 0)
    return Check(
        "sizes", states, not small and not larger, f"{known:,} of known size: {small:,} below, {larger:,} enlarged"
    )
