"""The plan of a run: its first round, and a further one for what is short once the last one's samples are made.

    RUN/.parts/plan/_ROUND-1.json   what round 1 plans of each cell, put in place before its first part

A round's rows are a function of that file and of the recipe's plan, so a round that was stopped goes on as it was
decided, and raising a budget refuses nothing. Budgets, acceptance and prices are therefore no part of the table's
fingerprint; the ids of a round say what it holds by hashing the file. No Ray here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from factory import records, taxonomy
from factory.fingerprint import fingerprint_of
from factory.parts import canonical_json
from factory.recipe import PlanSection, Recipe
from factory.run import Run
from factory.runtime import backgrounds
from factory.runtime.plan_cost import Estimate, described, ratios
from factory.runtime.units import Echo
from factory.stages import plan as planning
from factory.stages import quotas
from factory.stages.quotas import Cell, Tally

# Of the plan's fields: those that its rounds freeze for themselves, and those that count only where they are used, so
# that a plan keeps the ids it had before there were any.
_NO_IDENTITY = {
    "overgenerate", "acceptance", "acceptance_from", "min_acceptance", "max_rounds", "max_samples", "images_per_s",
    "price_per_gpu_hour", "false_negative_rates",
}  # fmt: skip
_WHERE_USED = {"cells", "max_ratio", "sites", "lesion_sizes", "banks"}
_CORPUS = ["diagnosis", "split", "outcome", "skin_type", "skin_type_scale", "ita", "site"]


class Targets(NamedTuple):
    """What is wanted of each cell, before and after the cap, beside the real images there are; unplaced: of those,
    images that are counted by their diagnosis alone; needs: whether the quotas depend on the corpus; rates: digest of
    the file of rates."""

    asked: dict[Cell, int]
    wanted: dict[Cell, int]
    real: dict[Cell, int]
    unplaced: int
    needs: bool
    rates: str | None


class State(NamedTuple):
    """How far a run's plan has come. number: of the next round, or of one that was begun and is not sealed."""

    number: int
    rows: int
    parts: int
    unit: int


class Base(NamedTuple):
    """What the rounds of a plan share: looks by diagnosis, the names of the parents, what is wanted."""

    looks: dict[str, list[planning.Look]]
    parents: list[str]
    found: Targets
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class Decision:
    """What a round is to hold, and why no more. made: whether it could be decided at all; `why` says it otherwise."""

    state: State
    planned: dict[Cell, int]
    own: dict[Cell, Tally]
    known: dict[Cell, Tally]
    impossible: dict[Cell, Tally]
    why: str = ""
    cut: int = 0


def plan(run: Run, recipe: Recipe, echo: Echo = print, estimate: Estimate | None = None) -> None:
    """Plans the first round, or the next one that is due, and seals the table. With `estimate` the cells and their cost
    are told first."""
    base = based_on(run, recipe, echo)
    decision = decided(run, recipe.plan, base.found.wanted)
    for text in _told(recipe.plan, base.found, decision, estimate):
        echo(text)
    carried_out(run, recipe.plan, base, decision, echo)


def based_on(run: Run, recipe: Recipe, echo: Echo = print) -> Base:
    """What a run's plan is made of; refused where its rounds so far were made of something else."""
    section = recipe.plan
    looks, parents = looks_in(run, section)
    if section.generator == "inpaint":
        backgrounds.find(run, recipe, echo)
        parents = parents | {"backgrounds": run.table("backgrounds").origin()}
    found = targets(run, section)
    if found.needs:
        parents = parents | {"corpus": run.table("corpus").origin()}
    fingerprint = _fingerprint(recipe, parents, found)
    run.table("plan").require_if_begun(fingerprint)
    return Base(looks, [*parents], found, fingerprint)


def carried_out(run: Run, section: PlanSection, base: Base, decision: Decision, echo: Echo = print) -> None:
    """Commits the round that was decided, if there is any, and seals the table."""
    table = run.table("plan")
    manifest = table.manifest()
    if manifest is not None and not decision.planned:  # sealed again: a parent may have had a further round
        parts = len(manifest.parts)
    else:
        table.require(base.fingerprint)
        parts = _commit(run, section, base.fingerprint, _frozen(run, decision), base.looks)
    table.seal(parts, base.fingerprint, {name: run.table(name).digest() for name in base.parents})
    echo(_summary(run, section, decision))


