"""DerMAE's table as tasks that a cluster carries out: what cells share, then chains of cells beside each other.

    pre-training   one task for each ViT, arm and, with `pretrain_each_seed`, seed
    chain          one task for each seed, arm and start: the large network, then those that it teaches

What is there is not fitted again, and a task that begins anew goes on from its fits' checkpoints, for which the run
lies on a disk that all nodes mount.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from factory.lab import dermae
from factory.lab.dermae_rows import rows_of
from factory.recipe import DermaeSection
from factory.run import Run

Work = Callable[[], str]


def tasks_of(run: Run, section: DermaeSection) -> tuple[list[Work], list[Work]]:
    """The pre-trainings and the chains of which a cell has no result yet, to be carried out one after the other."""
    sweep = _sweep(run.uri, section)
    missing = [chain for chain in dermae.chains(section) if not all(sweep.is_done(cell) for cell in chain)]
    wanted = {cell for chain in missing for cell in chain}
    shared = [first for first, begun in dermae.pretrainings(section).items() if wanted.intersection(begun)]
    return (
        [partial(_pretrain, run.uri, section, cell) for cell in shared],
        [partial(_fit_chain, run.uri, section, chain) for chain in missing],
    )


def _sweep(uri: str, section: DermaeSection) -> dermae.Sweep:
    run = Run(uri)
    rows = rows_of(
        run.table("corpus").read(), run.table("samples").read(), section.image_size, pretrain_on=section.pretrain_on
    )
    return dermae.Sweep(run.store, run.local_dir("evaluate dermae-table") / dermae.FITS, rows, section)


def _pretrain(uri: str, section: DermaeSection, cell: dermae.Cell) -> str:
    _sweep(uri, section).begun(cell)
    return f"{cell.network} on {cell.data}, seed {cell.seed}"


def _fit_chain(uri: str, section: DermaeSection, cells: Sequence[dermae.Cell]) -> str:
    sweep = _sweep(uri, section)
    for cell in cells:
        sweep.result(cell)
    return f"seed {cells[0].seed}, {cells[0].data}, {cells[0].start}: {len(cells)} cells"
