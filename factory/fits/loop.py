"""The one train loop: sharding of batches, gradient steps, averages, checkpoints, exact resume, early stop, metrics.

It is plain torch, so that a fit runs and is tested without a cluster; `runtime/train.py` runs the same function on
Ray Train workers and adds what only a cluster has (process groups, uploads, restarts, grids drawn beside the fit).
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from factory.fits import checkpoint, validation
from factory.fits.checkpoint import CHECKPOINT, METRICS, State
from factory.fits.objective import Objective, RowNoise, batch_rows
from factory.fits.sharding import whole
from factory.fits.validation import HeldOut
from factory.recipe import FitSection

PROBES = ("linear_probe", "nearest_neighbours")  # what an objective with `probe_every` measures

__all__ = ["CHECKPOINT", "METRICS", "Preview", "Progress", "Worker", "learning_rate", "train"]


@dataclass
class Progress:
    """Where a fit is: handed to `report` after each checkpoint and at the end."""

    step: int
    metrics: dict[str, float]
    checkpoint: Path | None = None
    done: bool = False


@dataclass
class Worker:
    """One of `world_size` equal workers, and how it joins the others: `wrap` joins gradients, `shard` cuts the model
    over all (FSDP2, in place of `wrap`), `mean` averages metrics and is called by all workers at the same steps."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    shard: Callable[[nn.Module], nn.Module] | None = None
    mean: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: metrics


class Preview(Protocol):
    """Draws grids of samples beside a fit, and says how many of a grid's samples were learned by heart."""

    def start(self, step: int, weights: Path) -> None:
        """Begin a grid from weights that the objective saved in a directory, which it reads before it returns."""
        ...

    def result(self) -> dict[str, float]:
        """The metrics of the grid begun last, waited for; `memorised` is a share."""
        ...


