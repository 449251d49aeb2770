"""What the train loop asks of an objective, and the randomness it hands out.

Resume rests on one integer, the global step. Which rows make a batch is a function of (seed, step); the noise of
a row is a function of (seed, step, row). Neither knows how many workers there are, so a fit that stops, moves to
another number of workers and goes on sees the same samples with the same noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn


class Examples(Protocol):
    """Random access to training rows."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The rows at these indices, stacked: every tensor has len(indices) as its first dimension."""
        ...


class RowNoise:
    """Random numbers for the rows of one batch, each drawn from its own (seed, step, row) stream.

    Calls are ordered: the same sequence of calls gives the same numbers for a row, whatever the batch around it.
    """

    def __init__(self, seed: int, step: int, rows: np.ndarray) -> None:
        states = [np.random.SeedSequence([seed, step, int(row)]).generate_state(1, np.uint64)[0] for row in rows]
        self._rngs = [torch.Generator().manual_seed(int(state) >> 1) for state in states]

    def __len__(self) -> int:
        return len(self._rngs)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, (B, *shape)."""
        return torch.stack([torch.randn(shape, generator=rng) for rng in self._rngs])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape)."""
        return torch.stack([torch.rand(shape, generator=rng) for rng in self._rngs])

    def integers(self, high: int) -> Tensor:
        """Whole numbers in [0, high), (B,)."""
        return torch.stack([torch.randint(high, (), generator=rng) for rng in self._rngs])


@runtime_checkable
class Bucketed(Protocol):
    """Examples of several shapes, which choose the rows of a batch themselves so that one batch has one shape."""

    def rows_of_step(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Indices of the global batch of a step; a function of its arguments and the examples alone."""
        ...


class Objective(Protocol):
    """One fit. The model that `build` returns may hold frozen parts: what trains has `requires_grad`."""

    @property
    def examples(self) -> Examples: ...

    def build(self) -> nn.Module:
        """The model at step 0."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        """Scalars by name; `loss` is minimised, the others are reported. All are means over the batch's rows."""
        ...

    def save(self, model: nn.Module, directory: Path) -> None:
        """Writes the fitted weights in the ecosystem's layout (safetensors)."""
        ...

    def load(self, directory: Path) -> nn.Module:
        """The model that `save` wrote."""
        ...


def batch_rows(examples: Examples, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Indices of the global batch of a step: the examples' own choice where they have one, else `rows_of_step`."""
    if isinstance(examples, Bucketed):
        return examples.rows_of_step(seed, step, batch_size)
    return rows_of_step(seed, step, batch_size, len(examples))


def rows_of_step(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Indices of the global batch of a step: whole shuffled passes over the examples, laid end to end.

    Example: with 10 examples and batches of 4, step 2 holds the last 2 rows of pass 0 and the first 2 of pass 1.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    passes = positions // num_examples
    wanted = set(passes.tolist())
    orders = {number: np.random.default_rng([seed, number]).permutation(num_examples) for number in wanted}
    return np.array([orders[position // num_examples][position % num_examples] for position in positions.tolist()])