def preview(run: Run, recipe: Recipe, estimate: Estimate, echo: Echo = print) -> None:
    """What `plan` would plan, and its cost. Writes nothing."""
    found = targets(run, recipe.plan)
    decision = decided(run, recipe.plan, found.wanted)
    for text in _told(recipe.plan, found, decision, estimate):
        echo(text)
    echo(f"plan        {sum(decision.planned.values())} rows would be planned as round {decision.state.number}")


# ------------------------------------------------------------------------------------------------------ what is wanted


def targets(run: Run, section: PlanSection) -> Targets:
    """The quotas of a run's plan. The corpus is read where there is a sealed one, or where they depend on it."""
    by_corpus = section.balance in ("largest", "square_root", "prevalence")
    there = run.table("corpus")
    has = by_corpus or bool(there.parts() if section.max_ratio is not None else there.manifest())
    rates, digest = _rates(run, section)
    real, counts, unplaced = dict[str, int](), dict[Cell, int](), 0
    if has:
        corpus = _corpus(run, section)
        real = quotas.class_counts(corpus)
        counts, unplaced = quotas.cell_counts(corpus, section)
    asked = quotas.quotas(section, real, counts, rates)
    wanted = quotas.capped(asked, counts, section.max_ratio)
    return Targets(asked, wanted, counts, unplaced, has and (by_corpus or section.max_ratio is not None), digest)


def _corpus(run: Run, section: PlanSection) -> pa.Table:
    """What the quotas are counted from; with lesion sizes, so far as there are captions that measured them."""
    wants_sizes = bool(section.lesion_sizes)
    corpus = run.table("corpus").read(_CORPUS + ["record_id"] * wants_sizes)
    if not wants_sizes:
        return corpus
    if run.table("captions").parts():
        measured = run.table("captions").read(["record_id", "relative_diameter"])
        return corpus.join(measured, "record_id", join_type="left outer")
    return corpus.append_column("relative_diameter", pa.nulls(len(corpus), pa.float32()))


def _rates(run: Run, section: PlanSection) -> tuple[dict[str, float], str | None]:
    """Rates of false negatives by diagnosis, and the digest of their file."""
    path = section.false_negative_rates
    if path is None:
        return {}, None
    try:
        data = (
            run.store.read(path)
            if not Path(path).is_absolute() and run.store.exists(path)
            else (Path(path).expanduser().read_bytes())
        )
        content = json.loads(data)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"plan.false_negative_rates must be a JSON file, here or in the run, got {path} ({error}); correct it."
        ) from error
    return read_rates(content), records.digest(json.dumps(read_rates(content), sort_keys=True))


def read_rates(content: object) -> dict[str, float]:
    """Rates by diagnosis: `{"melanoma": 0.2}`, or `{"false_negative_rate": {"melanoma": {"value": 0.2, ...}}}` as a
    result in lab/ has them (`mean` or `value`). Other words, and numbers that are no rate, are a ValueError."""
    if isinstance(content, dict) and "false_negative_rate" in content:
        content = content["false_negative_rate"]
    if not isinstance(content, dict) or not content:
        raise ValueError("plan.false_negative_rates must hold a rate by diagnosis, got none; see the README.")
    found = {}
    for name, value in content.items():
        taxonomy.check(name, taxonomy.DIAGNOSES, "plan.false_negative_rates")
        rate = value.get("mean", value.get("value")) if isinstance(value, dict) else value
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(
                f"plan.false_negative_rates must be rates from 0 to 1, got {rate!r} for {name}; correct the file."
            )
        found[name] = float(rate)
    return found


def looks_in(run: Run, section: PlanSection) -> tuple[dict[str, list[planning.Look]], dict[str, str]]:
    """The looks of each diagnosis in the run's captions, and the tables they come from (none without captions, or for
    a generator by class)."""
    captions, corpus = run.table("captions"), run.table("corpus")
    if section.generator == "class_conditional" or not captions.parts():
        return {}, {}
    captions.sealed()  # half of the captions would plan other samples than all of them
    light = ["record_id", "diagnosis", "site", "modality", "vignette", "black_border", "split", "outcome"]
    of = {
        row["record_id"]: row
        for part in corpus.batches(light)
        for row in part.to_pylist()
        if row["outcome"] == records.ACCEPTED and row["split"] == "train" and row["diagnosis"] is not None
    }
    measured = ["record_id", "asymmetry", "border_irregularity", "colors", "relative_diameter", "outcome"]
    known = [
        of[row["record_id"]] | row
        for part in captions.batches(measured)
        for row in part.to_pylist()
        if row["outcome"] == records.ACCEPTED and row["asymmetry"] is not None and row["record_id"] in of
    ]
    return planning.looks_of(known, section.banks or [section.bank]), {"captions": captions.origin()}


