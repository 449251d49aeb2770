"""Quotas: how many samples each cell gets, how many must be made for as many to be accepted, and what is still short.

A cell is a diagnosis and a skin type, and a site and a lesion size where the plan names those: a tuple of words in
the order of `PlanSection.axes()`. Quotas follow `plan.balance`:

    equal           the same for every cell, the remainder to the first ones
    largest         what lifts every diagnosis to the largest of the training split (DerMAE, arXiv 2602.19848)
    prevalence      in proportion to the training images n of each cell
    square_root     in proportion to sqrt(n) (Mahajan et al. 2018, ECCV)
    false_negative  in proportion to how often a classifier misses the diagnosis, evenly over its cells
    explicit        as `plan.cells` says

A quota is cut to `plan.max_ratio` times the real images of its cell, where there are any. Over-generation plans
quota / acceptance, by the lower bound of Wilson's interval (1927, JASA 22), so that one round most often suffices.
All of it is pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from factory import records, taxonomy
from factory.prompts import SIZE_LEVELS
from factory.quality.statistics import wilson
from factory.recipe import PlanSection

Cell = tuple[str, ...]
MIN_TRIALS = 20  # samples of a cell; below, the acceptance that is expected anyway makes up for what is missing
GROWTH = 4  # times what a cell was asked or tried for: the most that one round adds to it
WARN_RATIO = 4.0  # of synthetic to real; DiffAug measures no gain beyond three


class Tally(NamedTuple):
    """What became of a cell's samples."""

    made: int = 0
    accepted: int = 0


class Round(NamedTuple):
    """What a round plans. impossible: cells that are short and are not tried again; cut: rows that `max_samples` left
    out; short: what every cell lacks."""

    planned: dict[Cell, int]
    impossible: dict[Cell, Tally]
    cut: int
    short: dict[Cell, int]


def cells_of(section: PlanSection) -> list[Cell]:
    """Every cell, the last axis changing fastest."""
    return list(itertools.product(*section.axes().values()))


def quotas(
    section: PlanSection,
    real: Mapping[str, int] | None = None,
    counts: Mapping[Cell, int] | None = None,
    rates: Mapping[str, float] | None = None,
) -> dict[Cell, int]:
    """Accepted samples wanted of each cell, before the cap; cells of none are left out, but for an equal plan.

    real: training images by diagnosis (largest); counts: by cell (square_root, prevalence); rates: of false negatives
    by diagnosis. Raises ValueError where they do not say what is needed.
    """
    cells = cells_of(section)
    if section.balance == "largest":
        return _lifting(section, real or {})
    if section.balance == "equal":
        each, rest = divmod(section.count, len(cells))
        return {cell: each + (number < rest) for number, cell in enumerate(cells)}
    if section.balance == "explicit":
        found = {cell: section.cells.get("/".join(cell), 0) for cell in cells}
    else:
        found = apportion(section.count, dict(zip(cells, _weights(section, counts or {}, rates or {}), strict=True)))
    return {cell: count for cell, count in found.items() if count}


def _weights(section: PlanSection, counts: Mapping[Cell, int], rates: Mapping[str, float]) -> list[float]:
    cells = cells_of(section)
    if section.balance == "false_negative":
        missing = [name for name in section.diagnoses if name not in rates]
        if missing or not any(rates[name] for name in section.diagnoses):
            got = f"none of {', '.join(missing)}" if missing else "0 of each"
            raise ValueError(
                f"plan.false_negative_rates must hold a rate of every diagnosis and one above 0, got {got}; measure "
                "them, or leave the diagnosis out of plan.diagnoses."
            )
        return [rates[cell[0]] for cell in cells]
    weights = [float(counts.get(cell, 0)) for cell in cells]
    if not any(weights):
        raise ValueError(
            f"plan.balance {section.balance} must have training images of the planned cells, got none; ingest some or "
            "choose equal."
        )
    return [math.sqrt(weight) for weight in weights] if section.balance == "square_root" else weights


def apportion(count: int, weights: Mapping[Cell, float]) -> dict[Cell, int]:
    """Whole numbers in proportion to the weights that sum to `count`: the largest remainders get what is left over
    (Hamilton's method), the first of equal ones first."""
    total = math.fsum(weights.values())
    exact = {cell: count * weight / total for cell, weight in weights.items()}
    found = {cell: math.floor(share) for cell, share in exact.items()}
    left = count - sum(found.values())
    for cell in sorted(exact, key=lambda cell: round(found[cell] - exact[cell], 9))[:left]:
        found[cell] += 1
    return found


