"""What tests of several floors need: a quiet offline environment, one Ray, tiny real weights, the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
os.environ.update(ENVIRONMENT)  # before any test imports what reads them
os.environ.pop("RAY_ADDRESS", None)  # the tests' cluster is their own
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("untimed")


# Tests outside `tests/runtime` that start a Ray of their own, as a process of the command or of `ray`.
STARTS_RAY = {
    "test_jobs.py", "test_kill.py", "test_notebook.py", "test_corpus_scale.py", "test_bad_input.py", "test_scaling.py",
}  # fmt: skip


# Of tests/runtime, what starts none and must not meet one that another test left running.
WITHOUT_RAY = {
    "test_fit_class_conditional.py", "test_fit_flux.py", "test_fit_inpaint.py", "test_fit_rows.py",
    "test_attempts.py", "test_plan_rounds.py", "test_reproduce.py", "test_units.py", "test_weights_card.py",
}  # fmt: skip


def pytest_itemcollected(item: pytest.Item) -> None:
    """`ray` marks what starts Ray: it runs one after the other, since two Rays would starve each other."""
    with_ray = "ray_cluster" in getattr(item, "fixturenames", ())
    of_runtime = item.path.parent.name == "runtime" and item.path.name not in WITHOUT_RAY
    if with_ray or of_runtime or item.path.name in STARTS_RAY:
        item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def isic2017() -> Path:
    """The published ISIC 2017 archives, side by side; tests on real images are skipped without them."""
    folder = Path(os.environ.get("DERMAFACTORY_ISIC2017") or ROOT / "../shared/data/isic2017").resolve()
    if not folder.is_dir():
        pytest.skip("no ISIC 2017 data here; set DERMAFACTORY_ISIC2017 to its folder")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session, as `runtime/cluster.py` starts it. `connect()` then joins it."""
    from factory.runtime import cluster

    with cluster.connect():
        yield


@dataclass(frozen=True)
class TinyWeights:
    """Real weights too small to draw anything: a generator (32 px to latents of 16 x 16) and a gate on its latents."""

    generator: Path
    gate: Path

    @property
    def overrides(self) -> list[str]:
        """What makes a recipe use them."""
        return [f"synthesize.weights={self.generator}", f"gate.weights={self.gate}", "synthesize.adapter=none"]


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> TinyWeights:
    """A fresh generator directory and a fresh gate, of the classes and in the layout of the shipped ones."""
    import torch

    from factory.models.joint import JointDenoiser, build_starter
    from factory.models.segmenter import LatentSegmenter, save_segmenter

    folder = tmp_path_factory.mktemp("weights")
    torch.set_num_threads(1)
    torch.manual_seed(11)
    build_starter(
        ["a dermoscopic image of a melanoma on dark skin", "This photo depicts a benign lesion."],
        vae={"block_out_channels": (8, 8), "layers_per_block": (0, 1)},
        unet={"block_out_channels": (16, 16), "num_plain_blocks": 1, "num_heads": 2, "norm_num_groups": 4},
        text_encoder={"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32},
        vocab_size=540,
        model_max_length=24,
        head_width=16,
    ).save(folder / "generator")
    digest = JointDenoiser.load(folder / "generator").vae_digest
    save_segmenter(LatentSegmenter(factor=2, width=8), folder / "gate", digest)
    return TinyWeights(folder / "generator", folder / "gate")


@dataclass(frozen=True)
class Said:
    """What one command came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def factory_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`factory_command("verify", "--run", run)` runs the console script's `main` in this process."""
    from factory import cli

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["factory", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return run
