"""Backgrounds of a run: found part by part of the corpus, laid under the plan, read again by who draws.

They are found in this process, one part of the corpus in memory at a time, some milliseconds an image: a stage without
Ray is enough up to some hundred thousand images, and what was found stays when it is stopped. No Ray here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow.compute as pc

from factory import records
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime.units import Echo, fingerprint_in
from factory.stages.backgrounds import COLUMNS, FindBackgrounds, attached, check_skin_types, placed, prior_of
from factory.tables import Table

Row = dict[str, Any]


def find(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """The corpus to the sealed `backgrounds`, a part for a part."""
    corpus, table = run.table("corpus"), run.table("backgrounds")
    parts, fingerprint = len(corpus.sealed().parts), fingerprint_in(run, recipe, "backgrounds", ["corpus"])
    table.require(fingerprint)
    stage, part_of = FindBackgrounds(recipe.backgrounds), corpus.reader(COLUMNS)
    for part in table.missing(parts):
        table.commit(part, records.rows_to_table("backgrounds", stage(part_of(part).to_pylist())))
    table.seal(parts, fingerprint, {"corpus": corpus.digest()})
    counts = table.counts()
    echo(f"backgrounds {counts.get(records.ACCEPTED, 0)} of {sum(counts.values())} training images have normal skin")


def lay_under(run: Run, rows: list[Row]) -> list[Row]:
    """Plan rows with mask, parents and box, from the run's sealed backgrounds."""
    return layer(run)(rows)


def layer(run: Run, cells: Iterable[tuple[str, ...]] = ()) -> Callable[[list[Row]], list[Row]]:
    """`lay_under` for one who has many parts: the backgrounds are read once. cells: what will be asked; a ValueError
    here if there is no background for one of their skin types."""
    known = run.table("backgrounds").read(["record_id", "diagnosis", "skin_type", "box", "shape", "outcome"])
    found = known.to_pylist()
    prior = prior_of(found)
    check_skin_types({cell[1] for cell in cells}, found)
    return lambda rows: list(placed(rows, found, prior))


def with_pixels(rows: list[Row], table: Table) -> list[Row]:
    """Plan rows with the pixels of their backgrounds, of which only theirs are read."""
    wanted = sorted({parent for row in rows for parent in row["parents"]})
    return attached(rows, table.read(["record_id", "image"], filter=pc.field("record_id").isin(wanted)).to_pylist())


def for_samples(uri: str | None, rows: list[Row]) -> list[Row]:
    """Rows of `factory sample`, placed on backgrounds of a run; a ValueError without a run that has them."""
    if uri is None:
        raise ValueError(
            "--run must name a run with backgrounds to draw into, got nothing; make them with `factory plan --set "
            "plan.generator=inpaint`."
        )
    run = Run(uri)
    return with_pixels(lay_under(run, rows), run.table("backgrounds"))
