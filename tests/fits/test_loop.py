"""The train loop: it learns, it resumes to the last bit, and the number of workers changes nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from factory.fits.loop import CHECKPOINT, Progress, Worker, learning_rate, train
from factory.fits.objective import RowNoise, rows_of_step
from factory.recipe import FitSection

SECTION = FitSection(
    steps=24, batch_size=8, learning_rate=0.05, warmup_steps=2, checkpoint_every=6, ema_decay=0.9, weight_decay=0.0
)


class Line:
    """Rows x (N, 3) with y = x w: what a linear layer can learn exactly."""

    def __init__(self, count: int = 20) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.normal(size=(count, 3))).float()
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]])

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {"x": self.x[indices], "y": self.y[indices]}


_SEEDING = threading.Lock()  # the global seed is one for all ranks that are threads


class FitLine:
    """Least squares on inputs with a little noise, so that the noise's order matters too. `stop_at` raises in the
    middle of that step, `spoil_at` makes its loss infinite."""

    def __init__(self, count: int = 20, stop_at: int | None = None, spoil_at: int | None = None) -> None:
        self.examples, self.stop_at, self.spoil_at = Line(count), stop_at, spoil_at
        self.calls = 0

    def build(self) -> nn.Module:
        with _SEEDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return nn.Sequential(
                nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None, affine=False).eval(), nn.Linear(4, 1)
            )

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls - 1 == self.stop_at:
            raise InterruptedError("pulled the plug")
        error = model(batch["x"] + 0.01 * noise.normal(3)) - batch["y"]
        loss = error.square().mean() * (float("inf") if self.calls - 1 == self.spoil_at else 1.0)
        return {"loss": loss, "absolute": error.detach().abs().mean()}

    def save(self, model: nn.Module, directory: Path) -> None:
        torch.save(model.state_dict(), directory / "model.pt")

    def load(self, directory: Path) -> nn.Module:
        model = self.build()
        model.load_state_dict(torch.load(directory / "model.pt"))
        return model


def curve(directory: Path) -> list[dict[str, float]]:
    """The logged metrics without what a clock says."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def values(model: nn.Module) -> list[float]:
    return torch.cat([value.detach().flatten() for value in model.state_dict().values() if value.ndim]).tolist()


def test_the_loss_falls_to_what_the_noise_leaves(tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"steps": 300, "checkpoint_every": 100, "ema_decay": 0.0})
    train(FitLine(), section, tmp_path)
    losses = [row["loss"] for row in curve(tmp_path)]
    # y's variance is 1 + 4 + 0.25; noise of 0.01 on the inputs leaves about 5.25e-4.
    assert losses[0] > 0.5
    assert losses[-1] < 3e-3
    assert [row["step"] for row in curve(tmp_path)] == list(range(10, 301, 10))