def _fingerprint(recipe: Recipe, parents: Mapping[str, str], found: Targets) -> dict[str, str]:
    section, fields = recipe.plan, PlanSection.model_fields
    known = fingerprint_of(recipe, "plan", parents, {})
    unread = _NO_IDENTITY | {
        name for name in _WHERE_USED if getattr(section, name) == fields[name].get_default(call_default_factory=True)
    }
    unread |= {"balance"} if section.balance == "equal" else set()
    unread |= {"count"} if section.balance in ("largest", "explicit") else set()
    if not found.needs:
        unread.add("max_ratio")  # nothing was there to be capped by
    known = {name: value for name, value in known.items() if name.removeprefix("plan.") not in unread}
    return known | ({"plan.false_negative_rates": found.rates} if found.rates else {})


# ------------------------------------------------------------------------------------------------------ the round


def decided(run: Run, section: PlanSection, wanted: Mapping[Cell, int]) -> Decision:
    """The next round of a run: what was frozen for it, if it was begun; else what its samples and budgets say."""
    state = state_of(run)
    frozen = round_begun(run, state.number)
    prior = state.number > 0
    own = _tallies(run, section) if prior else {}
    known = own if prior or section.acceptance_from is None else _tallies(Run(section.acceptance_from), section)
    if frozen is not None:
        return Decision(state, frozen, own, known, {})
    found = quotas.next_round(section, wanted, own, known, state.rows)
    decision = partial(Decision, state, own=own, known=known, impossible=found.impossible, cut=found.cut)
    if prior and not any(found.short.values()):
        return decision({}, why="every quota is met")
    if prior and section.max_rounds is not None and state.number >= section.max_rounds:
        return decision({}, why=f"plan.max_rounds ({section.max_rounds}) is spent" if section.max_rounds > 1 else "")
    if prior and not is_made(run, state):
        return decision({}, why="the last round is planned and not made; run `factory synthesize`")
    if not found.planned and found.impossible:
        return decision({}, why="what is short cannot be made")
    if not sum(found.planned.values()):
        return decision({}, why=f"plan.max_samples ({section.max_samples}) is spent")
    return decision(found.planned)


def state_of(run: Run) -> State:
    """How far a run's plan goes; zeros where it has none."""
    manifest = run.table("plan").manifest()
    if manifest is None:
        return State(0, 0, 0, 0)
    last = run.table("plan").read_part(len(manifest.parts) - 1, ["round", "unit"])
    return State(
        pc.max(last["round"]).as_py() + 1, manifest.rows, len(manifest.parts), pc.max(last["unit"]).as_py() + 1
    )


def is_made(run: Run, state: State) -> bool:
    """Whether all planned samples are sealed."""
    samples = run.table("samples").manifest()
    return samples is not None and samples.rows == state.rows


def _tallies(run: Run, section: PlanSection) -> dict[Cell, Tally]:
    if run.table("samples").manifest() is None:
        return {}
    axes = [*section.axes()]
    return quotas.tallied(run.table("samples").batches([*axes, "outcome"]), axes)


def _round_path(number: int) -> str:
    return f".parts/plan/_ROUND-{number}.json"


def round_begun(run: Run, number: int) -> dict[Cell, int] | None:
    """Samples by cell that round `number` froze; None if it was not begun."""
    path = _round_path(number)
    if not run.store.exists(path):
        return None
    return {tuple(cell): int(count) for cell, count in json.loads(run.store.read(path))["planned"]}


