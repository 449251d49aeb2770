"""Weights of a run in a bucket: each machine fetches its own copy, wherever the driver keeps its."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from factory.models.weights import STARTER
from factory.recipe import Recipe, load
from factory.run import Run
from factory.runtime import weights
from factory.storage import S3Store


@pytest.fixture
def run(s3: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run in a bucket with a fitted adapter and a gate."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("lora-joint", "gate-joint"):
        folder = tmp_path / "fitted" / name
        folder.mkdir(parents=True)
        (folder / "card.json").write_text(json.dumps({"name": name}))
        (folder / "weights.safetensors").write_bytes(name.encode())
        Run(s3.uri).put_weights(name, folder)
    return Run(s3.uri)


def _recipe() -> Recipe:
    return load(None, ["gate.weights=gate-joint"])


def test_another_machine_finds_an_adapter_that_only_the_driver_has_a_copy_of(run: Run) -> None:
    generator, adapter, gate = weights.weights_of(run, _recipe())
    assert generator == STARTER and adapter is not None
    assert weights.generator_here(run, _recipe(), str(generator), str(adapter)) == (generator, adapter)
    for copy in (adapter, gate):
        shutil.rmtree(copy)  # as on a machine that is not the driver's
    found = weights.generator_here(run, _recipe(), str(generator), str(adapter))[1]
    assert found is not None and (found / "weights.safetensors").read_bytes() == b"lora-joint"
    assert (weights.gate_here(run.uri, _recipe()) / "weights.safetensors").read_bytes() == b"gate-joint"


def test_a_base_without_an_adapter_is_where_the_recipe_says(run: Run, tmp_path: Path) -> None:
    assert weights.generator_here(run, _recipe(), tmp_path, None) == (tmp_path, None)