def _lifting(section: PlanSection, real: Mapping[str, int]) -> dict[Cell, int]:
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
    types, turn = list(itertools.product(*list(section.axes().values())[1:])), 0
    found: dict[Cell, int] = {}
    for diagnosis, count in lacking.items():
        each, rest = divmod(count, len(types))
        more = {types[(turn + step) % len(types)] for step in range(rest)}
        found |= {(diagnosis, *rest_of): each + (rest_of in more) for rest_of in types}
        turn += rest
    return found


def capped(wanted: Mapping[Cell, int], counts: Mapping[Cell, int], max_ratio: float | None) -> dict[Cell, int]:
    """Quotas of at most `max_ratio` synthetic samples to each real image, in the cells that hold any; None: as they
    are."""
    if max_ratio is None:
        return dict(wanted)
    return {
        cell: min(count, math.floor(max_ratio * counts[cell])) if counts.get(cell) else count
        for cell, count in wanted.items()
    }


# ------------------------------------------------------------------------------------------------------ the corpus


def class_counts(corpus: pa.Table) -> dict[str, int]:
    """Accepted training images by diagnosis, of those that can be generated. corpus: with its `diagnosis`, `split` and
    `outcome`."""
    found = corpus.filter(records.accepted("train"))["diagnosis"].value_counts().to_pylist()
    counts = {row["values"]: row["counts"] for row in found}
    return {name: counts[name] for name in taxonomy.DIAGNOSES if name in counts}


def cell_counts(corpus: pa.Table, section: PlanSection) -> tuple[dict[Cell, int], int]:
    """Accepted training images by cell, and how many of them are counted by their diagnosis alone.

    corpus: `diagnosis, skin_type, skin_type_scale, ita, site, split, outcome`, and `relative_diameter` for lesion
    sizes. An image whose skin type, site or size nobody knows is shared out over its diagnosis's cells in proportion to
    those that are known, evenly where none is. One of a word that the plan does not name is in no cell.
    """
    if section.banks:
        return _shared_by_banks(*cell_counts(corpus, section.model_copy(update={"banks": []})), section.banks)
    train, axes = corpus.filter(records.accepted("train")), section.axes()
    columns = {"diagnosis": train["diagnosis"], "skin_type": _skin_types(train)}
    if "site" in axes:
        columns["site"] = train["site"]
    if "lesion_size" in axes:
        columns["lesion_size"] = _lesion_sizes(train)
    counts, unknown = dict.fromkeys(cells_of(section), 0), dict.fromkeys(section.diagnoses, 0)
    for cell, count in counted(pa.table(columns), [*axes]).items():
        if cell in counts:
            counts[cell] += count
        elif cell[0] in unknown and None in cell and _may_be_asked(cell, axes):
            unknown[cell[0]] += count
    for diagnosis, count in unknown.items():
        own: dict[Cell, float] = {cell: number for cell, number in counts.items() if cell[0] == diagnosis}
        shares = own if any(own.values()) else dict.fromkeys(own, 1.0)
        for cell, more in apportion(count, shares).items():
            counts[cell] += more
    return counts, sum(unknown.values())


def _shared_by_banks(counts: Mapping[Cell, int], unknown: int, banks: Sequence[str]) -> tuple[dict[Cell, int], int]:
    """A bank is of a prompt and not of an image: the images of a cell count for its banks in equal shares."""
    found: dict[Cell, int] = {}
    for cell, count in counts.items():
        each, rest = divmod(count, len(banks))
        found |= {(*cell, bank): each + (number < rest) for number, bank in enumerate(banks)}
    return found, unknown


def counted(rows: pa.Table, columns: Sequence[str]) -> dict[tuple[Any, ...], int]:
    """Rows by the values of some columns."""
    found = rows.select(columns).group_by(columns).aggregate([([], "count_all")]).to_pylist()
    return {tuple(row[name] for name in columns): row["count_all"] for row in found}


def _may_be_asked(cell: tuple[str | None, ...], axes: Mapping[str, list[str]]) -> bool:
    return all(word is None or word in words for word, words in zip(cell, axes.values(), strict=True))