def _frozen(run: Run, decision: Decision) -> Decision:
    """The decision as it was first put in place: a second driver finds its own refused and takes the first one's."""
    planned = [[list(cell), count] for cell, count in decision.planned.items() if count]
    if not planned:
        raise ValueError(
            f"plan must hold at least one sample, got none: {decision.why or 'every quota is 0'}; raise "
            "plan.max_ratio, plan.max_samples or the quotas."
        )
    number = decision.state.number
    run.store.put_if_absent(_round_path(number), canonical_json({"round": number, "planned": planned}))
    first = round_begun(run, number) or decision.planned
    return Decision(decision.state, first, decision.own, decision.known, decision.impossible)


def _commit(
    run: Run, section: PlanSection, fingerprint: Mapping[str, str], decision: Decision, looks: dict[str, Any]
) -> int:
    """Puts the round's parts in place, one in memory at a time. Returns how many parts the table then has."""
    table, state = run.table("plan"), decision.state
    named_by = {name: value for name, value in fingerprint.items() if name != "plan.unit_rows"}
    name = records.digest(json.dumps(named_by, sort_keys=True))
    if state.number or section.overgenerate or section.max_samples is not None:
        name = records.digest(name, state.number, json.dumps(list(decision.planned.items())))
    start = planning.Start(state.number, state.rows, state.unit)
    retried = failed_of(run, section) if state.number else {}
    lay_under = backgrounds.layer(run, decision.planned) if section.generator == "inpaint" else None
    there, parts = set(table.parts()), state.parts
    for rows in planning.plan_tables(section, name, decision.planned, looks, start, retried):
        if parts not in there:
            if lay_under is not None:
                rows = records.rows_to_table("plan", lay_under(rows.to_pylist()))
            table.commit(parts, rows, row_group_by="unit")
        parts += 1
    return parts


def failed_of(run: Run, section: PlanSection) -> dict[Cell, list[str]]:
    """Ids of failed samples by cell that no row was planned for again."""
    axes = [*section.axes()]
    tried = {row for part in run.table("plan").batches(["retry_of"]) for row in part["retry_of"].to_pylist()}
    found: dict[Cell, list[str]] = {}
    failed = pc.field("outcome") == records.FAILED
    for part in run.table("samples").batches([*axes, "sample_id"], failed):
        for row in part.to_pylist():
            if row["sample_id"] not in tried:
                found.setdefault(tuple(row[axis] for axis in axes), []).append(row["sample_id"])
    return found


# ------------------------------------------------------------------------------------------------------ sentences


def _told(section: PlanSection, found: Targets, decision: Decision, estimate: Estimate | None) -> Iterator[str]:
    """What was lost on the way, cell by cell, and with an estimate the whole table."""
    if estimate is not None:
        tallies = (decision.own, decision.known)
        yield from described(section, found.real, found.wanted, decision.planned, tallies, estimate)
        if found.unplaced:
            yield f"counted     {found.unplaced} training images by their diagnosis alone, shared out over its cells"
        yield from ratios(found.wanted, found.real)
    for cell, count in found.asked.items():
        if found.wanted[cell] < count:
            yield (
                f"capped      {'/'.join(cell)} from {count} to {found.wanted[cell]}: {section.max_ratio:g} for each of "
                f"{found.real[cell]} real images"
            )
    if decision.cut:
        yield f"cut         {decision.cut} rows, by plan.max_samples {section.max_samples}"
    for cell, tally in decision.impossible.items():
        yield (
            f"impossible  {'/'.join(cell)}: {tally.accepted} of {tally.made} accepted "
            f"({tally.accepted / tally.made:.1%}), surely below plan.min_acceptance "
            f"{section.min_acceptance:g}; it is planned no more"
        )
    if decision.why:
        short = sum(max(0, count - decision.own.get(cell, Tally()).accepted) for cell, count in found.wanted.items())
        yield f"rounds      no further one: {decision.why}; {short} accepted samples are short"


def _summary(run: Run, section: PlanSection, decision: Decision) -> str:
    table, state = run.table("plan"), decision.state
    if state.number and decision.planned:
        rows, cells = table.sealed().rows - state.rows, sum(map(bool, decision.planned.values()))
        units = state_of(run).unit - state.unit
        return f"plan        round {state.number}: {rows} rows in {units} units over {cells} cells"
    axes = [*section.axes()]
    found = {cell for part in table.batches(axes) for cell in quotas.counted(part, axes)}
    return f"plan        {table.sealed().rows} rows in {state_of(run).unit} units over {len(found)} cells"
