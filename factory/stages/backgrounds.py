"""Backgrounds: normal skin found in the corpus, and what is planned to be drawn into it.

    corpus --FindBackgrounds--> backgrounds --placed--> plan rows with mask, parents and box --attached--> synthesize

A corpus row gives at most one background, the largest square of normal skin in it; one that gives none is rejected with
its reason (`no_mask`, `no_normal_skin`). A planned sample takes a background of its own skin type and a mask drawn from
the corpus's own shapes of its diagnosis, both by its id, so that a plan made again is the same plan. The mask is drawn
in shares of the image that the corpus had; a background is a part of one and is scaled to the sample's size, so the
texture of its skin is coarser than the mask's scale says.

Only images with a mask are known to be normal beside it, and only the lesion of that mask is known: another one nearby
that nobody outlined is taken for skin.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from factory import records, taxonomy
from factory.images import encode_mask, encode_png, read_mask, read_png
from factory.quality.normal_skin import NO_MASK, normal_square
from factory.quality.shape_prior import ShapePrior, describe
from factory.recipe import BackgroundsSection

Row = dict[str, Any]
# What is read of a corpus row.
COLUMNS = ["record_id", "image", "mask", "diagnosis", "skin_type", "skin_type_scale", "ita", "split", "outcome"]


class FindBackgrounds:
    """`FindBackgrounds(section)(corpus_rows)`: one row of `records.BACKGROUNDS` per accepted training row, in order."""

    def __init__(self, section: BackgroundsSection) -> None:
        self.section = section

    def __call__(self, rows: Iterable[Row]) -> list[Row]:
        return [self._found(row) for row in rows if row["outcome"] == records.ACCEPTED and row["split"] == "train"]

    def _found(self, row: Row) -> Row:
        found: Row = {name: row[name] for name in ("record_id", "diagnosis")}
        found["skin_type"] = taxonomy.fitzpatrick(row["skin_type"], row["skin_type_scale"], row["ita"])
        if not row["mask"]:
            return found | {"outcome": records.REJECTED, "reason": NO_MASK}
        rgb, mask = read_png(row["image"]["bytes"]), read_mask(row["mask"]["bytes"])
        shape = describe(mask)
        found |= {"shape": None if shape is None else shape.tolist()}
        box = normal_square(rgb, mask, self.section.min_side, self.section.margin)
        if isinstance(box, str):
            return found | {"outcome": records.REJECTED, "reason": box}
        image = records.image_struct(encode_png(box.of(rgb)), f"{row['record_id']}-normal.png")
        return found | {"image": image, "box": list(box), "outcome": records.ACCEPTED, "reason": None}


def prior_of(rows: Sequence[Row]) -> ShapePrior:
    """The shapes of the corpus's lesions, from background rows, whether they gave a background or not."""
    described = [None if row.get("shape") is None else np.asarray(row["shape"]) for row in rows]
    return ShapePrior.of_described(described, [row["diagnosis"] for row in rows])


def placed(planned: Iterable[Row], backgrounds: Sequence[Row], prior: ShapePrior) -> Iterator[Row]:
    """Plan rows with `mask`, `parents` and `box`. A row without a skin type takes any background.

    Raises ValueError, before the first row, if the plan asks for a skin type of which there is no background.
    """
    rows = list(planned)
    by_type = _usable(backgrounds)
    check_skin_types({row["skin_type"] for row in rows}, backgrounds)
    for row in rows:
        choice = by_type[row["skin_type"]]
        background = choice[records.seed_of(row["sample_id"] + "background") % len(choice)]
        rng = np.random.default_rng(records.seed_of(row["sample_id"] + "mask"))
        mask = prior.sample(rng, row["diagnosis"], row["width"])
        yield row | {
            "mask": records.image_struct(encode_mask(mask), f"{row['sample_id']}-mask.png"),
            "parents": [background["record_id"]], "box": background["box"],
        }  # fmt: skip


def _usable(backgrounds: Sequence[Row]) -> dict[str | None, list[Row]]:
    """Accepted backgrounds by skin type; None for all of them."""
    usable = sorted((row for row in backgrounds if row["outcome"] == records.ACCEPTED), key=lambda r: r["record_id"])
    by_type: dict[str | None, list[Row]] = {None: usable}
    for row in usable:
        if row["skin_type"] is not None:
            by_type.setdefault(row["skin_type"], []).append(row)
    return by_type


def check_skin_types(asked: Iterable[str | None], backgrounds: Sequence[Row]) -> None:
    """Raises ValueError if there is no background of a skin type that is asked for."""
    by_type = _usable(backgrounds)
    lacking = sorted(str(name or "any") for name in set(asked) if not by_type.get(name))
    if lacking:
        there = ", ".join(sorted(name for name in by_type if name)) or "none"
        raise ValueError(
            f"plan.skin_types must be among those of which the corpus has normal skin ({there}), got "
            f"{', '.join(lacking)}; leave them out, lower backgrounds.min_side or ingest more images with masks."
        )


def attached(planned: Iterable[Row], backgrounds: Iterable[Row]) -> list[Row]:
    """Plan rows with the pixels of their background, as `SynthesizeSamples` reads them."""
    pixels = {row["record_id"]: row.get("image") for row in backgrounds}
    return [row | {"background": pixels[row["parents"][0]]} for row in planned]
