"""Curate: source entries in, one row of `records.CORPUS` each out; and the second pass, which needs all rows.

First pass, entry by entry. An image is stored at the largest rung of `scales` not above its short side, so that its
short side is that rung; `record_id` is the hash of the stored pixels. `split` holds the published split, as a hint.

    failed     the listing's own problems (missing_image, mask_without_image, ...), what `images` refuses, a mask that
               cannot be read (`mask_` and why), a mask of another aspect than its image (mask_size)
    rejected   too_small (short side below `min_side`)

A mask that is missing or empty does not lose its image: `mask` is null, and `mask_source` is null or `empty`. A skin
type that is not published is measured from the skin around the lesion (scale `ita`, source `measured`).

Second pass, on light columns: `group_id`, `split`, and rejected exact_duplicate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from factory import records, taxonomy
from factory.corpora.base import Entry, Loaded
from factory.images import RGB, ImageProblem, Mask, decode_mask, decode_rgb, encode_mask, encode_png, resized
from factory.quality.attributes import estimate_mask
from factory.quality.skin_tone import skin_type
from factory.recipe import CorpusSection

Row = dict[str, Any]

_SAME_ASPECT = 0.02  # relative


class CurateImages:
    """`CurateImages(section)(entries)`: one corpus row per entry, in the same order."""

    def __init__(self, section: CorpusSection) -> None:
        self.section = section

    def __call__(self, entries: list[Entry]) -> list[Row]:
        return [self._curate(entry) for entry in entries]

    def _curate(self, entry: Entry) -> Row:
        row = entry.labels() | {"row_id": records.row_id(entry.source, entry.source_id), "split": entry.split_hint}
        try:
            loaded = entry.load()
            rgb, mask = self._decoded(entry.source_id, loaded)
        except ImageProblem as problem:
            return _judged(row | {"outcome": records.FAILED, "reason": problem.reason})
        row |= loaded.labels
        height, width = rgb.shape[:2]
        if min(height, width) < self.section.min_side:
            row |= {"width": width, "height": height, "outcome": records.REJECTED, "reason": "too_small"}
            return _judged(row)
        scale = max(rung for rung in self.section.scales if rung <= min(height, width))
        stored = _stored(rgb, mask, scale, row.get("mask_source") or "published")
        return _judged(row | stored | {"outcome": records.ACCEPTED, "reason": None})

    def _decoded(self, name: str, loaded: Loaded) -> tuple[RGB, Mask | None]:
        """Image and mask of one size, as published."""
        caps = {"max_pixels": self.section.max_pixels, "max_bytes": self.section.max_bytes}
        rgb = decode_rgb(loaded.image, name, **caps) if isinstance(loaded.image, bytes) else loaded.image
        if not isinstance(loaded.mask, bytes):
            return rgb, loaded.mask
        try:
            mask = decode_mask(loaded.mask, f"the mask of {name}", **caps)
        except ImageProblem as problem:
            raise ImageProblem(f"mask_{problem.reason}", str(problem)) from problem
        return rgb, _fitted(name, mask, rgb.shape[0], rgb.shape[1])


def _fitted(name: str, mask: Mask, height: int, width: int) -> Mask:
    """The mask at its image's size; another aspect means that they do not belong together."""
    high, wide = mask.shape
    if abs(wide * height - high * width) > _SAME_ASPECT * high * width:
        raise ImageProblem(
            "mask_size",
            f"the mask of {name} must have its image's shape {width} x {height}, got {wide} x {high}; pair them again.",
        )
    return np.asarray(resized(mask, width, height))


def _stored(rgb: RGB, mask: Mask | None, scale: int, mask_source: str) -> Row:
    """The columns that hold or come from pixels, at the rung `scale`."""
    short = min(rgb.shape[:2])
    height, width = (round(side * scale / short) for side in rgb.shape[:2])
    rgb = np.ascontiguousarray(resized(rgb, width, height))
    identifier = records.record_id(rgb)
    stored: Row = {
        "record_id": identifier, "image": records.image_struct(encode_png(rgb), f"{identifier}.png"),
        "mask": None, "mask_source": None, "width": width, "height": height, "scale": scale,
    }  # fmt: skip
    tone = skin_type(rgb, estimate_mask(rgb)) if mask is None else None
    if mask is not None:
        mask = np.asarray(resized(mask, width, height))
        tone = skin_type(rgb, mask)
        # A speck can vanish on the way down; it is then as empty as a mask that was published empty.
        stored["mask_source"] = mask_source if mask.any() else "empty"
        if mask.any():
            stored["mask"] = records.image_struct(encode_mask(mask), f"{identifier}-mask.png")
    return stored | {"measured_skin_type": tone}


