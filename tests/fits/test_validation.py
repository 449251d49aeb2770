"""What is kept of the best held-out loss, and which rows it is taken on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from factory.fits import checkpoint
from factory.fits.checkpoint import State
from factory.fits.loop import Worker, _Batches, train
from factory.fits.objective import RowNoise, evenly
from factory.fits.validation import HeldOut, finish, note, put_whole, whole_values
from factory.recipe import FitSection


class Ordered:
    """Rows that lie in the order of their classes, as a corpus has them."""

    def __init__(self, count: int, starts: list[int] | None = None) -> None:
        self.count = count
        if starts is not None:
            self.starts = [*starts, count]

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        rows = torch.from_numpy(indices)
        return {"x": torch.stack([rows.float(), rows.float() ** 2], 1), "label": (rows >= self.count // 2).long()}


class WithBatchNorm:
    """A network whose running means change with every step, and whose held-out loss rises from the third one on."""

    def __init__(self) -> None:
        self.examples, self.held_out, self.validated = Ordered(12), Ordered(4), 0

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["label"])
        if model.training:
            return {"loss": loss}
        self.validated += 1
        return {"loss": loss * 0 + abs(self.validated - 2)}

    def save(self, model: nn.Module, directory: Path) -> None:
        raise NotImplementedError

    load = save  # type: ignore[assignment]


def _state(model: nn.Module) -> State:
    trained = dict(model.named_parameters())
    return State(model, trained, torch.optim.AdamW(trained.values()))


def test_the_best_weights_come_back_with_the_running_means_that_they_were_judged_with(tmp_path: Path) -> None:
    section = FitSection(steps=6, batch_size=4, validate_every=1, patience=4, checkpoint_every=1, learning_rate=0.1)
    stopped = train(WithBatchNorm(), section, tmp_path / "whole").state_dict()
    early = train(
        WithBatchNorm(), section.model_copy(update={"steps": 2, "patience": 0}), tmp_path / "two"
    ).state_dict()
    assert all(torch.equal(stopped[name], value) for name, value in early.items())


def test_running_means_of_the_best_loss_go_through_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    state = _state(model)
    model(torch.tensor([[1.0, 2.0], [3.0, 8.0]])).sum().backward()
    state.optimizer.step()
    best = {name: value.clone() for name, value in model.state_dict().items()}
    note(state, 1.0, step=1, validate_every=1, patience=2)
    model(torch.tensor([[50.0, 2.0], [30.0, 8.0]]))
    assert not torch.equal(model.state_dict()["0.running_mean"], best["0.running_mean"])
    checkpoint.save(tmp_path / "state.pt", state, 2, "id", writes=True)
    other = _state(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    assert checkpoint.load(tmp_path / "state.pt", other, "id", torch.device("cpu")) == 2
    finish(other)
    assert all(torch.equal(value, best[name]) for name, value in other.model.state_dict().items())


def test_a_whole_copy_has_the_running_means_too() -> None:
    model, copy = (nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)) for _ in range(2))
    model(torch.tensor([[1.0, 2.0], [3.0, 8.0]]))
    put_whole(copy, whole_values(_state(model)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in copy.state_dict().items())


def test_held_out_rows_are_taken_evenly_over_all_for_classes_lie_one_after_the_other() -> None:
    chunks = HeldOut(Ordered(1000), 0, 8, 0, 1).chunks
    rows = np.concatenate(chunks)
    assert len(rows) == 256 and rows[0] == 0 and rows[-1] == 999 and max(map(len, chunks)) == 8
    assert abs((rows >= 500).mean() - 0.5) < 0.01
    assert np.concatenate(HeldOut(Ordered(7), 0, 8, 0, 1).chunks).tolist() == list(range(7))


def test_a_batch_of_held_out_rows_is_of_one_bucket() -> None:
    chunks = HeldOut(Ordered(1000, starts=[0, 130, 700]), 0, 8, 0, 1).chunks
    buckets = [set(np.searchsorted([130, 700], chunk, side="right").tolist()) for chunk in chunks]
    assert all(len(found) == 1 for found in buckets) and set().union(*buckets) == {0, 1, 2}
    assert len(np.concatenate(chunks)) == 256


@pytest.mark.parametrize(("count", "most", "rows"), [(3, 5, [0, 1, 2]), (5, 3, [0, 2, 4]), (1, 1, [0])])
def test_evenly(count: int, most: int, rows: list[int]) -> None:
    assert evenly(count, most).tolist() == rows


def test_the_parts_of_a_batch_are_alike_so_that_none_is_of_one_row() -> None:
    section = FitSection(batch_size=9, micro_batch=8, steps=1)
    with _Batches(WithBatchNorm(), section, Worker(), 0) as batches:
        parts, _ = batches.of(0)
    assert [len(rows) for rows, _ in parts] == [5, 4]
