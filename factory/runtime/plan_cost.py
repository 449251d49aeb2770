"""What a plan costs: images per second as they were measured, hours, GPU-hours and money, cell by cell.

The rate is an actor's: rows over seconds and actors of what `factory synthesize` did in this run, starts included, else
`plan.images_per_s`. An estimate decides nothing.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from factory.recipe import PlanSection, Recipe
from factory.run import Run, read_events
from factory.runtime.cluster import Pools, Resources, connect, pools, resources, resources_of_yaml
from factory.stages.quotas import WARN_RATIO, Cell, Tally, expected

MADE = "made"  # the event that says how long how many rows took on how many actors


@dataclass(frozen=True)
class Estimate:
    """The cost of rows. images_per_s: of one actor, None where nobody knows; source: where it comes from; price: of a
    GPU-hour."""

    images_per_s: float | None
    source: str
    actors: int
    gpus: float
    price: float | None = None

    def hours(self, rows: int) -> float | None:
        """Hours of the whole pool for `rows`."""
        return None if self.images_per_s is None else rows / (self.images_per_s * self.actors) / 3600

    def line(self, rows: int) -> str:
        """The cost of a plan in one sentence."""
        hours, on = self.hours(rows), f"{self.actors} actor(s), {self.gpus:g} GPU(s)"
        if hours is None or self.images_per_s is None:
            return f"cost        of {rows} images unknown on {on}: nothing is measured yet; say plan.images_per_s"
        gpu_hours = hours * self.gpus
        money = "" if self.price is None else f", {gpu_hours * self.price:,.2f} at {self.price:g} per GPU-hour"
        rate = f"{self.images_per_s * self.actors:.3g} images/s {self.source}"
        return f"cost        {rows} images at {rate} on {on}: {hours:.2f} h, {gpu_hours:.2f} GPU-hours{money}"


def estimate(run: Run, recipe: Recipe, cluster: str | None = None) -> Estimate:
    """Of a run on a cluster's YAML, else on the cluster of `RAY_ADDRESS`, else on this machine."""
    sized: Pools = pools(here() if cluster is None else resources_of_yaml(cluster), recipe)
    rate, source = measured(run), "measured in this run"
    if rate is None:
        rate, source = recipe.plan.images_per_s, "by plan.images_per_s"
    gpus = sized.synthesize * sized.gpus_per_actor
    return Estimate(rate, source, sized.synthesize, gpus, recipe.plan.price_per_gpu_hour)


def measured(run: Run) -> float | None:
    """Images per second of one actor in what this run has made so far; None where it has made nothing."""
    events = [event for event in read_events(run.store) if event.get("event") == MADE]
    spent = sum(event["seconds"] * event["actors"] for event in events)
    return sum(event["rows"] for event in events) / spent if spent else None


def here() -> Resources:
    """What Ray would find: a cluster that is connected or named by `RAY_ADDRESS`, else this machine, unstarted."""
    ray = sys.modules.get("ray")
    if os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized()):
        with connect() as found:
            return found if ray is None else resources()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = None if visible is None else [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    gpus = len(glob.glob("/dev/nvidia[0-9]*")) if named is None else len(named)
    return Resources(cpus=os.cpu_count() or 1, gpus=gpus)


def described(
    section: PlanSection,
    real: Mapping[Cell, int],
    wanted: Mapping[Cell, int],
    planned: Mapping[Cell, int],
    tallies: tuple[Mapping[Cell, Tally], Mapping[Cell, Tally]],
    cost: Estimate,
) -> Iterator[str]:
    """The table of a round, a line per cell, and its cost. tallies: of this run's samples, and of those that acceptance
    is known from."""
    own, known = tallies
    heads = ("real", "wanted", "accepted", "planned", "expected", "hours")
    cells = [cell for cell, count in wanted.items() if count]
    width = max([len("cell"), *(len("/".join(cell)) for cell in cells)])
    yield f"{'cell':<{width}}" + "".join(f"{head:>10}" for head in heads)
    total = [0.0] * 5
    for cell in cells:
        rows = planned.get(cell, 0)
        likely = rows * expected(known.get(cell, Tally()), section.acceptance)
        numbers = [real.get(cell, 0), wanted[cell], own.get(cell, Tally()).accepted, rows, likely]
        total = [before + number for before, number in zip(total, numbers, strict=True)]
        yield _row("/".join(cell), width, numbers, cost.hours(rows))
    yield _row("all", width, total, cost.hours(int(total[3])))
    yield cost.line(int(total[3]))


def _row(name: str, width: int, numbers: list[float], hours: float | None) -> str:
    counted = "".join(f"{number:>10.0f}" for number in numbers[:4])
    return f"{name:<{width}}{counted}{numbers[4]:>10.1f}" + (f"{'?':>10}" if hours is None else f"{hours:>10.3f}")


def ratios(wanted: Mapping[Cell, int], real: Mapping[Cell, int]) -> Iterator[str]:
    """A warning for each cell of more than four synthetic images to a real one."""
    for cell, count in wanted.items():
        if real.get(cell) and count > WARN_RATIO * real[cell]:
            yield (
                f"warning     {'/'.join(cell)} asks for {count / real[cell]:.1f} synthetic images to each of "
                f"{real[cell]} real ones; more than {WARN_RATIO:g} showed no gain (DiffAug), see plan.max_ratio"
            )
