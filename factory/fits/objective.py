"""What the train loop asks of an objective, and the randomness it hands out.

Resume rests on one integer, the global step. Which rows make a batch is a function of (seed, step); the noise of
a row is a function of (seed, step, row). Neither knows how many workers there are, so a fit that stops, moves to
another number of workers and goes on sees the same samples with the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of the rows 0 to count - 1, evenly over all, (N,) int64."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """An optimiser's groups of all that trains, as timm makes them: no weight decay for biases and norms."""
    from timm.optim import param_groups_weight_decay

    groups: list[dict[str, Any]] = param_groups_weight_decay(model, weight_decay)
    return groups


@runtime_checkable
class Bucketed(Protocol):
    """Examples of several shapes, which choose the rows of a batch themselves so that one batch has one shape."""

    def rows_of_step(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Indices of the global batch of a step; a function of its arguments and the examples alone."""
        ...


@runtime_checkable
class Balanced(Protocol):
    """Examples whose groups are shown equally often, if `groups` is not None."""

    groups: Groups | None


class Objective(Protocol):
    """One fit. The model that `build` returns may hold frozen parts: what trains has `requires_grad`.

    An objective may also have `held_out`, Examples that it never trains on and that its fit is stopped by, and
    `parameter_groups(model)`, an optimiser's groups of all that trains; `lr_scale` in one scales its learning rate.
    """

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
    """Indices of the global batch of a step: the examples' own choice where they have one, balanced over their groups
    where they have some, else `rows_of_step`."""
    if isinstance(examples, Bucketed):
        return examples.rows_of_step(seed, step, batch_size)
    if isinstance(examples, Balanced) and examples.groups is not None:
        return examples.groups.rows_of_step(seed, step, batch_size)
    return rows_of_step(seed, step, batch_size, len(examples))


def rows_of_step(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Indices of the global batch of a step: whole shuffled passes over the examples, laid end to end.

    Example: with 10 examples and batches of 4, step 2 holds the last 2 rows of pass 0 and the first 2 of pass 1.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    places = (divmod(position, num_examples) for position in positions)
    return np.array([_shuffled((seed, number), num_examples)[place] for number, place in places])


class Groups:
    """Rows in groups in groups (diagnoses, and the sources of each), drawn in rounds instead of passes.

    columns: a value per row, (N,) each, the outermost grouping first. In each round every outermost group has one turn,
    in a shuffled order; at its turn it gives the next row of its own rounds, and a group without groups in it the next
    row of its own shuffled passes.
    """

    def __init__(self, *columns: Sequence[str] | Sequence[int] | np.ndarray) -> None:
        self._tree = _grouped([np.asarray(column) for column in columns], np.arange(len(columns[0])))

    def rows_of_step(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Indices of the global batch of a step."""
        positions = range(step * batch_size, (step + 1) * batch_size)
        return np.array([_pick(self._tree, (seed,), position) for position in positions])


_Tree = list["_Tree"] | np.ndarray  # groups in groups; the innermost are row numbers


def _grouped(columns: Sequence[np.ndarray], rows: np.ndarray) -> _Tree:
    if not columns:
        return rows
    own = columns[0][rows]
    return [_grouped(columns[1:], rows[own == value]) for value in np.unique(own)]


def _pick(tree: _Tree, path: tuple[int, ...], turn: int) -> int:
    """What a group gives at its turn, 0, 1, ...; path names it for its shuffles."""
    number, place = divmod(turn, len(tree))
    chosen = int(_shuffled((*path, number), len(tree))[place])
    return int(tree[chosen]) if isinstance(tree, np.ndarray) else _pick(tree[chosen], (*path, chosen), number)


@lru_cache(maxsize=128)
def _shuffled(seed: tuple[int, ...], count: int) -> np.ndarray:
    """0 to count - 1 in an order of their own, (count,) int32; kept, because one serves many rows of many steps."""
    return np.random.default_rng(seed).permutation(count).astype(np.int32)
