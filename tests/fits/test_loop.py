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
from factory.fits.objective import Groups, RowNoise, rows_of_step
from factory.recipe import FitSection, MaeSection

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


@pytest.mark.parametrize("size", [2, 3, 4])  # 3 do not divide the batch of 8
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
    with pytest.raises(
        ValueError,
        match=r"must stay finite, got (nan|inf) at step 4; fit anew with a lower learning_rate: no checkpoint was",
    ):
        train(FitLine(spoil_at=3), SECTION, tmp_path)


def test_a_batch_that_leaves_a_worker_without_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must give each worker a row, got 8 over 9; choose a multiple of"):
        train(FitLine(), SECTION, tmp_path, worker=Worker(0, 9))
    with pytest.raises(ValueError, match="must divide over the workers of a sharded fit, got 8 over 3; choose"):
        train(FitLine(), SECTION, tmp_path, worker=Worker(0, 3, shard=lambda model: model))


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path: Path, micro_batch: int) -> None:
    train(FitLine(), SECTION, tmp_path / "whole")
    train(FitLine(), SECTION.model_copy(update={"micro_batch": micro_batch}), tmp_path / "parts")
    for one, many in zip(curve(tmp_path / "whole"), curve(tmp_path / "parts"), strict=True):
        assert many == pytest.approx(one, abs=1e-5)


