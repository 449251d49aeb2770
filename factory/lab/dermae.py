"""DerMAE's table, cell by cell: a large ViT, a ViT student and a small student, each on real or real + synthetic
images, from given weights or from masked pre-training, alone or taught by the large one.

    start    the network's ImageNet weights if the recipe names some, else random ones; or MAE on the arm's own images
    alone    the large network is fine-tuned as MAE's authors do, the students by cross-entropy
    taught   the same student, steps and crops, with the answers of the large network of the same arm, start and seed

All fits of one kind take equally many steps, so the arm of real images sees its rows more often: it is the control of
equal budget. Three combinations do not exist and say so (`NOT_RUN`). Each cell is one file under lab/dermae, named by a
digest of all that decides it; fits resume from lab/dermae/fits on the run's disk. `dermae_tasks.py` makes tasks of
them for a cluster.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from factory import records
from factory.fits.card import checkpoint_at, placed, read_card, write_card
from factory.fits.card import digest_of as file_digest
from factory.fits.checkpoint import FREE
from factory.fits.classifiers import load_classifier, save_timm
from factory.fits.distill import TEACHER, DistillObjective, TeacherObjective
from factory.fits.examples import ImageExamples
from factory.fits.finetune import FinetuneObjective
from factory.fits.loop import CHECKPOINT, Worker, train
from factory.fits.mae import MaeObjective
from factory.fits.objective import Objective
from factory.fits.probing import answers, scores
from factory.lab.dermae_rows import DATA, Rows, rows_of
from factory.lab.dermae_summary import summary_of, table_lines
from factory.models.classifier import build_classifier, is_vit
from factory.models.student import cost
from factory.recipe import DermaeSection, FitSection, NetworkSection
from factory.storage import Store

CELLS, FITS, SUMMARY = "lab/dermae/cells", "lab/dermae/fits", "lab/dermae_table.json"
LARGE, BASE, SMALL = NETWORKS = ("large", "base", "small")
GIVEN, MAE = STARTS = ("given", "mae")
NO_TEACHER, NOT_A_VIT = "no_larger_teacher", "not_a_vit"
VERSION = 3  # part of every digest; raised when the code changes what a cell would hold


@dataclass(frozen=True)
class Cell:
    """One network to fit and test."""

    network: str
    data: str
    start: str
    taught: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.network} {self.data} {self.start} {'taught' if self.taught else 'alone'} seed {self.seed}"


def run_table(
    store: Store,
    directory: Path,
    corpus: pa.Table,
    samples: pa.Table,
    section: DermaeSection,
    *,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs what is missing of the table and writes lab/dermae_table.json, which it returns.

    corpus, samples: the run's tables. directory: the run's on this machine, where fits resume. Raises ValueError for
    weights that do not fit and rows that cannot be told apart (see `rows_of`), and where a fit's loss is not finite.
    """
    cells = list(cells_of(section))
    rows = rows_of(corpus, samples, section.image_size, pretrain_on=section.pretrain_on)
    sweep = Sweep(store, directory / FITS, rows, section)
    found = []
    for number, cell in enumerate(cells):
        found.append(sweep.result(cell))
        accuracy, macro_f1 = (found[-1]["metrics"][name] for name in ("accuracy", "macro_f1"))
        progress(
            f"dermae      cell {number + 1} of {len(cells)}, {cell}: accuracy {accuracy:.3f}, macro-F1 {macro_f1:.3f}"
        )
    summary = summary_of(found, not_run(section), sweep.about(), sweep.rows.counts, section)
    store.replace(SUMMARY, (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode())
    for line in table_lines(summary):
        progress(line)
    return summary


def cells_of(section: DermaeSection) -> Iterator[Cell]:
    """Every cell that exists, whole seeds one after the other, so that a sweep that was stopped is balanced."""
    skipped = not_run(section)
    for seed in range(section.seeds):
        for data in DATA:
            for start in STARTS:
                for network in NETWORKS:
                    for taught in (False, True):
                        if (network, start, taught) not in skipped:
                            yield Cell(network, data, start, taught, seed)


def not_run(section: DermaeSection) -> dict[tuple[str, str, bool], str]:
    """The (network, start, taught) that do not exist, with the reason."""
    found = {(LARGE, start, True): NO_TEACHER for start in STARTS}
    vits = {name: is_vit(getattr(section, name).model) for name in NETWORKS}
    if not vits[LARGE]:
        raise ValueError(f"evaluate.dermae.large must be a plain timm ViT, got {section.large.model}; name another.")
    return found | {(name, MAE, False): NOT_A_VIT for name, vit in vits.items() if not vit}


def pretrainings(section: DermaeSection) -> dict[Cell, list[Cell]]:
    """The pre-trainings that cells share, each named by the first cell that begins from it, with all that do."""
    found: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells_of(section):
        if cell.start == MAE and is_vit(getattr(section, cell.network).model):
            seed = cell.seed if section.pretrain_each_seed else section.pretrain.seed
            found.setdefault((cell.network, cell.data, seed), []).append(cell)
    return {begun[0]: begun for begun in found.values()}


def chains(section: DermaeSection) -> list[list[Cell]]:
    """The cells of each seed, arm and start in their order: those of one chain need fits of each other, and beyond them
    `pretrainings` alone."""
    found: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in cells_of(section):
        found.setdefault((cell.seed, cell.data, cell.start), []).append(cell)
    return list(found.values())


class Sweep:
    """The fits and the cells of one run; what is there is used again."""

    def __init__(self, store: Store, directory: Path, rows: Rows, section: DermaeSection) -> None:
        self.store, self.directory, self.rows, self.section = store, directory, rows, section
        self.worker = Worker(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.given = {
            name: None if own.weights is None else checkpoint_at(own.weights, f"evaluate.dermae.{name}.weights")
            for name, own in ((name, self._own(name)) for name in NETWORKS)
        }
        self.given_digest = {name: "" if path is None else file_digest(path) for name, path in self.given.items()}
        self.masked_digest = {
            name: "" if own.mae_weights is None
            else file_digest(checkpoint_at(own.mae_weights, f"evaluate.dermae.{name}.mae_weights"))
            for name, own in ((name, self._own(name)) for name in NETWORKS)
        }  # fmt: skip

    def _own(self, network: str) -> NetworkSection:
        found: NetworkSection = getattr(self.section, network)
        return found

    def result(self, cell: Cell) -> dict[str, Any]:
        """The stored result of a cell; fitted, tested and stored first if it is not there."""
        path = self._path(cell)
        if not self.store.exists(path):
            fitted = self._network(cell)
            model = load_classifier(fitted).to(self.worker.device)
            made = cell.data == DATA[1]
            result = asdict(cell) | {
                "metrics": scores(answers(model, self.rows.test), self.rows.test), "steps": read_card(fitted)["steps"],
                "num_real": self.rows.counts["num_real"], "num_test": len(self.rows.test),
                "num_synthetic": self.rows.counts["num_synthetic"] if made else 0,
            }  # fmt: skip
            self.store.put_if_absent(path, (json.dumps(result, indent=2, sort_keys=True) + "\n").encode())
        found: dict[str, Any] = json.loads(self.store.read(path))
        return found

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell's result is stored."""
        return self.store.exists(self._path(cell))

    def _path(self, cell: Cell) -> str:
        kind = "taught" if cell.taught else "alone"
        return f"{CELLS}/s{cell.seed}-{cell.data}-{cell.start}-{cell.network}-{kind}-{self._key(cell)[:16]}.json"

    def about(self) -> dict[str, Any]:
        """What each network is: its start where none was pre-trained, and its cost at the table's size."""
        from factory.models.student import cost_at

        found = {}
        for name in NETWORKS:
            own, patch = self._own(name), {}
            if own.patch_size is not None and is_vit(own.model):
                patch = {"patch_size": own.patch_size}
            spent = cost_at(own.model, len(self.rows.classes), self.section.image_size, **patch)
            found[name] = {"model": own.model, "given": "random" if own.weights is None else "ImageNet"} | asdict(spent)
        return found

    # ----------------------------------------------------------------------------------------------------- fits

    def _network(self, cell: Cell) -> Path:
        """The directory of a cell's classifier."""
        start, arm, seed = self.begun(cell), self.rows.arms[cell.data], {"seed": cell.seed}
        weights, classes, own = start / "model.safetensors", self.rows.classes, self._own(cell.network)
        rows, objective = arm.labelled.examples, None
        section: FitSection
        if cell.network == LARGE:
            section = self.section.finetune.model_copy(update=seed | {"weights": None})
            objective = FinetuneObjective(section, own.model, weights, rows, classes, held_out=arm.labelled.held_out)
            return self._fitted(cell, "large", section, objective)
        change: dict[str, Any] = seed | {"student": own.model, "student_weights": str(weights)}
        if cell.taught:
            teacher = self._network(Cell(LARGE, cell.data, cell.start, False, cell.seed))
            section = self.section.student.model_copy(update=change | {"teacher": str(teacher)})
            taught = DistillObjective(section, teacher, rows, classes, held_out=arm.labelled.held_out, store=self.store)
            return self._fitted(cell, "taught", section, taught)
        section = self.section.student.model_copy(update=change | {"alpha": 0.0})
        alone = AloneObjective(section, start, rows, classes, arm.labelled.held_out)
        return self._fitted(cell, "alone", section, alone)

    def begun(self, cell: Cell) -> Path:
        """The directory of the weights that a cell begins from, with its card."""
        own, plain = self._own(cell.network), self.section.pretrain
        vit = is_vit(own.model)
        if cell.start == MAE and vit:
            seed = cell.seed if self.section.pretrain_each_seed else plain.seed
            section = self._masked(own, seed)
            arm = self.rows.arms[cell.data]
            objective = MaeObjective(section, arm.pretraining)
            return self._fitted(Cell(cell.network, cell.data, MAE, False, seed), "mae", section, objective)
        place = self.directory / f"start-{cell.network}-s{cell.seed}-{self._start_key(cell)[:16]}"
        if not (place / "card.json").exists():
            if vit and own.weights is None:  # an autoencoder's encoder, so that MAE begins where the other arm does
                section = self._masked(own, cell.seed).model_copy(update={"weights": None})
                objective = MaeObjective(section, ImageExamples([], self.section.image_size))
                placed(place, partial(objective.save, objective.build()))
            else:
                placed(place, partial(self._save_plain, cell))
        return place

    def _masked(self, own: NetworkSection, seed: int) -> Any:
        patch = own.patch_size or own_patch(own.model)
        change = {"encoder": own.model, "patch_size": patch, "image_size": self.section.image_size, "seed": seed,
                  "weights": own.mae_weights, "probe_every": 0, "validate_every": 0, "patience": 0}  # fmt: skip
        return self.section.pretrain.model_copy(update=change)

    def _save_plain(self, cell: Cell, directory: Path) -> None:
        """Given weights, or the random ones of a network that is no ViT, as a directory with a card."""
        own, path, size = self._own(cell.network), self.given[cell.network], self.section.image_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)
            model = build_classifier(own.model, len(self.rows.classes), size, path)
        save_timm(model, directory)
        if path is not None:
            shutil.copyfile(path, directory / "model.safetensors")  # its own head too, to be left out later
        write_card(directory, cost(model, size), {"architecture": own.model})

    def _fitted(self, cell: Cell, kind: str, section: FitSection, objective: Objective) -> Path:
        """The directory of a fit's weights, fitted if it is not there; a fit that was stopped goes on."""
        key = self._start_key(cell) if kind == "mae" else self._key(cell)
        place = self.directory / f"{kind}-{cell.network}-{cell.data}-{cell.start}-s{cell.seed}-{key[:16]}"
        if not (place / "weights" / "card.json").exists():
            try:
                model = train(objective, section, place, worker=self.worker).cpu()
            except ValueError as error:
                raise ValueError(f"evaluate dermae-table, {kind} of {cell}: {error}") from error
            placed(place / "weights", partial(_save_one, objective, model))
            (place / CHECKPOINT).unlink()  # with its optimiser it is four times the weights
        return place / "weights"

    # ----------------------------------------------------------------------------------------------------- digests

    def _start_key(self, cell: Cell) -> str:
        """A digest of all that decides where a cell begins."""
        own, masked = self._own(cell.network), cell.start == MAE and is_vit(self._own(cell.network).model)
        section = _told(self._masked(own, cell.seed).model_copy(update={"weights": None})) if masked else ""
        arm = self.rows.arms[cell.data].digest if masked else ""
        given = (self.masked_digest if masked else self.given_digest)[cell.network]
        return records.digest(
            VERSION, own.model, own.patch_size, self.section.image_size, cell.seed, len(self.rows.classes), section,
            arm, given,
        )  # fmt: skip

    def _key(self, cell: Cell) -> str:
        """A digest of all that decides a cell's result."""
        start = cell
        if cell.start == MAE and not self.section.pretrain_each_seed:
            start = Cell(cell.network, cell.data, MAE, False, self.section.pretrain.seed)
        teacher = self._key(Cell(LARGE, cell.data, cell.start, False, cell.seed)) if cell.taught else ""
        section = self.section.finetune if cell.network == LARGE else self.section.student
        return records.digest(
            VERSION, cell.network, cell.taught, cell.seed, self._start_key(start), _told(section), teacher,
            self.rows.arms[cell.data].digest, self.rows.test_digest,
        )  # fmt: skip


def _told(section: FitSection) -> str:
    """What a section asks for beyond its defaults, of what decides the weights: fields that a later version adds leave
    the digests as they are. A default that changes wants a new VERSION."""
    return section.model_dump_json(exclude=FREE, exclude_defaults=True)


class AloneObjective(TeacherObjective):
    """A student without a teacher: cross-entropy on the crops that a taught one sees."""

    def __init__(
        self, section: FitSection, start: Path, examples: ImageExamples, classes: list[str],
        held_out: ImageExamples | None = None,
    ) -> None:  # fmt: skip
        super().__init__(start, examples, len(classes), section.seed)
        self.section, self.classes, self.size, self.held_out = section, classes, examples.image_size, held_out
        self.weight_decay = section.weight_decay

    def save(self, model: nn.Module, directory: Path) -> None:
        """The student as a timm directory with its card."""
        super().save(model, directory)
        architecture = read_card(self.encoder)["architecture"]
        fields = {"architecture": architecture, "classes": self.classes, "steps": self.section.steps}
        write_card(directory, cost(model, self.size), fields)


def _save_one(objective: Objective, model: nn.Module, directory: Path) -> None:
    """What an objective saves, without a second copy of the teacher, which has a directory of its own."""
    objective.save(model, directory)
    shutil.rmtree(directory / TEACHER, ignore_errors=True)


@cache
def own_patch(model: str) -> int:
    """The side of a timm ViT's patch, in pixels."""
    import timm

    with torch.device("meta"):
        built: Any = timm.create_model(model)
    return int(built.patch_embed.patch_size[0])
