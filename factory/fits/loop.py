"""The one train loop: sharding of batches, gradient steps, averages, checkpoints, exact resume, metrics.

It is plain torch, so that a fit runs and is tested without a cluster; `runtime/train.py` runs the same function on
Ray Train workers and adds what only a cluster has (process groups, uploads, restarts).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from factory.fits.objective import Objective, RowNoise, batch_rows
from factory.recipe import FitSection

CHECKPOINT = "state.pt"


@dataclass
class Progress:
    """Where a fit is: handed to `report` after each checkpoint and at the end."""

    step: int
    metrics: dict[str, float]
    checkpoint: Path | None = None
    done: bool = False


@dataclass
class Worker:
    """One of `world_size` equal workers, and how it joins its gradients (`wrap`) and its metrics (`mean`, called by
    all workers at the same steps) with the others'."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    mean: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: metrics


class _LossModule(nn.Module):
    """The objective's loss as a forward pass, so that a data-parallel wrapper sees the call that needs gradients."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
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
    log_every: int = 10,
) -> nn.Module:
    """Runs the fit to its last step and returns the model, averaged where `ema_decay` says so.

    directory: local; holds the newest checkpoint and `metrics.jsonl`. A checkpoint found there is resumed from.
    Raises ValueError if the batch does not divide over the workers or there is nothing to train on.
    """
    worker = worker or Worker()
    _check(objective, section, worker)
    directory.mkdir(parents=True, exist_ok=True)
    model = objective.build().to(worker.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=section.learning_rate, weight_decay=section.weight_decay)
    average = {name: p.detach().clone() for name, p in trained.items()} if section.ema_decay else {}
    start = _resume(directory, model, optimizer, average, worker.device)
    module = worker.wrap(_LossModule(objective, model))
    seen: list[dict[str, float]] = []
    for step in range(start, section.steps):
        seen.append(_step(module, objective, section, step, worker, optimizer, trained))
        _update_average(average, trained, section.ema_decay, step)
        last = step + 1 == section.steps
        due = last or (step + 1) % section.checkpoint_every == 0
        if due or (step + 1) % log_every == 0:  # at each checkpoint, so that a resumed fit logs the same means
            metrics = worker.mean(_mean(seen))
            seen.clear()
            _log(directory, worker, step + 1, metrics)
        if due:
            saved = _save(directory, model, optimizer, average, step + 1) if worker.rank == 0 else None
            report(Progress(step + 1, metrics, saved, done=last))
    for name, value in average.items():
        trained[name].data.copy_(value)
    return model


def _check(objective: Objective, section: FitSection, worker: Worker) -> None:
    if section.batch_size % worker.world_size:
        raise ValueError(
            f"batch_size must divide over the workers, got {section.batch_size} over {worker.world_size}; "
            f"choose a multiple of {worker.world_size}."
        )
    if not len(objective.examples):
        raise ValueError("a fit needs at least one example, got none; ingest and caption a corpus first.")


def _step(
    module: nn.Module,
    objective: Objective,
    section: FitSection,
    step: int,
    worker: Worker,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
) -> dict[str, float]:
    started = time.perf_counter()
    rows = batch_rows(objective.examples, section.seed, step, section.batch_size)
    positions = range(worker.rank, section.batch_size, worker.world_size)
    own = rows[list(positions)]
    batch = {name: value.to(worker.device) for name, value in objective.examples.batch(own).items()}
    waited = time.perf_counter() - started
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(section, step)
    losses = module(batch, RowNoise(section.seed, step, own))
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), section.clip_norm)
    optimizer.step()
    metrics = {name: float(value.detach()) for name, value in losses.items()}
    if not math.isfinite(metrics["loss"]):
        raise ValueError(f"the loss must stay finite, got {metrics['loss']} at step {step}; lower the learning_rate.")
    return metrics | {
        "grad_norm": float(norm), "data_wait_s": waited, "step_s": time.perf_counter() - started,
        "learning_rate": learning_rate(section, step),
    }  # fmt: skip


def _update_average(average: dict[str, Tensor], trained: dict[str, nn.Parameter], decay: float, step: int) -> None:
    """Exponential average with a ramp, so that early steps are not remembered for ever."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in average.items():
        value.lerp_(trained[name].detach(), 1.0 - decay)


def _mean(seen: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in seen) / len(seen) for name in (seen[-1] if seen else {})}


def _log(directory: Path, worker: Worker, step: int, metrics: dict[str, float]) -> None:
    if worker.rank == 0:
        with (directory / "metrics.jsonl").open("a") as out:
            out.write(json.dumps({"step": step} | {name: round(value, 6) for name, value in metrics.items()}) + "\n")


def _save(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], step: int
) -> Path:
    """Everything a resume needs, put in place in one step so that a kill leaves the previous checkpoint."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    staged = directory / (CHECKPOINT + ".tmp")
    state = {"step": step, "model": trained, "buffers": buffers, "average": average}
    state["optimizer"] = optimizer.state_dict()
    torch.save(state, staged)
    staged.replace(directory / CHECKPOINT)
    return directory / CHECKPOINT


def _resume(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    device: torch.device,
) -> int:
    """Loads the newest checkpoint, drops metrics logged after it, and returns the step to go on from."""
    path = directory / CHECKPOINT
    if not path.exists():
        (directory / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"] | state["buffers"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    for name in average:
        average[name].copy_(state["average"][name])
    _drop_metrics_after(directory / "metrics.jsonl", int(state["step"]))
    return int(state["step"])


def _drop_metrics_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