def test_a_checkpoint_of_another_recipe_is_refused_and_kept(tmp_path: Path) -> None:
    train(FitLine(), SECTION, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for changed in ({"learning_rate": 0.1}, {"schedule": "cosine"}, {"seed": 1}):
        with pytest.raises(ValueError, match="go on from a checkpoint of its own recipe and examples, got one of an"):
            train(FitLine(), SECTION.model_copy(update=changed), tmp_path)
    with pytest.raises(ValueError, match="own recipe and examples"):
        train(FitLine(count=21), SECTION, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_fit_may_be_made_longer_unless_its_learning_rate_ends_with_it(tmp_path: Path) -> None:
    short, long = (SECTION.model_copy(update={"steps": steps}) for steps in (12, 24))
    whole = train(FitLine(), long, tmp_path / "whole")
    train(FitLine(), short, tmp_path / "parts")
    assert values(train(FitLine(), long, tmp_path / "parts")) == values(whole)
    short, long = (section.model_copy(update={"schedule": "cosine"}) for section in (short, long))
    train(FitLine(), short, tmp_path / "cosine")
    with pytest.raises(ValueError, match="go on from a checkpoint of its own recipe"):
        train(FitLine(), long, tmp_path / "cosine")


def test_what_only_says_who_computes_may_change_on_the_way(tmp_path: Path) -> None:
    train(FitLine(), SECTION, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(FitLine(stop_at=13), SECTION, tmp_path / "cut")
    other = SECTION.model_copy(update={"num_workers": 3, "micro_batch": 5})
    train(FitLine(), other, tmp_path / "cut")
    assert [row["step"] for row in curve(tmp_path / "cut")] == [row["step"] for row in curve(tmp_path / "whole")]
    for one, many in zip(curve(tmp_path / "whole"), curve(tmp_path / "cut"), strict=True):
        assert many == pytest.approx(one, abs=1e-5)


class FitTooFew(FitLine):
    """Six noisy rows, which four weights learn by heart, and held-out rows that show it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(count=6, **options)
        rng = np.random.default_rng(1)
        self.held_out = Line(9)
        for rows in (self.examples, self.held_out):
            rows.y = rows.y + torch.from_numpy(rng.normal(size=(len(rows), 1))).float()

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1))


STOPPING = SECTION.model_copy(
    update={"steps": 400, "validate_every": 10, "patience": 4, "ema_decay": 0.0, "learning_rate": 0.01}
)


def test_a_fit_stops_when_held_out_rows_say_so_and_ends_with_its_best_values(tmp_path: Path) -> None:
    model = train(FitTooFew(), STOPPING, tmp_path)
    losses = {row["step"]: row["validation_loss"] for row in curve(tmp_path) if "validation_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 40 < 400
    objective = FitTooFew()
    batch = objective.held_out.batch(np.arange(9))
    with torch.no_grad():  # the noise on the inputs is 0.01
        again = float(objective.loss(model, batch, RowNoise(0, 0, np.arange(9)))["loss"])
    assert again == pytest.approx(losses[best], rel=0.05)
    assert again < losses[max(losses)]


def test_a_fit_that_was_stopped_before_it_stopped_itself_stops_at_the_same_step(tmp_path: Path) -> None:
    whole = train(FitTooFew(), STOPPING, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(FitTooFew(stop_at=15), STOPPING, tmp_path / "cut")
    resumed = train(FitTooFew(), STOPPING, tmp_path / "cut")
    assert values(resumed) == values(whole)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    again = FitTooFew()
    assert values(train(again, STOPPING, tmp_path / "cut")) == values(whole)
    assert again.calls == 0


def test_held_out_losses_do_not_depend_on_the_number_of_workers() -> None:
    from factory.fits.loop import _LossModule
    from factory.fits.validation import HeldOut

    objective = FitTooFew()
    module = _LossModule(objective, objective.build(), "float32", torch.device("cpu"))
    alone = HeldOut(objective.held_out, 5, 2, 0, 1).sums(module, torch.device("cpu"))
    shared = [HeldOut(objective.held_out, 5, 2, rank, 3).sums(module, torch.device("cpu")) for rank in range(3)]
    assert alone["rows"] == 9 == sum(part["rows"] for part in shared)
    assert alone["loss"] == pytest.approx(sum(part["loss"] for part in shared), rel=1e-6)


def test_a_held_out_batch_is_of_one_bucket() -> None:
    from factory.fits.validation import HeldOut

    rows = Line(11)
    rows.starts = np.array([0, 3, 9, 11])  # type: ignore[attr-defined]
    chunks = [chunk.tolist() for chunk in HeldOut(rows, 0, 4, 0, 1).chunks]
    assert chunks == [[0, 1, 2], [3, 4, 5, 6], [7, 8], [9, 10]]


def test_a_fit_that_is_to_be_held_to_rows_that_are_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validate_every must have held-out rows, got none; raise corpus.val_share"):
        train(FitLine(), STOPPING, tmp_path)


class Grids:
    """A preview that notes what it is given; from `from_step` on, half of a grid is memorised."""

    def __init__(self, from_step: int = 10**6) -> None:
        self.from_step, self.steps, self.weights = from_step, [], []  # type: ignore[var-annotated]

    def start(self, step: int, weights: Path) -> None:
        self.steps.append(step)
        self.weights.append(torch.load(weights / "model.pt"))

    def result(self) -> dict[str, float]:
        return {"memorised": 0.5 if self.steps[-1] >= self.from_step else 0.0}


def test_grids_are_drawn_from_the_average_and_change_nothing(tmp_path: Path) -> None:
    section, grids = SECTION.model_copy(update={"preview_every": 6}), Grids()
    drawn = train(FitLine(), section, tmp_path / "drawn", preview=grids)
    plain = train(FitLine(), SECTION, tmp_path / "plain")
    assert values(drawn) == values(plain)
    assert grids.steps == [6, 12, 18, 24]
    last = torch.cat([value.flatten() for value in grids.weights[-1].values() if value.ndim])
    assert last.tolist() == values(drawn)  # the averaged weights of the last step, which are the fit's own
    # A grid is settled when the next one is due.
    assert {row["step"] for row in curve(tmp_path / "drawn") if "memorised" in row} == {12, 18, 24}


def test_a_fit_whose_samples_are_learned_by_heart_stops(tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"preview_every": 3, "max_memorised": 0.2})
    train(FitLine(), section, tmp_path, preview=Grids(from_step=9))
    assert curve(tmp_path)[-1]["step"] == 12
    assert curve(tmp_path)[-1]["memorised"] == 0.5


def test_groups_are_shown_equally_often_and_every_row_of_one_before_any_twice() -> None:
    diagnoses, sources = list("aaaaaaaabb"), list("xxxxxxyyxy")
    groups = Groups(diagnoses, sources)
    shown = np.concatenate([groups.rows_of_step(3, step, 5) for step in range(24)])  # 120 rows: 60 rounds over a and b
    assert len(shown) == 120
    count = lambda wanted: sum(diagnoses[row] + sources[row] == wanted for row in shown)  # noqa: E731
    assert [count(name) for name in ("ax", "ay", "bx", "by")] == [30, 30, 30, 30]
    of_ax = [int(row) for row in shown if row < 6]
    assert all(sorted(of_ax[start : start + 6]) == list(range(6)) for start in range(0, 30, 6))
    assert of_ax[:6] != of_ax[6:12]
    again = np.concatenate([Groups(diagnoses, sources).rows_of_step(3, step, 20) for step in range(6)])
    assert again.tolist() == shown.tolist()  # a function of the position alone, whatever the batch
    assert Groups(diagnoses, sources).rows_of_step(4, 0, 20).tolist() != again[:20].tolist()


def test_a_fit_with_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fit needs at least one example, got none; ingest and caption a corpus"):
        train(FitLine(count=0), SECTION, tmp_path)


@pytest.mark.parametrize(("precision", "products"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_have_the_precision_that_is_asked_for_and_weights_and_losses_are_float32(
    tmp_path: Path, precision: str, products: torch.dtype
) -> None:
    seen = set[torch.dtype]()

    class Watched(FitLine):
        def build(self) -> nn.Module:
            model = super().build()
            model[0].register_forward_hook(lambda module, given, found: seen.add(found.dtype))  # type: ignore[index]
            return model

        @property
        def held_out(self) -> Line:
            return Line(6)

        def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
            found = super().loss(model, batch, noise)
            assert found["loss"].dtype == torch.float32
            return found

    section = SECTION.model_copy(update={"precision": precision, "validate_every": 12})
    model = train(Watched(), section, tmp_path)
    assert seen == {products}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    losses = [row["loss"] for row in curve(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_optimiser_has_the_betas_of_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    plain = torch.optim.AdamW

    def watched(*arguments: Any, betas: tuple[float, float], **options: Any) -> Any:
        seen.append(betas)
        return plain(*arguments, betas=betas, **options)

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    for section in (SECTION, MaeSection()):
        small = SECTION.model_copy(update={"steps": 1, "beta2": section.beta2})
        train(FitLine(), small, tmp_path / str(section.beta2))
    assert seen == [(0.9, 0.999), (0.9, 0.95)]
