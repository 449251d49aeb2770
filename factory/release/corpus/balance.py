"""Class and source balance of the training split, and what sampling weights make of it (see `quality/balance`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from factory import taxonomy
from factory.quality import balance
from factory.release.corpus.crosstab import (
    Coded,
    CrossTable,
    Flags,
    accepted,
    coded,
    crosstab,
    flags,
    labels,
    sources,
)  # fmt: skip

ALPHAS = (1.0, 0.5, 0.0)  # as they are, square root, equal cells
ALPHA = 0.5  # what the tables by source and by diagnosis are shown at
MAX_REPEAT = 8.0  # a choice of ours, stated beside the numbers


@dataclass(frozen=True)
class Share:
    """A source or a diagnosis of n training images: its share of the draws without and with weights, the effective size
    of each, and how often one of its images is drawn on average while as many are drawn as there are."""

    name: str
    images: int
    before: float
    after: float
    effective_before: float
    effective_after: float
    draws_per_image: float


@dataclass(frozen=True)
class Option:
    """What one alpha comes to. sources: effective number of them; at_cap: images that are drawn max_repeat times."""

    alpha: float
    largest_source: str
    largest_share: float
    sources: float
    malignant_share: float
    effective_size: float
    most_repeats: float
    at_cap: int


@dataclass(frozen=True)
class Cell:
    """A source and a diagnosis of the training split: the probability of each of its images at one draw."""

    source: str
    diagnosis: str
    images: int
    weight: float
    draws_per_image: float


@dataclass(frozen=True)
class Balance:
    """The training split by diagnosis and source, and its weights at `alpha` with a cap of `max_repeat`."""

    images: int
    alpha: float
    max_repeat: float
    table: CrossTable
    by_source: tuple[Share, ...]
    by_diagnosis: tuple[Share, ...]
    options: tuple[Option, ...]
    cells: tuple[Cell, ...]


def count_balance(table: pa.Table, alpha: float = ALPHA, max_repeat: float = MAX_REPEAT) -> Balance | None:
    """Of the accepted rows in `train`; None where there are none."""
    drawn = training(table)
    if not drawn.any():
        return None
    chosen = table.select(["source", "diagnosis", "malignant", "outcome"]).filter(pa.array(drawn))
    of, diagnosis = sources(chosen), coded(chosen["diagnosis"], taxonomy.ALL_DIAGNOSES)
    cells, names = _cells(of, diagnosis)
    weights = balance.sampling_weights(cells, alpha=alpha, max_repeat=max_repeat)
    malignant = labels(chosen).codes == 1
    return Balance(
        int(drawn.sum()), alpha, max_repeat, crosstab(diagnosis, of),
        _shares(of, weights), _shares(diagnosis, weights),
        tuple(_option(cells, of, malignant, a, max_repeat) for a in sorted({*ALPHAS, alpha}, reverse=True)),
        _described(cells, names, weights),
    )  # fmt: skip


def training(table: pa.Table) -> Flags:
    """Which rows a generator is fitted on: accepted and in `train`, (N,)."""
    return accepted(table) & flags(pc.equal(table["split"], "train"))


def _cells(of: Coded, diagnosis: Coded) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """A number per row for its source and diagnosis, and the two words of each number."""
    joint = of.codes * len(diagnosis.words) + diagnosis.codes
    there, cells = np.unique(joint, return_inverse=True)
    names = [divmod(int(cell), len(diagnosis.words)) for cell in there]
    return cells, [(of.words[s], diagnosis.words[d]) for s, d in names]


def _shares(by: Coded, weights: np.ndarray) -> tuple[Share, ...]:
    """Each word of a column, the most frequent first."""
    size = len(by.words)
    images = np.bincount(by.codes, minlength=size)
    after = np.bincount(by.codes, weights, size)
    squares = np.bincount(by.codes, np.square(weights), size)
    rows = [
        Share(
            name, int(images[i]), float(images[i] / len(weights)), float(after[i]), float(images[i]),
            float(after[i] ** 2 / squares[i]) if squares[i] else 0.0, float(after[i] * len(weights) / images[i]),
        )
        for i, name in enumerate(by.words) if images[i]
    ]  # fmt: skip
    return tuple(sorted(rows, key=lambda row: (-row.images, row.name)))


def _option(cells: np.ndarray, of: Coded, malignant: Flags, alpha: float, max_repeat: float) -> Option:
    weights = balance.sampling_weights(cells, alpha=alpha, max_repeat=max_repeat)
    shares, repeats = np.bincount(of.codes, weights, len(of.words)), weights * len(weights)
    largest = int(shares.argmax())
    return Option(
        alpha, of.words[largest], float(shares[largest]), balance.effective_size(shares),
        float(weights[malignant].sum()), balance.effective_size(weights), float(repeats.max()),
        int((repeats > max_repeat * (1 - 1e-9)).sum()),
    )  # fmt: skip


def _described(cells: np.ndarray, names: list[tuple[str, str]], weights: np.ndarray) -> tuple[Cell, ...]:
    images = np.bincount(cells)
    each = np.bincount(cells, weights) / images
    return tuple(
        Cell(source, diagnosis, int(images[i]), float(each[i]), float(each[i] * len(weights)))
        for i, (source, diagnosis) in enumerate(names)
    )
