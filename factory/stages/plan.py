"""The plan: what each sample will be, decided before anything is made.

Quotas are equal over the cells (diagnosis, skin type); a sample's looks (asymmetry, border, colours) are drawn from
what its diagnosis looks like in the corpus's own captions, so that the prompts stay inside what the generator has
seen. Ids and seeds are functions of (plan fingerprint, index), and the plan is cut into numbered units, the grain of
commit and of retry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from factory import records, taxonomy
from factory.prompts import Attributes, Surroundings, prompt_for
from factory.recipe import PlanSection

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


def unit_rows(section: PlanSection) -> int:
    """Rows per unit: as many as 64 MiB hold, from 64 to 1024, and fewer in a plan of under eight such units."""
    if section.unit_rows is not None:
        return section.unit_rows
    held = int(UNIT_BYTES / (BYTES_PER_PIXEL * section.size**2))
    return int(np.clip(min(held, section.count // MIN_UNITS), MIN_UNIT_ROWS, MAX_UNIT_ROWS))


def quotas(section: PlanSection) -> dict[tuple[str, str], int]:
    """Samples per cell (diagnosis, skin type): equal, the remainder to the first cells."""
    cells = [(d, s) for d in section.diagnoses for s in section.skin_types]
    each, rest = divmod(section.count, len(cells))
    return {cell: each + (number < rest) for number, cell in enumerate(cells)}


def looks_of(captions: Sequence[Mapping[str, Any]], bank: str = "standard") -> dict[str, list[Look]]:
    """The looks that each diagnosis has in a corpus, from caption rows with their `diagnosis`, and for the extended
    bank with what else their corpus rows say."""
    whole = bank == "extended"
    looks: dict[str, list[Look]] = {}
    for row in captions:
        measured = Attributes(row["asymmetry"], row["border_irregularity"], tuple(row["colors"]))
        around = Surroundings.of(row, row["relative_diameter"]) if whole else Surroundings()
        look = Look(measured.asymmetry_level, measured.border_level, measured.colors, around)
        looks.setdefault(row["diagnosis"], []).append(look)
    return {diagnosis: sorted(found, key=repr) for diagnosis, found in looks.items()}


def plan_rows(section: PlanSection, fingerprint: str, looks: Mapping[str, Sequence[Look]]) -> Iterator[dict[str, Any]]:
    """The rows of the plan table, in order of index: cells are interleaved so that every unit holds all of them."""
    cells = _interleaved(quotas(section))
    audits = _audits(section, fingerprint, len(cells))
    per_unit = unit_rows(section)
    for index, (diagnosis, skin_type) in enumerate(cells):
        identifier = records.sample_id(fingerprint, index)
        prompt = _prompt(identifier, diagnosis, skin_type, looks, section.bank)
        yield {
            "sample_id": identifier, "unit": index // per_unit, "index": index, "round": 0, "retry_of": None,
            "generator": section.generator, "diagnosis": diagnosis, "skin_type": skin_type, "prompt": prompt,
            "text_length": len(prompt.split()), "mask": None, "parents": [], "seed": records.seed_of(identifier),
            "box": None, "width": section.size, "height": section.size, "guidance": section.guidance,
            "num_inference_steps": section.num_inference_steps, "audit": identifier in audits,
        }  # fmt: skip


def _interleaved(counts: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    rounds = max(counts.values())
    return [cell for turn in range(rounds) for cell, count in counts.items() if turn < count]


def _audits(section: PlanSection, fingerprint: str, count: int) -> frozenset[str]:
    """The samples carried to the end ungated: those whose ids sort first, which is as good as a draw."""
    wanted = min(count, max(section.audit_min, round(section.audit_share * count)))
    return frozenset(sorted(records.sample_id(fingerprint, index) for index in range(count))[:wanted])


def _prompt(identifier: str, diagnosis: str, skin_type: str, looks: Mapping[str, Sequence[Look]], bank: str) -> str:
    """A look of this diagnosis, drawn by the sample's own id; without any in the corpus, the diagnosis alone."""
    known = looks.get(diagnosis, ())
    if not known:
        return prompt_for(diagnosis, skin_type, bank=bank)
    look = known[records.seed_of(identifier + "look") % len(known)]
    return prompt_for(
        diagnosis, skin_type, look.asymmetry, look.border, look.colors, bank=bank, surroundings=look.surroundings
    )


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
