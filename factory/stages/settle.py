"""Settle: what needs all rows of the intake. Groups, splits, and which copy of a photograph stays.

    settle(light, copies, section) -> (row_id, group_id, split, duplicate_of, outcome, reason) of every row, in order

    rejected   exact_duplicate (the stored pixels of another row), published_duplicate (its publisher says so),
               near_duplicate (another row's photograph, see `quality/copies`)

Rows of one group share a patient or a lesion of one source, or are copies of each other, through however many others;
a group lies in one split. A published `test` wins for its group, then a published `val`; a group with a published
`train` may become val, never test. The rest is cut within each diagnosis by the shares of the recipe, in the order of
a hash, so that what a group is does not depend on the order of the rows or on the size of the parts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from factory import records
from factory.recipe import CorpusSection

LIGHT_COLUMNS = (
    "row_id", "record_id", "source", "source_id", "patient_id", "lesion_id", "split", "diagnosis", "mask_source",
    "scale", "outcome", "reason",
)  # fmt: skip
# How a pair of copies is known. An embedding says that two images are much alike, not that they are one photograph: it
# keeps them in one group, and rejects neither.
PUBLISHED, NEAR, EMBEDDING = "published", "near", "embedding"

Ints = NDArray[np.int64]


def settle(light: pa.Table, copies: pa.Table, section: CorpusSection) -> pa.Table:
    """What all rows decide of each. light: `LIGHT_COLUMNS`; copies: (a, b, kind) by position in it."""
    accepted = _text(light, "outcome") == records.ACCEPTED
    groups = assign_groups(light, copies)
    splits = assign_splits(groups, _text(light, "split"), _text(light, "diagnosis"), accepted, section)
    kept, reasons = duplicates(light, copies, accepted, section)
    row_ids = _text(light, "row_id")
    lost = kept >= 0
    outcomes = np.where(lost, records.REJECTED, _text(light, "outcome"))
    return pa.table({
        "row_id": light["row_id"],
        "group_id": pa.array(groups, pa.string()),
        "split": pa.array(splits, pa.string(), mask=~accepted | lost),
        "duplicate_of": pa.array(row_ids[kept], pa.string(), mask=~lost),
        "outcome": pa.array(outcomes, pa.string()),
        "reason": pa.array(np.where(lost, reasons, _text(light, "reason")), pa.string()),
    })  # fmt: skip


def assign_groups(light: pa.Table, copies: pa.Table) -> NDArray[np.object_]:
    """A group per row. Its id comes from its smallest row_id, so it does not depend on the order of the rows."""
    shared = [_codes(light, "source", "patient_id"), _codes(light, "source", "lesion_id"), _codes(light, "record_id")]
    labels = _components(light.num_rows, shared, _pairs(copies))
    row_ids = _text(light, "row_id")
    order = np.argsort(row_ids)
    _, first = np.unique(labels[order], return_index=True)  # by label: where its smallest row_id is
    names = np.array([records.digest("group", row_id) for row_id in row_ids[order[first]]], dtype=object)
    return np.asarray(names[labels])


def assign_splits(
    groups: NDArray[np.object_],
    hints: NDArray[np.object_],
    diagnoses: NDArray[np.object_],
    accepted: NDArray[np.bool_],
    section: CorpusSection,
) -> NDArray[np.object_]:
    """A split per row, the same for a whole group."""
    names, members = np.unique(groups.astype(str), return_inverse=True)
    has = {split: np.bincount(members, hints == split, len(names)) > 0 for split in ("test", "val", "train")}
    sizes = np.bincount(members, accepted, len(names)).astype(np.float64)
    chance = np.array([int(records.digest("split", name)[:13], 16) / 16**13 for name in names])
    splits = np.full(len(names), "train", dtype=object)
    strata = _strata(members, diagnoses, accepted, len(names))
    for stratum in np.unique(strata):
        free = np.flatnonzero((strata == stratum) & ~has["test"] & ~has["val"] & ~has["train"])
        _cut(splits, free, sizes, chance, {"test": section.test_share, "val": section.val_share})
        hinted = np.flatnonzero((strata == stratum) & ~has["test"] & ~has["val"] & has["train"])
        _cut(splits, hinted, sizes, chance, {"val": section.val_share})
    splits[has["val"]] = "val"
    splits[has["test"]] = "test"
    return np.asarray(splits[members])


def _strata(
    members: Ints, diagnoses: NDArray[np.object_], accepted: NDArray[np.bool_], count: int
) -> NDArray[np.int64]:
    """The rarest diagnosis that a group holds, as a number: the one that a split could lack."""
    known = np.where(diagnoses == None, "", diagnoses).astype(str)  # noqa: E711 (element by element)
    words, codes = np.unique(known, return_inverse=True)
    rarity = np.argsort(np.argsort(np.bincount(codes, accepted, len(words)), kind="stable"), kind="stable")
    found = np.full(count, len(words), dtype=np.int64)
    np.minimum.at(found, members, rarity[codes])
    return found


def _cut(
    splits: NDArray[np.object_], groups: Ints, sizes: NDArray[np.float64], chance: NDArray[np.float64],
    shares: dict[str, float],
) -> None:  # fmt: skip
    """Gives whole groups, in the order of their hash, to each split until its share of the rows is reached."""
    ordered = groups[np.argsort(chance[groups], kind="stable")]
    middle = np.cumsum(sizes[ordered]) - sizes[ordered] / 2
    start, total = 0.0, sizes[ordered].sum()
    for split, share in shares.items():
        splits[ordered[(middle >= start) & (middle < start + share * total)]] = split
        start += share * total


def duplicates(
    light: pa.Table, copies: pa.Table, accepted: NDArray[np.bool_], section: CorpusSection
) -> tuple[Ints, NDArray[np.object_]]:
    """For each row the position of the copy that stays in its place, -1 where it stays itself, and the reason."""
    same = pc.not_equal(copies["kind"], EMBEDDING)
    copies = copies.slice(0, 0) if section.near_duplicates == "group" else copies.filter(same)
    usable = accepted[copies["a"].to_numpy()] & accepted[copies["b"].to_numpy()]
    copies = copies.filter(pa.array(usable))
    pixels = np.where(accepted, _codes(light, "record_id"), -1)
    labels = _components(light.num_rows, [pixels], _pairs(copies))
    best = _best_of_each(light, labels, accepted)
    kept = np.where(accepted & (best[labels] != np.arange(light.num_rows)), best[labels], -1)
    reasons = np.full(light.num_rows, "near_duplicate", dtype=object)
    said = copies.filter(pc.equal(copies["kind"], PUBLISHED))
    for column in ("a", "b"):
        reasons[said[column].to_numpy()] = "published_duplicate"
    reasons[(kept >= 0) & (pixels == pixels[kept])] = "exact_duplicate"
    return kept, reasons


def _best_of_each(light: pa.Table, labels: Ints, accepted: NDArray[np.bool_]) -> Ints:
    """By component: the accepted row of a published test split, then with a mask, then largest, then first by id."""
    order = np.lexsort((
        _text(light, "row_id").astype(str),
        -pc.fill_null(light["scale"], 0).to_numpy(),
        _text(light, "mask_source") != "published",
        _text(light, "split") != "test",
        ~accepted,
    ))  # fmt: skip
    _, first = np.unique(labels[order], return_index=True)
    return np.asarray(order[first])


def published_copies(light: pa.Table, same_as: pa.ChunkedArray) -> tuple[Ints, Ints]:
    """Positions of rows and of those that their publishers say they repeat; what is not in the corpus is left out."""
    names = pc.binary_join_element_wise(light["source"], light["source_id"], "\0")
    wanted = pc.binary_join_element_wise(light["source"], same_as, "\0")
    found = pc.index_in(wanted, names)
    known = np.flatnonzero(pc.fill_null(pc.is_valid(found), False).to_numpy() & pc.is_valid(same_as).to_numpy())
    return known, found.take(pa.array(known)).to_numpy().astype(np.int64)


def _components(count: int, shared: Iterable[Ints], pairs: tuple[Ints, Ints]) -> Ints:
    """A label per row, 0 to k - 1: rows with one code in any of `shared` (-1: none), or paired, have one label."""
    ends, next_node = [pairs], count
    for codes in shared:
        rows = np.flatnonzero(codes >= 0)
        ends.append((rows, next_node + codes[rows]))  # each code is a node of its own
        next_node += int(codes.max(initial=-1)) + 1
    a, b = (np.concatenate(side) for side in zip(*ends, strict=True))
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(next_node, next_node))
    _, labels = connected_components(graph, directed=False)
    return np.unique(labels[:count], return_inverse=True)[1].astype(np.int64)


def _codes(light: pa.Table, *columns: str) -> Ints:
    """A number per row for equal values of the columns taken together; -1 where one is null."""
    joined = pc.binary_join_element_wise(*(light[name] for name in columns), "\0")  # null where any is
    codes = joined.combine_chunks().dictionary_encode().indices
    return np.asarray(pc.fill_null(codes, -1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _pairs(copies: pa.Table) -> tuple[Ints, Ints]:
    return copies["a"].to_numpy().astype(np.int64), copies["b"].to_numpy().astype(np.int64)


def _text(light: pa.Table, column: str) -> NDArray[np.object_]:
    return np.asarray(light[column].to_numpy(zero_copy_only=False), dtype=object)