class _LossModule(nn.Module):
    """The objective's loss as a forward pass, so that a data-parallel wrapper sees the call that needs gradients."""

    def __init__(self, objective: Objective, model: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.objective, self.model, self.precision, self.device = objective, model, precision, device

    def forward(self, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        """Weights and gradients stay float32 in either precision; which operations are, autocast decides: losses and,
        on a GPU, norms."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.objective.loss(self.model, batch, noise)


def learning_rate(section: FitSection, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, section.warmup_steps))
    if section.schedule == "constant":
        return section.learning_rate * warm
    share = max(0.0, step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
    return section.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def train(
    objective: Objective,
    section: FitSection,
    directory: Path,
    *,
    worker: Worker | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    preview: Preview | None = None,
    log_every: int = 10,
) -> nn.Module:
    """Runs the fit to its last step, or to where held-out rows or memorised samples stop it, and returns the model:
    averaged where `ema_decay` says so, the best on held-out rows where `patience` does. A sharded model comes back
    whole on rank 0 alone.

    directory: local; holds the newest checkpoint and `metrics.jsonl`. A checkpoint found there is resumed from.
    Raises ValueError if the batch is smaller than the workers, there is nothing to train on, or the checkpoint is
    another fit's.
    """
    worker = worker or Worker()
    _check(objective, section, worker)
    directory.mkdir(parents=True, exist_ok=True)
    fit = _Fit(objective, section, worker, directory, preview)
    window = _Window()
    with _Batches(objective, section, worker, fit.start) as batches:
        for step in range(fit.start, section.steps):
            if fit.state.stopped:
                break
            window.add(*_step(fit, step, batches.of(step)))
            _update_average(fit.state, section.ema_decay, step)
            metrics, due = fit.looked_at(step + 1), (step + 1) % section.checkpoint_every == 0
            due = due or fit.state.stopped or step + 1 == section.steps
            if due or metrics or (step + 1) % log_every == 0:  # also at checkpoints: a resumed fit logs the same means
                metrics = window.means(worker, step, fit.last_good) | {
                    "learning_rate": learning_rate(section, step), **metrics
                }  # fmt: skip
                _log(directory, worker, step + 1, metrics)
            if due:
                fit.save(step + 1, metrics, report)
    return fit.end()


def _check(objective: Objective, section: FitSection, worker: Worker) -> None:
    if section.batch_size < worker.world_size or (worker.shard and section.batch_size % worker.world_size):
        rule = "divide over the workers of a sharded fit" if worker.shard else "give each worker a row"
        raise ValueError(
            f"batch_size must {rule}, got {section.batch_size} over {worker.world_size}; "
            f"choose a multiple of {worker.world_size}."
        )
    if not len(objective.examples):
        raise ValueError("a fit needs at least one example, got none; ingest and caption a corpus first.")


class _Fit:
    """A fit under way on one worker."""

    def __init__(
        self, objective: Objective, section: FitSection, worker: Worker, directory: Path, preview: Preview | None
    ) -> None:
        self.objective, self.section, self.worker, self.directory = objective, section, worker, directory
        self.preview = preview if section.preview_every else None
        model = objective.build().to(worker.device)
        # A sharded fit keeps a whole copy on rank 0's CPU, which its values are put into to be saved.
        self._whole = copy.deepcopy(model).cpu() if worker.shard is not None and worker.rank == 0 else None
        if worker.shard is not None:
            worker.shard(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grouped = getattr(objective, "parameter_groups", None)  # an objective's own: rates by layer, for example
        groups = [{"params": list(trained.values())}] if grouped is None else grouped(model)
        optimizer = torch.optim.AdamW(
            groups,
            lr=section.learning_rate, betas=(0.9, section.beta2), weight_decay=section.weight_decay,
            fused=worker.shard is None,
        )  # fmt: skip
        average = {name: p.detach().clone() for name, p in trained.items()} if section.ema_decay else {}
        self.state = State(model, trained, optimizer, average)
        self.identity = checkpoint.identity(objective, section, trained, len(groups))
        self.start = checkpoint.load(
            directory / CHECKPOINT, self.state, self.identity, worker.device, writes=worker.rank == 0
        )
        self.last_good = self.start
        loss = _LossModule(objective, model, section.precision, worker.device)
        self.module = loss if worker.shard is not None else worker.wrap(loss)
        self.held_out = self._held_out()
        self.drawing: int | None = None  # the step whose grid is being drawn

    def _held_out(self) -> HeldOut | None:
        if not self.section.validate_every:
            return None
        examples = getattr(self.objective, "held_out", None)
        if examples is None or not len(examples):
            raise ValueError("validate_every must have held-out rows, got none; raise corpus.val_share or set it to 0.")
        rows = max(1, self.section.batch_size // self.worker.world_size)
        return HeldOut(examples, self.section.seed, min(rows, 8), self.worker.rank, self.worker.world_size)

    def looked_at(self, step: int) -> dict[str, float]:
        """What is measured at some steps only; may stop the fit, on all workers at the same step."""
        found: dict[str, float] = {}
        if self.held_out is not None and step % self.section.validate_every == 0:
            found["validation_loss"] = self._validate(step)
        if self.section.preview_every and step % self.section.preview_every == 0:
            found |= self._preview(step)
        every = getattr(self.section, "probe_every", 0)  # of fits whose features tell something
        if every and step % every == 0:
            found |= self._probe()
        return found

    def _probe(self) -> dict[str, float]:
        """The objective's probes of its frozen model: asked on rank 0, while the others wait, and known to all."""
        ranks, found = self.worker.world_size, dict.fromkeys(PROBES, 0.0)
        with validation.averaged(self.state):
            values = validation.whole_values(self.state) if self.worker.shard is not None else {}
            if self.worker.rank == 0:
                model = self.state.model
                if self._whole is not None:
                    model = validation.put_whole(self._whole, values).to(self.worker.device).eval()
                found = self.objective.probed(model)  # type: ignore[attr-defined]
                self._whole = None if self._whole is None else self._whole.cpu()
        return {name: share * ranks for name, share in self.worker.mean(found).items()}

    def _validate(self, step: int) -> float:
        assert self.held_out is not None
        with validation.averaged(self.state):
            sums = self.worker.mean(
                self.held_out.sums(
                    _LossModule(self.objective, self.state.model, self.section.precision, self.worker.device),
                    self.worker.device,
                )
            )
        loss = sums["loss"] / sums["rows"]
        validation.note(self.state, loss, step, self.section.validate_every, self.section.patience)
        return loss

    def _preview(self, step: int) -> dict[str, float]:
        """The grid that was begun at the last such step is settled, always there, so that a fit stops at the same step
        however long a grid took; then the next one is begun."""
        values: dict[str, Tensor] = {}
        if self.worker.shard is not None:
            with validation.averaged(self.state):
                values = validation.whole_values(self.state)
        found = {"memorised": -1.0}
        if self.preview is not None and self.worker.rank == 0:
            if self.drawing is not None:
                found["memorised"] = self.preview.result().get("memorised", -1.0)
            with tempfile.TemporaryDirectory() as folder:
                self._save_weights(Path(folder), values)
                self.preview.start(step, Path(folder))
        self.drawing = step
        ranks = self.worker.world_size  # the others' -1 count too: rank 0's share is what is above them
        share = self.worker.mean(found)["memorised"] * ranks + (ranks - 1)
        if share < -0.5:
            return {}
        most = self.section.max_memorised
        self.state.stopped |= most is not None and share > most
        return {"memorised": share}

    def _save_weights(self, folder: Path, values: dict[str, Tensor]) -> None:
        if self._whole is not None:
            return self.objective.save(validation.put_whole(self._whole, values), folder)
        with validation.averaged(self.state):
            self.objective.save(self.state.model, folder)

    def save(self, step: int, metrics: dict[str, float], report: Callable[[Progress], None]) -> None:
        path, writes = self.directory / CHECKPOINT, self.worker.rank == 0
        checkpoint.save(path, self.state, step, self.identity, writes=writes)
        self.last_good = step
        done = self.state.stopped or step == self.section.steps
        report(Progress(step, metrics, path if writes else None, done=done))

    def end(self) -> nn.Module:
        if self.preview is not None and self.drawing is not None and self.worker.rank == 0:
            self.preview.result()
        validation.finish(self.state)
        if self.worker.shard is None:
            return self.state.model
        values = validation.whole_values(self.state)
        return self.state.model if self._whole is None else validation.put_whole(self._whole, values)


class _Batches:
    """The batches of the steps in their order, in parts of `micro_batch` rows; the next one is read while one is
    learned from."""

    def __init__(self, objective: Objective, section: FitSection, worker: Worker, start: int) -> None:
        self.objective, self.section, self.worker = objective, section, worker
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[list[tuple[np.ndarray, dict[str, Tensor]]]] | None = None
        if start < section.steps:
            self._next = self._reader.submit(self._read, start)

    def __enter__(self) -> _Batches:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def of(self, step: int) -> tuple[list[tuple[np.ndarray, dict[str, Tensor]]], float]:
        """The parts of a step, (indices for the noise, tensors) each, and the seconds that were waited for them."""
        started = time.perf_counter()
        assert self._next is not None
        found = self._next.result()
        if step + 1 < self.section.steps:
            self._next = self._reader.submit(self._read, step + 1)
        return found, time.perf_counter() - started

    def _read(self, step: int) -> list[tuple[np.ndarray, dict[str, Tensor]]]:
        rows = batch_rows(self.objective.examples, self.section.seed, step, self.section.batch_size)
        own = slice(self.worker.rank, None, self.worker.world_size)
        rows, named = rows[own], _told_apart(rows, len(self.objective.examples))[own]
        size = self.section.micro_batch or len(rows)
        parts = np.array_split(np.arange(len(rows)), -(-len(rows) // size))  # alike, for batch norm sees each by itself
        batches = (self.objective.examples.batch(rows[part]) for part in parts)
        moved = [{name: value.to(self.worker.device) for name, value in batch.items()} for batch in batches]
        return [(named[part], batch) for part, batch in zip(parts, moved, strict=True)]


def _told_apart(rows: np.ndarray, count: int) -> np.ndarray:
    """Row indices by which noise is drawn: a row's own, and `count` more each time that a batch holds it again, so
    that it is not shown twice with the same noise."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    first = np.searchsorted(ordered, ordered, side="left")
    named = np.empty(len(rows), np.int64)
    named[order] = ordered + count * (np.arange(len(rows)) - first)
    return named


def _step(
    fit: _Fit, step: int, read: tuple[list[tuple[np.ndarray, dict[str, Tensor]]], float]
) -> tuple[dict[str, Tensor], float]:
    """One gradient step. Returns its metrics, as tensors that nothing has waited for, and the seconds of waiting.

    A part's losses count by its share of the global batch, times the workers that the gradients are averaged over: so
    any number of workers and any parts give the gradient of the global batch.
    """
    parts, waited = read
    section, state, module = fit.section, fit.state, fit.module
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(section, step) * group.get("lr_scale", 1.0)
    state.optimizer.zero_grad(set_to_none=True)
    total: dict[str, Tensor] = {}
    for number, (rows, batch) in enumerate(parts):
        share = len(rows) * fit.worker.world_size / section.batch_size
        joins = number + 1 == len(parts) or not hasattr(module, "no_sync")
        with nullcontext() if joins else module.no_sync():  # type: ignore[operator]
            losses = module(batch, RowNoise(section.seed, step, rows))
            (losses["loss"] * share).backward()
        for name, value in losses.items():
            total[name] = total.get(name, torch.zeros_like(value.detach())) + value.detach() * share
    norm = whole(torch.nn.utils.clip_grad_norm_(state.trained.values(), section.clip_norm or math.inf))
    state.optimizer.step()
    return total | {"grad_norm": norm}, waited


def _update_average(state: State, decay: float, step: int) -> None:
    """Exponential average with a ramp, so that early steps are not remembered for ever."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in state.average.items():
        value.lerp_(state.trained[name].detach(), 1.0 - decay)


class _Window:
    """The metrics of the steps since the last log line."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.rows: list[dict[str, Tensor]] = []
        self.waited, self.began = 0.0, time.perf_counter()

    def add(self, metrics: dict[str, Tensor], waited: float) -> None:
        self.rows.append(metrics)
        self.waited += waited

    def means(self, worker: Worker, step: int, last_good: int) -> dict[str, float]:
        """Means over steps and workers. Raises ValueError where one is not finite, before a checkpoint holds it."""
        columns = {name: torch.stack([row[name].float() for row in self.rows]).tolist() for name in self.rows[-1]}
        for number, (loss, norm) in enumerate(zip(columns["loss"], columns["grad_norm"], strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                wrong = loss if not math.isfinite(loss) else norm
                kept = (
                    f"the last checkpoint, of step {last_good}, is good" if last_good else "no checkpoint was written"
                )
                raise ValueError(
                    f"the loss must stay finite, got {wrong} at step {step + 2 - len(self.rows) + number}; fit anew "
                    f"with a lower learning_rate: {kept}."
                )
        count = len(self.rows)
        found = {name: sum(values) / count for name, values in columns.items()} | {
            "data_wait_s": self.waited / count, "step_s": (time.perf_counter() - self.began) / count
        }  # fmt: skip
        self._clear()
        return worker.mean(found)


def _log(directory: Path, worker: Worker, step: int, metrics: dict[str, float]) -> None:
    if worker.rank == 0:
        with (directory / METRICS).open("a") as out:
            out.write(json.dumps({"step": step} | {name: round(value, 6) for name, value in metrics.items()}) + "\n")
