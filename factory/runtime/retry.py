"""Failed samples, planned again as a further round: `factory synthesize --retry failed`. No Ray here.

A round of retries holds one row for every failed sample that none was planned for, of the same cell; `retry_of` says
which. It has an id and a seed of its own, so what a sample becomes still depends on its plan alone. The round is frozen
as any other, and one that was stopped goes on, by this command or by `factory plan`.
"""

from __future__ import annotations

from collections import Counter

import pyarrow.compute as pc

from factory import records
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime import plan as rounds
from factory.runtime.units import Echo


def failed_rows(run: Run) -> Counter[str]:
    """Failed samples that none was planned for again, by reason."""
    samples = run.table("samples")
    if not samples.sealed().counts.get(records.FAILED):
        return Counter()
    tried = {row for part in run.table("plan").batches(["retry_of"]) for row in part["retry_of"].to_pylist()}
    failed = samples.batches(["sample_id", "reason"], pc.field("outcome") == records.FAILED)
    return Counter(row["reason"] for part in failed for row in part.to_pylist() if row["sample_id"] not in tried)


def plan_failed(run: Run, recipe: Recipe, echo: Echo = print) -> bool:
    """Plans the failed samples again. False if there is none. A ValueError while other planned samples are not made."""
    run.table("plan").sealed()
    state = rounds.state_of(run)
    if not rounds.is_made(run, state):
        if not _is_retry(run):
            raise ValueError(
                f"--retry must come after all that is planned was made, got samples that are not; run `factory "
                f"synthesize --run {run.uri}` first."
            )
        return True  # planned by a command that was stopped
    failed = rounds.failed_of(run, recipe.plan)
    begun = rounds.round_begun(run, state.number)
    if not failed and begun is None:
        return False
    planned = begun or {cell: len(ids) for cell, ids in failed.items()}
    base = rounds.based_on(run, recipe, echo)
    rounds.carried_out(run, recipe.plan, base, rounds.Decision(state, planned, {}, {}, {}), echo)
    return True


def _is_retry(run: Run) -> bool:
    """Whether the last round that was planned is one of retries."""
    plan = run.table("plan")
    last = plan.read_part(len(plan.sealed().parts) - 1, ["retry_of"])
    return last["retry_of"].null_count == 0