@pytest.mark.parametrize("stop_at", [0, 5, 6, 17, 23])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole = train(FitLine(), SECTION, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(FitLine(stop_at=stop_at), SECTION, tmp_path / "cut")
    again = FitLine()
    resumed = train(again, SECTION, tmp_path / "cut")
    assert again.calls == SECTION.steps - stop_at // 6 * 6  # it went on from the last checkpoint
    assert values(resumed) == values(whole)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_fit_that_is_done_trains_no_more_and_gives_the_same_average(tmp_path: Path) -> None:
    first = train(FitLine(), SECTION, tmp_path)
    again = FitLine()
    assert values(train(again, SECTION, tmp_path)) == values(first)
    assert again.calls == 0


def test_every_checkpoint_has_been_logged_when_it_is_reported(tmp_path: Path) -> None:
    # A checkpoint travels with its metrics, so a fit that checkpoints before its first log line must have one too.
    seen: list[tuple[int, int, bool]] = []

    def report(progress: Progress) -> None:
        assert progress.checkpoint == tmp_path / CHECKPOINT and progress.checkpoint.exists()
        assert progress.metrics["loss"] == pytest.approx(curve(tmp_path)[-1]["loss"], abs=1e-6)
        seen.append((progress.step, int(curve(tmp_path)[-1]["step"]), progress.done))

    train(FitLine(), SECTION.model_copy(update={"steps": 7, "checkpoint_every": 3}), tmp_path, report=report)
    assert seen == [(3, 3, False), (6, 6, False), (7, 7, True)]


class Ring:
    """Data parallelism of `size` ranks in threads: gradients and metrics are averaged over all, as processes do."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.mailbox = size, threading.Barrier(size, timeout=60), [None] * size

    def mean(self, rank: int, value: Any) -> Any:
        self.mailbox[rank] = value
        self.barrier.wait()
        total = sum(self.mailbox) / self.size  # type: ignore[arg-type]
        self.barrier.wait()  # nobody writes before all have read
        return total

    def worker(self, rank: int) -> Worker:
        def share(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad = self.mean(rank, parameter.grad)

        def wrap(module: nn.Module) -> nn.Module:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(share)
            return module

        def mean(metrics: dict[str, float]) -> dict[str, float]:
            return {name: self.mean(rank, value) for name, value in metrics.items()}

        return Worker(rank, self.size, wrap=wrap, mean=mean)


def _train_on(size: int, directory: Path, start: Callable[..., Any]) -> None:
    ring = Ring(size)
    threads = [
        threading.Thread(target=start, args=(FitLine(), SECTION, directory / str(rank)), kwargs={"worker": worker})
        for rank, worker in enumerate(map(ring.worker, range(size)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_workers_does_not_change_what_is_learned(tmp_path: Path, size: int) -> None:
    train(FitLine(), SECTION, tmp_path / "one")
    _train_on(size, tmp_path, train)
    alone, together = curve(tmp_path / "one"), curve(tmp_path / "0")
    assert [row["step"] for row in together] == [row["step"] for row in alone]
    for one, many in zip(alone, together, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert many["absolute"] == pytest.approx(one["absolute"], abs=1e-5)
    assert not (tmp_path / "1" / "metrics.jsonl").exists()  # rank 0 alone logs


def test_the_rows_of_a_step_are_whole_passes_whoever_asks() -> None:
    shown = np.concatenate([rows_of_step(5, step, 4, 10) for step in range(5)])
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    assert shown[:10].tolist() != shown[10:].tolist()


def test_a_rows_noise_depends_on_seed_step_and_row_alone() -> None:
    among = RowNoise(1, 2, np.array([4, 7, 9]))
    alone = RowNoise(1, 2, np.array([7]))
    assert len(among) == 3
    for draw in (lambda noise: noise.normal(2), lambda noise: noise.uniform(1), lambda noise: noise.integers(1000)):
        assert torch.equal(draw(among)[1], draw(alone)[0])
    assert not torch.equal(RowNoise(1, 3, np.array([7])).normal(2), RowNoise(1, 2, np.array([7])).normal(2))


def test_the_learning_rate_warms_up_and_a_cosine_ends_near_zero() -> None:
    section = SECTION.model_copy(update={"steps": 100, "warmup_steps": 10, "learning_rate": 1.0})
    assert [learning_rate(section, step) for step in (0, 4, 9, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    cosine = section.model_copy(update={"schedule": "cosine"})
    assert [learning_rate(cosine, step) for step in (4, 10, 55, 100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_a_loss_that_is_not_finite_stops_the_fit_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss must stay finite, got (nan|inf) at step 3; lower the"):
        train(FitLine(spoil_at=3), SECTION, tmp_path)


def test_a_batch_that_the_workers_cannot_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must divide over the workers, got 8 over 3; choose a multiple of"):
        train(FitLine(), SECTION, tmp_path, worker=Worker(0, 3))


def test_a_fit_with_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fit needs at least one example, got none; ingest and caption a corpus"):
        train(FitLine(count=0), SECTION, tmp_path)
