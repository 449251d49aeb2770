"""DerMAE's table on a cluster: what cells share is fitted first, then the chains of cells beside each other.

    pre-training   one task for each ViT, arm and, with `pretrain_each_seed`, seed
    chain          one task for each seed, arm and start: the large network, then those that it teaches

A task has a GPU where the cluster has any, else a core. What is there is not fitted again, and a task whose machine is
lost begins again from its fits' checkpoints, for which the run lies on a disk that all nodes mount.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from factory.lab import dermae
from factory.lab.dermae_rows import rows_of
from factory.recipe import DermaeSection, Recipe
from factory.run import Run
from factory.runtime import cluster

RETRIES = 3  # of a task whose machine is lost

Echo = Callable[[str], None]
Work = Callable[[], str]


def fit_cells(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """Fits and tests every cell that has no result yet. Raises ValueError as `dermae.run_table` does."""
    section = recipe.evaluate.dermae
    missing = _missing(_sweep(run.uri, section), section)
    if not missing:
        return
    needed = {(cell.network, cell.data) for chain in missing for cell in chain if cell.start == dermae.MAE}
    shared = [cell for cell in dermae.pretrainings(section) if (cell.network, cell.data) in needed]
    with cluster.connect() as resources:
        workers = workers_of(resources, recipe)
        work = [partial(_pretrain, run.uri, section, cell) for cell in shared]
        _carry_out(work, workers, resources.gpus > 0, "pre-training", echo)
        _carry_out([partial(_chain, run.uri, section, c) for c in missing], workers, resources.gpus > 0, "chain", echo)


def workers_of(resources: cluster.Resources, recipe: Recipe) -> int:
    """Tasks at a time: one per GPU, else one per core."""
    return resources.gpus or cluster.pools(resources, recipe).tasks


def _missing(sweep: dermae.Sweep, section: DermaeSection) -> list[list[dermae.Cell]]:
    """The chains with a cell that has no result."""
    return [chain for chain in dermae.chains(section) if not all(sweep.is_done(cell) for cell in chain)]


def _sweep(uri: str, section: DermaeSection) -> dermae.Sweep:
    run = Run(uri)
    rows = rows_of(
        run.table("corpus").read(), run.table("samples").read(), section.image_size, pretrain_on=section.pretrain_on
    )
    return dermae.Sweep(run.store, run.local_dir("evaluate dermae-table") / dermae.FITS, rows, section)


def _pretrain(uri: str, section: DermaeSection, cell: dermae.Cell) -> str:
    _sweep(uri, section).begun(cell)
    return f"{cell.network} on {cell.data}, seed {cell.seed}"


def _chain(uri: str, section: DermaeSection, cells: Sequence[dermae.Cell]) -> str:
    sweep = _sweep(uri, section)
    for cell in cells:
        sweep.result(cell)
    return f"seed {cells[0].seed}, {cells[0].data}, {cells[0].start}: {len(cells)} cells"


def _carry_out(work: Sequence[Work], workers: int, gpu: bool, kind: str, echo: Echo) -> None:
    """Tasks on so many workers at a time; the first error ends them all and is raised as it was."""
    import ray
    from ray.exceptions import RayTaskError

    task: Any = ray.remote(num_cpus=cluster.ACTOR_CPUS, num_gpus=1 if gpu else 0, max_retries=RETRIES)(_one)
    waiting, running, done = iter(work), set[Any](), 0
    try:
        while True:
            running |= {task.remote(one) for one in _next(waiting, workers - len(running))}
            if not running:
                return
            ready, rest = ray.wait(list(running))
            running = set(rest)
            for said in ray.get(ready):
                done += 1
                echo(f"dermae      {kind} {done} of {len(work)}, {said}")
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError) else error from None
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _next(waiting: Iterator[Work], count: int) -> Iterator[Work]:
    for _ in range(count):
        one = next(waiting, None)
        if one is not None:
            yield one


def _one(work: Work) -> str:
    """A task: a thread of its own on a core, since its neighbours have the others."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    return work()
