"""The loss on held-out rows, and when a fit has learned all that they can show.

Rows, their noise and the batches they are taken in never change, so the losses of two steps compare, and those of two
numbers of workers are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from factory.fits.checkpoint import State
from factory.fits.objective import Examples, RowNoise, evenly
from factory.fits.sharding import copy_whole, whole

MAX_ROWS = 256
_STEP = 2**31 - 1  # in the place of a step in the seed of the noise: no fit gets there


class HeldOut:
    """Validation of one fit on MAX_ROWS of its held-out examples, evenly over all, for they lie in the order of their
    sources and classes; at most `batch_size` rows at a time."""

    def __init__(self, examples: Examples, seed: int, batch_size: int, rank: int, world_size: int) -> None:
        self.examples, self.seed, self.rank, self.world_size = examples, seed, rank, world_size
        rows = evenly(len(examples), MAX_ROWS)
        of_bucket = np.split(rows, np.searchsorted(rows, getattr(examples, "starts", [0])[1:]))  # a batch is of one
        self.chunks = [own[start : start + batch_size] for own in of_bucket for start in range(0, len(own), batch_size)]

    @torch.no_grad()
    def sums(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """The weighted losses of this worker's chunks; the mean of these over workers, `loss` by `rows`, is the loss.

        All workers make equally many calls, because the pieces of a sharded model are gathered by all at once.
        """
        total = {"loss": 0.0, "rows": 0.0}
        for turn in range(-(-len(self.chunks) // self.world_size)):
            number = turn * self.world_size + self.rank
            rows = self.chunks[min(number, len(self.chunks) - 1)]
            batch = {name: value.to(device) for name, value in self.examples.batch(rows).items()}
            loss = module(batch, RowNoise(self.seed, _STEP, rows))["loss"]
            if number < len(self.chunks):
                total["loss"] += float(loss) * len(rows)
                total["rows"] += len(rows)
        return total


def note(state: State, loss: float, step: int, validate_every: int, patience: int) -> None:
    """Keeps the values if their loss is the best so far; stops the fit after `patience` losses that were not."""
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, step
        if patience:
            state.best_values = {name: value.clone() for name, value in values_of(state).items()}
            state.best_buffers = {name: value.clone() for name, value in state.model.named_buffers()}
    elif patience and step - state.best_step >= patience * validate_every:
        state.stopped = True


def values_of(state: State) -> dict[str, Tensor]:
    """The values that the fit would end with now: averaged, where it keeps an average."""
    return state.average or {name: value.detach() for name, value in state.trained.items()}


@contextmanager
def averaged(state: State) -> Iterator[None]:
    """Within it the model holds its averaged values, and neither dropout nor anything else of training."""
    held = {name: value.detach().clone() for name, value in state.trained.items()} if state.average else {}
    modes = [(module, module.training) for module in state.model.modules()]
    _put(state, state.average)
    state.model.eval()
    try:
        yield
    finally:
        _put(state, held)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _put(state: State, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        state.trained[name].data.copy_(value)


def finish(state: State) -> None:
    """The model at its end: with the values of the best held-out loss if it was stopped by it, else its average."""
    _put(state, state.best_values if state.best_values else state.average)
    buffers = dict(state.model.named_buffers())
    for name, value in state.best_buffers.items():
        buffers[name].copy_(value)


def whole_values(state: State) -> dict[str, Tensor]:
    """The model's trained values and its buffers, put together; all workers of a sharded fit call it."""
    trained: dict[str, Tensor] = whole({name: value.detach() for name, value in state.trained.items()})
    buffers: dict[str, Tensor] = whole(dict(state.model.named_buffers()))
    return trained | buffers


def put_whole(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Whole values written into a model that is not sharded."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in values.items():
        copy_whole(own[name].data, value)
    return model