def _skin_types(rows: pa.Table) -> pa.Array:
    """`taxonomy.fitzpatrick` of many rows."""
    ita = rows["ita"].to_numpy(zero_copy_only=False).astype(np.float64)
    below = (ita[:, None] <= np.asarray(taxonomy.ITA_BOUNDS)).sum(axis=1)
    measured = pa.array(np.asarray(taxonomy.SKIN_TYPES, dtype=object)[below], pa.string(), mask=np.isnan(ita))
    stated = pc.fill_null(pc.is_in(rows["skin_type_scale"], pa.array(taxonomy.FITZPATRICK_SCALES)), False)
    stated = pc.and_(stated, pc.is_valid(rows["skin_type"]))
    return pc.if_else(stated, rows["skin_type"], pa.chunked_array([measured]))


def _lesion_sizes(rows: pa.Table) -> pa.Array:
    share = rows["relative_diameter"].to_numpy(zero_copy_only=False).astype(np.float64)
    level = (share[:, None] >= np.asarray(SIZE_LEVELS)).sum(axis=1)
    return pa.array(np.asarray(taxonomy.LESION_SIZES, dtype=object)[level], pa.string(), mask=np.isnan(share))


# ------------------------------------------------------------------------------------------------------ acceptance


def tallied(batches: Iterable[pa.Table], axes: Iterable[str]) -> dict[Cell, Tally]:
    """Samples made and accepted by cell. batches: of a samples table, with the axes' columns and `outcome`."""
    names, found = list(axes), dict[Cell, Tally]()
    for batch in batches:
        for (*words, outcome), count in counted(batch, [*names, "outcome"]).items():
            cell = tuple(words)
            made, accepted = found.get(cell, Tally())
            found[cell] = Tally(made + count, accepted + count * (outcome == records.ACCEPTED))
    return found


def expected(tally: Tally, prior: float) -> float:
    """The acceptance that is most likely: as measured, or what is expected of a cell that nothing is known of."""
    return tally.accepted / tally.made if tally.made else prior


def surely(tally: Tally, prior: float) -> float:
    """The acceptance to plan with: Wilson's lower bound, in which the prior fills up what is missing to `MIN_TRIALS`;
    where nothing is known, the prior itself."""
    if not tally.made:
        return prior
    missing = max(0, MIN_TRIALS - tally.made)
    return wilson(tally.accepted + round(prior * missing), tally.made + missing).low


def is_impossible(tally: Tally, min_acceptance: float) -> bool:
    """Whether a cell's acceptance is below the least with confidence: the upper bound of its interval is."""
    return tally.made >= MIN_TRIALS and wilson(tally.accepted, tally.made).high < min_acceptance


def rows_for(wanted: int, tally: Tally, section: PlanSection) -> int:
    """Samples to plan for `wanted` accepted ones: wanted / acceptance, and at most `GROWTH` times what the cell was
    asked or tried for, so that few trials cost little."""
    if not section.overgenerate or wanted <= 0:
        return max(0, wanted)
    rate = max(surely(tally, section.acceptance), section.min_acceptance)
    return min(math.ceil(round(wanted / rate, 6)), GROWTH * max(wanted, tally.made))


def next_round(
    section: PlanSection, wanted: Mapping[Cell, int], own: Mapping[Cell, Tally], known: Mapping[Cell, Tally], rows: int
) -> Round:
    """What to plan, given the quotas, what became of the samples of this run, `own`, what is `known` of acceptance
    (the same, or another run's), and the rows that this run has planned so far."""
    short = {cell: max(0, count - own.get(cell, Tally()).accepted) for cell, count in wanted.items()}
    tallies = {cell: known.get(cell, Tally()) for cell in short}
    impossible = {
        cell: tallies[cell] for cell, count in short.items()
        if count and is_impossible(tallies[cell], section.min_acceptance)
    }  # fmt: skip
    planned = {
        cell: rows_for(count, tallies[cell], section)
        for cell, count in short.items()
        if count and cell not in impossible
    }
    total = sum(planned.values())
    left = total if section.max_samples is None else max(0, section.max_samples - rows)
    if total > left:
        planned = apportion(left, {cell: float(count) for cell, count in planned.items()})
    return Round(planned, impossible, max(0, total - left), short)
