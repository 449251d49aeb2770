"""How full the sampler keeps its slots, with a generator that costs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from costless import Costless, GateByName

from factory.models.sampler import SampleJob, Sampler

SAMPLES, SLOTS, CALLS, UNIT = 1000, 16, 20, 64


def _jobs(denoiser: Costless) -> Iterator[SampleJob]:
    condition = denoiser.condition([""])[0]
    for number in range(SAMPLES):
        yield SampleJob(f"{number}", number, condition, 1.0, CALLS, unit=number // UNIT)


def _ran(rejected: float, drain: bool = False) -> tuple[Sampler, dict[str, int]]:
    """A run in which nine of ten rejected samples leave after call 7 of 20, and the others at the end."""
    denoiser, gate = Costless(), GateByName(rejected, early=0.9)
    sampler = Sampler(
        denoiser, width=1, height=1, slots=SLOTS, gate=gate, checkpoints=(0.3,), decode="none", drain=drain
    )  # type: ignore[arg-type]
    return sampler, {sampled.sample_id: sampled.calls_run for sampled in sampler.run(_jobs(denoiser))}


@pytest.mark.parametrize("rejected", [0.0, 0.35, 0.7])
def test_a_thousand_samples_keep_the_slots_full_until_the_last_ones_are_under_way(rejected: float) -> None:
    sampler, calls = _ran(rejected)
    spent = sampler.counters
    assert len(calls) == SAMPLES and set(calls.values()) <= {7, CALLS} and spent.rows_run == sum(calls.values())
    assert spent.rows_paid == spent.calls * SLOTS
    # A slot is empty only when there is nobody left to fill it: for less than one trajectory, at the very end.
    assert spent.rows_paid - spent.rows_run < SLOTS * CALLS
    assert spent.occupancy >= 0.97


def test_draining_between_units_costs_what_a_units_last_samples_leave_empty_and_changes_no_sample() -> None:
    filled, wanted = _ran(0.35)
    drained, calls = _ran(0.35, drain=True)
    assert calls == wanted
    assert 0.75 < drained.counters.occupancy < 0.95 < filled.counters.occupancy