def _judged(row: Row) -> Row:
    """The row with what follows from its labels: malignancy by the policy, skin type by measurement where unknown."""
    diagnosis, tone = row.get("diagnosis"), row.pop("measured_skin_type", None)
    if row.get("skin_type") is None and tone is not None:
        row |= {"skin_type": tone, "skin_type_scale": "ita", "skin_type_source": "measured"}
    return row | {"malignant": None if diagnosis is None else taxonomy.is_malignant(diagnosis)}


# ---------------------------------------------------------------------------------------------- second pass

LIGHT_COLUMNS = ("row_id", "record_id", "source", "patient_id", "lesion_id", "split", "outcome", "reason")


def second_pass(light: pa.Table, section: CorpusSection) -> pa.Table:
    """What needs all rows: (row_id, group_id, split, outcome, reason) of a table of `LIGHT_COLUMNS`, in its order.

    Its `split` is the hint. Of rows with one record_id the first is kept and the others are rejected as
    exact_duplicate. Only accepted rows get a split.
    """
    groups = assign_groups(light)
    decided = assign_splits(groups, section, light["split"].to_pylist())
    outcomes, reasons = without_duplicates(light)
    splits = [split if o == records.ACCEPTED else None for split, o in zip(decided, outcomes, strict=True)]
    text = pa.string()
    return pa.table({
        "row_id": light["row_id"], "group_id": pa.array(groups, text), "split": pa.array(splits, text),
        "outcome": pa.array(outcomes, text), "reason": pa.array(reasons, text),
    })  # fmt: skip


def assign_groups(light: pa.Table, edges: Iterable[tuple[int, int]] = ()) -> list[str]:
    """A group per row: rows that share a patient or a lesion of one source, or their pixels, are of one group.

    `edges` joins further rows by position, such as near copies. A group's id comes from its smallest row_id, so it
    does not depend on the order of the rows.
    """
    parent = list(range(light.num_rows))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in (*_shared_key_edges(light), *edges):
        parent[root(b)] = root(a)
    row_ids = light["row_id"].to_pylist()
    first: dict[int, str] = {}
    for node, row_id in enumerate(row_ids):
        first[root(node)] = min(first.get(root(node), row_id), row_id)
    return [records.digest("group", first[root(node)]) for node in range(light.num_rows)]


def _shared_key_edges(light: pa.Table) -> Iterator[tuple[int, int]]:
    """Pairs (first row with a key, later row with it), for each of the three kinds of key."""
    sources = light["source"].to_pylist()
    for column in ("patient_id", "lesion_id", "record_id"):
        seen: dict[tuple[str | None, str], int] = {}
        for node, value in enumerate(light[column].to_pylist()):
            if value is not None:
                # A patient's number means something within its source only; pixels mean the same everywhere.
                key = (None if column == "record_id" else sources[node], value)
                yield seen.setdefault(key, node), node


def assign_splits(groups: Sequence[str], section: CorpusSection, hints: Sequence[str | None]) -> list[str]:
    """A split per row, the same for a whole group, by a hash of the group's id.

    A published `test` wins for its group, then a published `val`. A group with a published `train` may become val
    (by `val_share`), never test. Groups without a hint are cut by `test_share` and `val_share`.
    """
    published: dict[str, set[str]] = {}
    for group, hint in zip(groups, hints, strict=True):
        published.setdefault(group, set()).update([] if hint is None else [hint])
    decided = {group: _split_of(group, found, section) for group, found in published.items()}
    return [decided[group] for group in groups]


def _split_of(group: str, published: set[str], section: CorpusSection) -> str:
    for split in ("test", "val"):
        if split in published:
            return split
    chance = int(records.digest("split", group)[:13], 16) / 16**13
    test_share = 0.0 if "train" in published else section.test_share
    if chance < test_share:
        return "test"
    return "val" if chance < test_share + section.val_share else "train"


def without_duplicates(light: pa.Table) -> tuple[list[str], list[str | None]]:
    """Outcomes and reasons per row after rejecting every accepted row whose pixels an earlier one has."""
    seen: set[str] = set()
    outcomes, reasons = light["outcome"].to_pylist(), light["reason"].to_pylist()
    for node, identifier in enumerate(light["record_id"].to_pylist()):
        if outcomes[node] == records.ACCEPTED:
            if identifier in seen:
                outcomes[node], reasons[node] = records.REJECTED, "exact_duplicate"
            seen.add(identifier)
    return outcomes, reasons
