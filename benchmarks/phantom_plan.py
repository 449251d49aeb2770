"""What the benchmarks of the sampler draw: the starter, asked for the looks that phantoms have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from factory import phantom
from factory.models.denoiser import Denoiser
from factory.models.sampler import SampleJob
from factory.recipe import PlanSection
from factory.stages.plan import Look, plan_rows

PHANTOMS, SEED = 2000, 1  # the phantoms whose looks are asked for


def looks() -> dict[str, list[Look]]:
    """The looks of phantoms by diagnosis, as a corpus of their captions would give them."""
    found: dict[str, list[Look]] = {}
    for index in range(PHANTOMS):
        drawn = phantom.draw_attributes(SEED, index)
        asymmetry = phantom.level(drawn.asymmetry, phantom.ASYMMETRY_LEVELS)
        border = phantom.level(drawn.border_irregularity, phantom.BORDER_LEVELS)
        found.setdefault(drawn.diagnosis, []).append(Look(asymmetry, border, tuple(drawn.colors)))
    return found


def planned(name: str, count: int, steps: int) -> list[dict[str, Any]]:
    """The rows of an equal plan; plans of different names share no seed."""
    section = PlanSection(count=max(count, 18), num_inference_steps=steps, audit_share=0.0, audit_min=0)
    return list(plan_rows(section, name, looks()))[:count]


def jobs_of(denoiser: Denoiser, rows: Sequence[dict[str, Any]], ungated: bool = False) -> list[SampleJob]:
    """Rows as the sampler takes them, each prompt embedded once."""
    prompts = sorted({row["prompt"] for row in rows})
    known = dict(zip(prompts, denoiser.condition(prompts), strict=True))
    return [
        SampleJob(
            row["sample_id"], row["seed"], known[row["prompt"]], row["guidance"], row["num_inference_steps"],
            ungated=ungated,
        )
        for row in rows
    ]  # fmt: skip
