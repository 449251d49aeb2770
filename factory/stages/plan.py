"""The plan: what each sample will be, decided before anything is made.

How many there are of each cell is `stages/quotas`' matter. A sample's looks (asymmetry, border, colours) are drawn from
what its diagnosis looks like in the corpus's own captions, so that the prompts stay inside what the generator has seen.
A generator by class is asked for the diagnosis alone: of the rest of a cell it has only the quotas. Ids and seeds are
functions of (fingerprint, index), and each round of the plan is cut into numbered units, the grain of commit and of
retry. Letters: N rows, K cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from factory import records, taxonomy
from factory.prompts import Attributes, Surroundings, prompt_for
from factory.recipe import PlanSection
from factory.stages.quotas import Cell, quotas

Ints = NDArray[np.int64]
PART_ROWS = 65_536
UNIT_BYTES = 64 * 2**20
MIN_UNIT_ROWS, MAX_UNIT_ROWS = 64, 1024
MIN_UNITS = 8  # a small plan is still cut, so that a crash does not cost all of it
BYTES_PER_PIXEL = 2.2  # of a losslessly compressed image with its mask, measured on phantoms


class Look(NamedTuple):
    """What a lesion of the corpus looks like, in words."""

    asymmetry: str
    border: str
    colors: tuple[str, ...]
    surroundings: Surroundings = Surroundings()


def unit_rows(section: PlanSection, count: int | None = None) -> int:
    """Rows per unit: as many as 64 MiB hold, from 64 to 1024, and fewer in a plan of under eight such units. count: of
    the plan, where it is not the section's."""
    if section.unit_rows is not None:
        return section.unit_rows
    held = int(UNIT_BYTES / (BYTES_PER_PIXEL * section.size**2))
    rows = section.count if count is None else count
    return int(np.clip(min(held, rows // MIN_UNITS), MIN_UNIT_ROWS, MAX_UNIT_ROWS))


def looks_of(captions: Sequence[Mapping[str, Any]], banks: Sequence[str] = ("standard",)) -> dict[str, list[Look]]:
    """The looks that each diagnosis has in a corpus, from caption rows with their `diagnosis`, and for the extended
    bank with what else their corpus rows say."""
    whole = "extended" in banks
    looks: dict[str, list[Look]] = {}
    for row in captions:
        measured = Attributes(row["asymmetry"], row["border_irregularity"], tuple(row["colors"]))
        around = Surroundings.of(row, row["relative_diameter"]) if whole else Surroundings()
        look = Look(measured.asymmetry_level, measured.border_level, measured.colors, around)
        looks.setdefault(row["diagnosis"], []).append(look)
    return {diagnosis: sorted(found, key=repr) for diagnosis, found in looks.items()}


def plan_rows(
    section: PlanSection,
    fingerprint: str,
    looks: Mapping[str, Sequence[Look]],
    real: Mapping[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a plan of one round, in order of index. real: see `quotas`."""
    for part in plan_tables(section, fingerprint, quotas(section, real), looks):
        yield from part.to_pylist()


class Start(NamedTuple):
    """Where a round goes on: its number, and its first row's index and unit."""

    round: int = 0
    first_index: int = 0
    unit: int = 0


BEGINNING = Start()


def plan_tables(
    section: PlanSection,
    fingerprint: str,
    counts: Mapping[Cell, int],
    looks: Mapping[str, Sequence[Look]],
    start: Start = BEGINNING,
    retried: Mapping[Cell, Sequence[str]] | None = None,
) -> Iterator[pa.Table]:
    """The rows of one round under the plan's schema, in order of index and in parts of `PART_ROWS`. Cells are
    interleaved, so that every unit holds all that it can.

    counts: rows by cell; retried: ids of failed samples by cell, which as many of its first rows name as `retry_of`.
    """
    cells = [cell for cell, count in counts.items() if count]
    order = _order(np.array([counts[cell] for cell in cells]), section.balance)  # (N,) numbers of cells
    identifiers = records.sample_ids(fingerprint, range(start.first_index, start.first_index + len(order)))
    audits = _audits(section, identifiers, start.round)
    prompts = _Prompts(section, cells, looks)
    again = _first_rows(order, [list((retried or {}).get(cell, ())) for cell in cells])
    per_unit = unit_rows(section, len(order))
    for first in range(0, len(order), PART_ROWS):
        span = slice(first, min(first + PART_ROWS, len(order)))
        places = np.arange(span.start, span.stop)
        found, seeds = _planned(section, cells, order[span], prompts, identifiers[span])
        yield _table(
            found | {
                "sample_id": pa.array(identifiers[span]).cast(pa.string()),
                "unit": start.unit + places // per_unit, "index": start.first_index + places,
                "round": np.full(len(places), start.round), "seed": seeds,
                "retry_of": [again.get(place) for place in places.tolist()],
                "audit": audits[span],
            },
            len(places),
        )  # fmt: skip


def _planned(
    section: PlanSection, cells: Sequence[Cell], order: Ints, prompts: _Prompts, identifiers: NDArray[Any]
) -> tuple[dict[str, Any], Ints]:
    """What is asked of each row, and its seed."""
    same = {
        "generator": section.generator, "width": section.size, "height": section.size, "guidance": section.guidance,
        "num_inference_steps": section.num_inference_steps,
    }  # fmt: skip
    axes = {axis: [cell[number] for cell in cells] for number, axis in enumerate(section.axes())}
    found: dict[str, Any] = {name: pa.repeat(value, len(order)) for name, value in same.items()}
    found |= {axis: pa.array(words, pa.string()).take(pa.array(order)) for axis, words in axes.items()}
    found["prompt"], found["text_length"] = prompts.of(order, identifiers)
    return found, records.seeds_of(identifiers)


def _table(columns: Mapping[str, Any], rows: int) -> pa.Table:
    """Columns under the plan's schema; what is not given is null, and no row has parents yet."""
    nothing = pa.ListArray.from_arrays(np.zeros(rows + 1, dtype=np.int32), pa.array([], pa.string()))
    given = {"parents": nothing} | dict(columns)
    arrays = []
    for field in records.PLAN:
        column = given.get(field.name)
        known = column if isinstance(column, pa.Array) else pa.array(column) if column is not None else None
        arrays.append(pa.nulls(rows, field.type) if known is None else known.cast(field.type))
    return pa.Table.from_arrays(arrays, schema=records.PLAN)


def _order(counts: Ints, balance: str) -> Ints:
    """The cell of each row, (N,): in turns where an equal plan's cells differ by one at most, else each cell spread
    evenly over the whole plan. counts: (K,) rows of each cell."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    turns = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_turns = balance == "equal" and (not len(counts) or counts.max() - counts.min() <= 1)
    places = turns if in_turns else (turns + 0.5) / np.repeat(counts, counts)
    return numbers[np.lexsort((numbers, places))]


def _first_rows(order: Ints, retried: Sequence[Sequence[str]]) -> dict[int, str]:
    """Failed samples by the place of the row that is made in their stead: the first rows of their cell."""
    found: dict[int, str] = {}
    for number, failed in enumerate(retried):
        if failed:
            found |= dict(zip(np.flatnonzero(order == number).tolist(), failed, strict=False))
    return found


def _audits(section: PlanSection, identifiers: NDArray[Any], number: int) -> NDArray[np.bool_]:
    """The samples carried to the end ungated, (N,): those whose ids sort first, which is as good as a draw. The least
    number is the first round's; a further one adds the share of its own rows."""
    count = len(identifiers)
    wanted = min(count, max(section.audit_min if number == 0 else 0, round(section.audit_share * count)))
    chosen = np.zeros(count, dtype=bool)
    chosen[np.argsort(identifiers, kind="stable")[:wanted]] = True
    return chosen


class _Prompts:
    """Prompts of cells, each worded once for each look that is drawn."""

    def __init__(self, section: PlanSection, cells: Sequence[Cell], looks: Mapping[str, Sequence[Look]]) -> None:
        self.section, self.cells = section, cells
        numbers: dict[Look, int] = {}
        self.looks_of = {
            name: np.array([numbers.setdefault(look, len(numbers)) for look in looks.get(name, ())], dtype=np.int64)
            for name in sorted({cell[0] for cell in cells})
        }
        self.looks = list(numbers)
        self._known: dict[int, str] = {}

    def of(self, order: Ints, identifiers: NDArray[Any]) -> tuple[pa.Array, pa.Array]:
        """Prompts and their lengths in words, of rows whose cells are `order`, (N,); a look of the diagnosis is drawn
        by the sample's own id, and without any in the corpus the diagnosis alone is asked for."""
        drawn = np.full(len(order), -1, dtype=np.int64)
        if self.looks:
            seeds = records.seeds_of(identifiers, b"look")
            for number, cell in enumerate(self.cells):
                if len(known := self.looks_of[cell[0]]):
                    own = order == number
                    drawn[own] = known[seeds[own] % len(known)]
        keys, which = np.unique(order * (len(self.looks) + 1) + drawn + 1, return_inverse=True)
        texts = [self._worded(key) for key in keys.tolist()]
        lengths = np.array([len(text.split()) for text in texts], dtype=np.int32)
        return pa.array(texts, pa.string()).take(pa.array(which)), pa.array(lengths[which])

    def _worded(self, key: int) -> str:
        if key not in self._known:
            number, look = divmod(key, len(self.looks) + 1)
            self._known[key] = self._prompt(self.cells[number], self.looks[look - 1] if look else None)
        return self._known[key]

    def _prompt(self, cell: Cell, look: Look | None) -> str:
        named = dict(zip(self.section.axes(), cell, strict=True))
        diagnosis, skin_type = named["diagnosis"], named["skin_type"]
        if self.section.generator == "class_conditional":
            return diagnosis
        asked = {field: named[axis] for axis, field in (("site", "site"), ("lesion_size", "size")) if axis in named}
        bank, around = named.get("bank", self.section.bank), look.surroundings if look else Surroundings()
        around = replace(around, site=asked.get("site", around.site), size=asked.get("size", around.size))
        if look is None:
            return prompt_for(diagnosis, skin_type, bank=bank, surroundings=around)
        levels = (look.asymmetry, look.border, look.colors)
        return prompt_for(diagnosis, skin_type, *levels, bank=bank, surroundings=around)


def sample_rows(
    *,
    count: int,
    diagnosis: str,
    skin_type: str | None,
    asymmetry: str | None,
    border: str | None,
    colors: Sequence[str] | None,
    section: PlanSection,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows for `factory sample`: the same columns, for one wanted look and `count` seeds."""
    known = taxonomy.check(diagnosis, taxonomy.DIAGNOSES, "diagnosis")
    if section.generator == "class_conditional":
        prompt = _class_alone(known, skin_type=skin_type, asymmetry=asymmetry, border=border, colors=colors)
    else:
        prompt = prompt_for(known, skin_type, asymmetry, border, colors or None, bank=section.bank)
    fingerprint = records.digest("sample", prompt, section.size, section.guidance, section.num_inference_steps, seed)
    identifiers = [records.sample_id(fingerprint, index) for index in range(count)]
    return [
        {
            "sample_id": identifier, "unit": 0, "index": index, "round": 0, "retry_of": None,
            "generator": section.generator, "diagnosis": diagnosis, "skin_type": skin_type, "prompt": prompt,
            "text_length": len(prompt.split()), "mask": None, "parents": [], "seed": records.seed_of(identifier),
            "box": None, "width": section.size, "height": section.size, "guidance": section.guidance,
            "num_inference_steps": section.num_inference_steps, "audit": True,
        }
        for index, identifier in enumerate(identifiers)
    ]  # fmt: skip


def _class_alone(diagnosis: str, **look: object) -> str:
    """The prompt of a generator by class, which can be asked for nothing else."""
    given = [name for name, value in look.items() if value]
    if given:
        raise ValueError(
            f"{', '.join(given)} must be left out for a class_conditional generator, which is asked for a diagnosis "
            f"alone, got {look[given[0]]!r}; leave it out or set plan.generator."
        )
    return diagnosis
