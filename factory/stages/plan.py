"""The plan: what each sample will be, decided before anything is made.

Quotas are equal over the cells (diagnosis, skin type), or lift every diagnosis to the largest one of the corpus's
training split (`plan.balance: largest`, DerMAE, arXiv 2602.19848), spread over the skin types. A sample's looks
(asymmetry, border, colours) are drawn from what its diagnosis looks like in the corpus's own captions, so that the
prompts stay inside what the generator has seen. A generator by class is asked for the diagnosis alone: of the skin
types it has only the quotas. Ids and seeds are functions of (plan fingerprint, index), and the plan is cut into
numbered units, the grain of commit and of retry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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


def unit_rows(section: PlanSection, count: int | None = None) -> int:
    """Rows per unit: as many as 64 MiB hold, from 64 to 1024, and fewer in a plan of under eight such units. count: of
    the plan, where it is not the section's."""
    if section.unit_rows is not None:
        return section.unit_rows
    held = int(UNIT_BYTES / (BYTES_PER_PIXEL * section.size**2))
    rows = section.count if count is None else count
    return int(np.clip(min(held, rows // MIN_UNITS), MIN_UNIT_ROWS, MAX_UNIT_ROWS))


def quotas(section: PlanSection, real: Mapping[str, int] | None = None) -> dict[tuple[str, str], int]:
    """Samples per cell (diagnosis, skin type): equal, the remainder to the first cells; or, for balance `largest`, as
    many per diagnosis as bring it to the largest of `real` (images of the training split by diagnosis)."""
    if section.balance == "largest":
        return _lifting(section, real or {})
    cells = [(d, s) for d in section.diagnoses for s in section.skin_types]
    each, rest = divmod(section.count, len(cells))
    return {cell: each + (number < rest) for number, cell in enumerate(cells)}


def _lifting(section: PlanSection, real: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """What every diagnosis lacks. A remainder goes to the skin types that the last one did not reach, so that their
    totals, too, differ by one at most."""
    missing = [diagnosis for diagnosis in section.diagnoses if not real.get(diagnosis)]
    if missing:
        raise ValueError(
            f"plan.diagnoses must be in the corpus's training split for plan.balance largest, got none of "
            f"{', '.join(missing)}; ingest some or leave it out."
        )
    lacking = {diagnosis: max(real.values()) - real[diagnosis] for diagnosis in section.diagnoses}
    if not any(lacking.values()):
        raise ValueError(
            f"plan.balance largest must have a class to lift, got {max(real.values())} images of each of "
            f"{', '.join(section.diagnoses)}; choose equal and a count."
        )
    types, turn = section.skin_types, 0
    found: dict[tuple[str, str], int] = {}
    for diagnosis, count in lacking.items():
        each, rest = divmod(count, len(types))
        more = {types[(turn + step) % len(types)] for step in range(rest)}
        found |= {(diagnosis, skin_type): each + (skin_type in more) for skin_type in types}
        turn += rest
    return found


def class_counts(corpus: pa.Table) -> dict[str, int]:
    """Accepted training images by diagnosis, of those that can be generated. corpus: with its `diagnosis`, `split` and
    `outcome`."""
    kept = pc.and_(pc.equal(corpus["split"], "train"), pc.equal(corpus["outcome"], records.ACCEPTED))
    found = corpus.filter(kept)["diagnosis"].value_counts().to_pylist()
    counts = {row["values"]: row["counts"] for row in found}
    return {name: counts[name] for name in taxonomy.DIAGNOSES if name in counts}


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


def plan_rows(
    section: PlanSection,
    fingerprint: str,
    looks: Mapping[str, Sequence[Look]],
    real: Mapping[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of the plan table, in order of index: cells are interleaved so that every unit holds all of them.
    real: see `quotas`."""
    counts = quotas(section, real)
    cells = _interleaved(counts) if section.balance == "equal" else _proportional(counts)
    audits = _audits(section, fingerprint, len(cells))
    per_unit = unit_rows(section, len(cells))
    for index, (diagnosis, skin_type) in enumerate(cells):
        identifier = records.sample_id(fingerprint, index)
        by_class = section.generator == "class_conditional"
        prompt = diagnosis if by_class else _prompt(identifier, diagnosis, skin_type, looks, section.bank)
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


def _proportional(counts: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Cells of very different counts, each spread evenly over the whole plan."""
    places = [((turn + 0.5) / count, number, cell) for number, (cell, count) in enumerate(counts.items())
              for turn in range(count)]  # fmt: skip
    return [cell for _, _, cell in sorted(places)]


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
