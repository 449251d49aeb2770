"""What DerMAE's table costs before it is run: operations by kind of fit, and hours on so many workers.

A step is counted as three forward passes of what trains (one forward, twice that backward) and one of a teacher. The
optimiser, reading images, testing and answers on whole images are left out, so hours are a floor at the rate given.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from factory.fits.mae import autoencoder
from factory.lab.dermae import LARGE, Cell, cells_of, chains, own_patch, pretrainings
from factory.models.classifier import is_vit
from factory.models.student import cost_at, forward_flops
from factory.recipe import DermaeSection, FitSection, MaeSection, NetworkSection

CLASSES = 7  # HAM10000's; a head is nothing beside its network
STEP = 3  # forward passes to a training step


@dataclass(frozen=True)
class Kind:
    """One kind of fit: its name, how many there are, and the operations of all of them."""

    name: str
    count: int
    flops: float


class Costs:
    """The operations of every fit of a table."""

    def __init__(self, section: DermaeSection) -> None:
        self.section = section
        self._forward = cache(self._forward_of)

    def kinds(self) -> list[Kind]:
        """Pre-trainings and cells by kind, in the order in which a seed meets them."""
        found: dict[str, Kind] = {}
        for name, flops in [
            *map(self._pretraining, pretrainings(self.section)),
            *map(self._cell, cells_of(self.section)),
        ]:
            before = found.get(name, Kind(name, 0, 0.0))
            found[name] = Kind(name, before.count + 1, before.flops + flops)
        return list(found.values())

    def hours(self, workers: int, tflops: float) -> tuple[float, float]:
        """Hours until the last fit ends on so many workers, each of so many 10^12 operations a second, and the hours
        of all fits together."""
        shared = [self._pretraining(cell)[1] for cell in pretrainings(self.section)]
        beside = [sum(self._cell(cell)[1] for cell in chain) for chain in chains(self.section)]
        return (
            (last_end(shared, workers) + last_end(beside, workers)) / (3600e12 * tflops),
            sum(shared + beside) / (3600e12 * tflops),
        )

    def _pretraining(self, cell: Cell) -> tuple[str, float]:
        own, section = self._network(cell.network), self.section.pretrain
        return f"{section.objective} of {own.model}", STEP * self._forward(cell.network, True) * _shown(section)

    def _cell(self, cell: Cell) -> tuple[str, float]:
        own, section = self._network(cell.network), self.section.student
        step = STEP * self._forward(cell.network, False)
        if cell.network == LARGE:
            return f"fine-tuning of {own.model}", step * _shown(self.section.finetune)
        if cell.taught and section.targets == "same_crop":
            step += self._forward(LARGE, False)
        return f"{own.model} {'taught' if cell.taught else 'alone'}", step * _shown(section)

    def _network(self, name: str) -> NetworkSection:
        found: NetworkSection = getattr(self.section, name)
        return found

    def _forward_of(self, name: str, masked: bool) -> float:
        """Operations of one image."""
        own, size = self._network(name), self.section.image_size
        vit = is_vit(own.model)
        patch = (own.patch_size or own_patch(own.model)) if vit else None
        if not masked:
            options = {"patch_size": patch} if vit else {}
            return cost_at(own.model, CLASSES, size, **options).flops
        change = {"encoder": own.model, "patch_size": patch, "image_size": size}
        section: MaeSection = self.section.pretrain.model_copy(update=change)
        assert patch is not None
        with torch.device("meta"):
            model, image = autoencoder(section), torch.zeros(1, 3, size, size)
            noise = torch.zeros(1, (size // patch) ** 2)
        return forward_flops(lambda: model(image, section.mask_ratio, noise))


def _shown(section: FitSection) -> int:
    """Images that a fit is shown."""
    return section.steps * section.batch_size


def last_end(durations: Iterable[float], workers: int) -> float:
    """When the last of some tasks ends, if each of so many workers takes the next one as soon as it is free."""
    free = [0.0] * workers
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def cost_lines(section: DermaeSection, workers: int, unit: str, tflops: float | None, price: float | None) -> list[str]:
    """The costs as a table of text. unit: what a worker is, GPU or core; price: of an hour of one."""
    costs = Costs(section)
    kinds = costs.kinds()
    lines = [f"{'fit':<44}{'fits':>6}{'EFLOP':>12}" + ("" if tflops is None else f"{unit + '-hours':>12}")]
    for kind in kinds:
        hours = "" if tflops is None else f"{kind.flops / (3600e12 * tflops):>12,.1f}"
        lines.append(f"{kind.name:<44}{kind.count:>6}{kind.flops / 1e18:>12.4g}{hours}")
    total, fits = sum(kind.flops for kind in kinds) / 1e18, sum(kind.count for kind in kinds)
    if tflops is None:
        return [*lines, f"cost        {fits} fits, {total:.4g} EFLOP; hours unknown: say evaluate.dermae.tflops"]
    wall, spent = costs.hours(workers, tflops)
    money = "" if price is None else f", {spent * price:,.0f} at {price:g} per {unit}-hour"
    return [
        *lines,
        f"cost        {fits} fits, {total:.4g} EFLOP at {tflops:g} TFLOP/s by evaluate.dermae.tflops on {workers} "
        f"{unit}(s): {wall:,.1f} h, {spent:,.1f} {unit}-hours{money}",
    ]
