"""A fit whose model is cut over two processes (FSDP2 on gloo): the curve, the checkpoints and the weights of one."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import FSDPModule

from factory.fits.examples import ImageExamples
from factory.fits.loop import Worker, train
from factory.fits.mae import MaeObjective
from factory.fits.objective import RowNoise
from factory.fits.sharding import shard
from factory.images import encode_png
from factory.models.classifier import Normalised, build_classifier
from factory.models.student import TeacherStudent
from factory.recipe import FitSection, MaeSection

SECTION = FitSection(
    steps=8, batch_size=4, learning_rate=0.05, warmup_steps=1, checkpoint_every=2, ema_decay=0.5, validate_every=4
)


class Rows:
    def __init__(self, seed: int) -> None:
        self.x = torch.from_numpy(np.random.default_rng(seed).normal(size=(12, 4))).float()

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {"x": self.x[indices]}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6).requires_grad_(False)  # a frozen base, cut too
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.last(x)


class FitBlocks:
    def __init__(self, stop_at: int | None = None) -> None:
        self.examples, self.held_out, self.stop_at, self.calls = Rows(0), Rows(1), stop_at, 0

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return Blocks()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        self.calls += torch.is_grad_enabled()
        if self.stop_at is not None and self.calls > self.stop_at:
            raise InterruptedError("pulled the plug")
        x = batch["x"]
        return {"loss": (model(x + 0.1 * noise.normal(4)) - x.sum(1, keepdim=True)).square().mean()}

    def save(self, model: nn.Module, directory: Path) -> None:
        torch.save(model.state_dict(), directory / "model.pt")

    def load(self, directory: Path) -> nn.Module:
        raise NotImplementedError


MAE = MaeSection(
    encoder="test_vit", image_size=32, patch_size=8, decoder_width=32, decoder_depth=2, steps=6, batch_size=4,
    warmup_steps=1, checkpoint_every=3, ema_decay=0.5, probe_every=3,
)  # fmt: skip


def _mae() -> MaeObjective:
    drawn = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(6)]
    return MaeObjective(MAE, ImageExamples([encode_png(one) for one in drawn], 32), probe=_weighed)


def _weighed(encoder: Normalised) -> dict[str, float]:
    """A probe that a model in pieces could not answer."""
    total = sum(float(value.detach().abs().sum()) for value in encoder.parameters())
    return {"linear_probe": total / 1e4, "nearest_neighbours": float(encoder.training)}


def _mae_rank(rank: int, port: int, directory: Path) -> None:
    _join(rank, port)
    objective = _mae()
    pieces = list[int]()

    def counted(model: nn.Module) -> nn.Module:
        cut = shard(model)
        pieces.append(sum(isinstance(module, FSDPModule) for module in model.modules()))
        return cut

    model = train(objective, MAE, directory, worker=Worker(rank, 2, shard=counted, mean=_mean))
    assert pieces == [6 + 2 + 1]  # each block of the encoder and of the decoder, then the rest
    if rank == 0:
        objective.save(model, directory)
    pair = TeacherStudent(build_classifier("test_vit", 2, 32), build_classifier("test_efficientnet", 2, 32))
    shard(pair)  # an EfficientNet has lists of blocks in its list of blocks
    given = torch.zeros(2, 3, 32, 32)
    (pair(given)[0].sum() + pair.student(given).sum()).backward()
    distributed.destroy_process_group()


def _rank(rank: int, port: int, directory: Path, stop_at: int | None) -> None:
    _join(rank, port)
    objective = FitBlocks(stop_at)
    # Both start from rank 0's checkpoint; only rank 0 writes.
    worker = Worker(rank, 2, shard=shard, mean=_mean)
    try:
        model = train(objective, SECTION, directory, worker=worker)
    except InterruptedError:
        os._exit(0)  # as a machine that is gone: the other is not told
    if rank == 0:
        objective.save(model, directory)
    distributed.destroy_process_group()


def _join(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")


def _mean(metrics: dict[str, float]) -> dict[str, float]:
    total = torch.tensor(list(metrics.values()), dtype=torch.float64)
    distributed.all_reduce(total)
    return dict(zip(metrics, (total / 2).tolist(), strict=True))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _on_two(directory: Path, stop_at: int | None = None) -> None:
    multiprocessing.spawn(_rank, (_free_port(), directory, stop_at), nprocs=2)


def _curve(directory: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def test_a_fit_in_pieces_goes_on_from_its_checkpoint_and_is_that_of_one_process(tmp_path: Path) -> None:
    alone = FitBlocks()
    alone.save(train(alone, SECTION, tmp_path / "one"), tmp_path / "one")
    _on_two(tmp_path / "two", stop_at=5)
    assert [row["step"] for row in _curve(tmp_path / "two")] == [2, 4]
    _on_two(tmp_path / "two")
    assert len(_curve(tmp_path / "two")) == 4
    for one, two in zip(_curve(tmp_path / "one"), _curve(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    mine, theirs = (torch.load(tmp_path / name / "model.pt") for name in ("one", "two"))
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-5)
    # Its checkpoint is one that a fit in one piece reads.
    again = FitBlocks()
    train(again, SECTION, tmp_path / "two")
    assert again.calls == 0


def test_a_masked_autoencoder_in_pieces_is_that_of_one_process(tmp_path: Path) -> None:
    alone = _mae()
    alone.save(train(alone, MAE, tmp_path / "one"), tmp_path / "one")
    multiprocessing.spawn(_mae_rank, (_free_port(), tmp_path / "two"), nprocs=2)
    for one, two in zip(_curve(tmp_path / "one"), _curve(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-4)
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-4, rtol=1e-4)
