"""A fit's checkpoint: all that it needs to go on to the same bits, in one file that is put in place whole.

It holds whole tensors, so a fit may go on with another number of workers, sharded or not. It names what it was fitted
with, and a fit with another objective, recipe or set of examples refuses it instead of writing over it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from factory import records
from factory.fits.objective import Objective
from factory.fits.sharding import as_piece, copy_whole, whole
from factory.recipe import FitSection

CHECKPOINT, METRICS = "state.pt", "metrics.jsonl"
# What may change between two starts of one fit: it changes who computes, how much at once and what is looked at.
FREE = {
    "num_workers", "min_workers", "sharding", "micro_batch", "checkpoint_every", "preview_every", "probe_every",
    "keep_gib",
}  # fmt: skip


@dataclass
class State:
    """What changes in a fit. `average` and `best_values` hold a tensor for each of `trained`, or none; `best_buffers`
    those that a network had with `best_values`, such as the running means of batch norm."""

    model: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] = field(default_factory=dict)
    best_values: dict[str, Tensor] = field(default_factory=dict)
    best_buffers: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = float("inf")  # on held-out examples, and the step it was seen at
    best_step: int = 0
    stopped: bool = False


def identity(objective: Objective, section: FitSection, trained: dict[str, nn.Parameter], groups: int = 1) -> str:
    """What a checkpoint must agree in with the fit that goes on from it: 32 hex digits. groups: of the optimiser."""
    longer = {"steps"} if section.schedule == "constant" else set()  # a cosine ends where the fit does
    asked = section.model_dump(mode="json", exclude=FREE | longer)
    shapes = {name: list(value.shape) for name, value in trained.items()}
    return records.digest(
        len(objective.examples), json.dumps([asked, shapes, *([groups] if groups > 1 else [])], sort_keys=True)
    )


def save(path: Path, state: State, step: int, identity: str, *, writes: bool) -> None:
    """Puts a checkpoint in place in one step, so that a kill leaves the one before. All workers of a sharded fit call
    it; those for which `writes` is False only lend their pieces."""
    held = {
        "step": step,
        "identity": identity,
        "model": whole({name: value.detach() for name, value in state.trained.items()}),
        "buffers": whole(dict(state.model.named_buffers())),
        "average": whole(state.average),
        "optimizer": whole(state.optimizer.state_dict()),
        "best": {
            "values": whole(state.best_values),
            "buffers": whole(state.best_buffers),
            "loss": state.best_loss,
            "step": state.best_step,
        },
        "stopped": state.stopped,
    }
    if writes:
        staged = path.with_suffix(".tmp")
        torch.save(held, staged)
        staged.replace(path)


def load(path: Path, state: State, identity: str, device: torch.device, *, writes: bool = True) -> int:
    """Reads a checkpoint into the state and returns its step, 0 where there is none. Raises ValueError for one of
    another fit, which is left as it is. writes: whether this worker also cuts the metrics to that step; of workers on
    one folder one does."""
    metrics = path.with_name(METRICS)
    if not path.exists():
        if writes:
            metrics.unlink(missing_ok=True)
        return 0
    held: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if held["identity"] != identity:
        raise ValueError(
            f"a fit must go on from a checkpoint of its own recipe and examples, got one of another in {path.parent}; "
            "name another directory, or remove it to fit anew."
        )
    for name, value in held["model"].items():
        copy_whole(state.trained[name].data, value)
    buffers = dict(state.model.named_buffers())
    for name, value in held["buffers"].items():
        copy_whole(buffers[name], value)
    for name, value in held["average"].items():
        copy_whole(state.average[name], value)
    stepped = [value for group in state.optimizer.param_groups for value in group["params"]]
    state.optimizer.load_state_dict(_cut(held["optimizer"], stepped))
    best = held["best"]
    state.best_values = {name: as_piece(value, state.trained[name]) for name, value in best["values"].items()}
    state.best_buffers = dict(best.get("buffers", {}))
    state.best_loss, state.best_step, state.stopped = best["loss"], best["step"], held["stopped"]
    if writes:
        _drop_metrics_after(metrics, int(held["step"]))
    return int(held["step"])


def _cut(stored: dict[str, Any], trained: list[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state with each tensor of a parameter's shape cut as the parameter is."""
    state = {
        number: {
            name: as_piece(value, trained[number]) if value.shape == trained[number].shape else value
            for name, value in values.items()
        }
        for number, values in stored["state"].items()
    }
    return {**stored, "state": state}


def _drop_metrics_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
