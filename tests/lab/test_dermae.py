"""DerMAE's table: which rows meet which, every cell once, a sweep that goes on, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import tiny_dermae
import torch
from tiny_dermae import CLASSES, FIT, SECTION

from factory import records
from factory.fits.classifiers import load_classifier
from factory.lab import dermae
from factory.lab.dermae_rows import rows_of
from factory.lab.intervals import over_seeds
from factory.recipe import DermaeSection, FinetuneSection, NetworkSection
from factory.storage import open_store


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    torch.set_num_threads(1)
    return tiny_dermae.corpus()


@pytest.fixture(scope="module")
def samples() -> pa.Table:
    return tiny_dermae.samples()


@pytest.fixture(scope="module")
def run(corpus: pa.Table, samples: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A sweep that was stopped after its third cell, and went on."""
    folder, said = tmp_path_factory.mktemp("run"), []  # type: tuple[Path, list[str]]

    def stopping(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dermae.run_table(open_store(str(folder)), folder, corpus, samples, SECTION, progress=stopping)
    before = {file.name: file.stat().st_mtime_ns for file in (folder / dermae.CELLS).iterdir()}
    assert len(before) == 3 and not (folder / dermae.SUMMARY).exists()
    dermae.run_table(open_store(str(folder)), folder, corpus, samples, SECTION, progress=said.append)
    after = {file.name: file.stat().st_mtime_ns for file in (folder / dermae.CELLS).iterdir()}
    assert {name: after[name] for name in before} == before
    return folder, said


@pytest.fixture(scope="module")
def summary(run: tuple[Path, list[str]]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run[0] / dermae.SUMMARY).read_text())
    return found


def test_training_rows_learn_test_rows_test_and_kin_of_held_out_rows_do_neither(
    corpus: pa.Table, samples: pa.Table
) -> None:
    rows = rows_of(corpus, samples, 32)
    assert rows.classes == list(CLASSES)
    real, both = (rows.arms[name] for name in ("real", "real_synthetic"))
    shown = {split: {
        row["image"]["bytes"] for row in corpus.filter(pc.equal(corpus["split"], split)).to_pylist()
    } for split in ("train", "test")}  # fmt: skip
    assert set(real.labelled.examples.encoded) == set(real.pretraining.encoded) == shown["train"]
    assert set(rows.test.encoded) < shown["test"] and len(rows.test) == 4
    made = {row["sample_id"]: row["image"]["bytes"] for row in samples.to_pylist()}
    assert set(both.labelled.examples.encoded) - shown["train"] == {made[f"s{index}"] for index in range(4)}
    assert set(both.pretraining.encoded) - shown["train"] == {made[f"s{index}"] for index in range(5)}
    assert rows.counts == {
        "num_real": 8, "num_synthetic": 4, "num_test": 4, "kin_of_held_out": 1, "sample_of_unknown_class": 1,
        "test_of_unknown_class": 1,
    }  # fmt: skip
    alone = rows_of(corpus, samples, 32, pretrain_on="synthetic").arms["real_synthetic"].pretraining
    assert set(alone.encoded) == {made[f"s{index}"] for index in range(5)}


def test_a_class_is_shown_as_often_as_the_largest(corpus: pa.Table, samples: pa.Table) -> None:
    few = corpus.filter(pc.invert(pc.is_in(corpus["row_id"], pa.array(["r2", "r4", "r6"]))))  # one melanoma is left
    examples = rows_of(few, samples, 32).arms["real"].labelled.examples
    labels = examples.batch(np.arange(len(examples)))["label"]
    assert np.bincount(labels).tolist() == [4, 4]


def test_a_group_of_two_splits_is_refused(corpus: pa.Table, samples: pa.Table) -> None:
    rows = corpus.to_pylist()
    rows[12]["group_id"] = "g0"
    with pytest.raises(ValueError, match="a group must be of one split, got g0 in train and in test; ingest"):
        rows_of(records.rows_to_table("corpus", rows), samples, 32)


def test_what_cannot_be_tested_is_refused(corpus: pa.Table, samples: pa.Table) -> None:
    with pytest.raises(ValueError, match=r"got 0 of melanoma, nevus; .* raise corpus\.test_share"):
        rows_of(corpus.filter(pc.not_equal(corpus["split"], "test")), samples, 32)
    with pytest.raises(ValueError, match=r"at least two diagnoses of the training split, got 2 of nevus"):
        rows_of(corpus.filter(pc.equal(corpus["diagnosis"], "nevus")), samples, 32)
    with pytest.raises(ValueError, match="must have accepted samples, got none"):
        rows_of(corpus, samples.slice(6), 32)


def test_every_cell_of_the_table_is_there_or_says_why_not(summary: dict[str, Any]) -> None:
    named = {(row["network"], row["data"], row["start"], row["taught"]): row for row in summary["rows"]}
    assert len(named) == 24
    missing = {key: row["not_run"] for key, row in named.items() if "not_run" in row}
    assert missing == {
        **{("large", data, start, True): "no_larger_teacher" for data in dermae.DATA for start in dermae.STARTS},
        **{("small", data, "mae", False): "not_a_vit" for data in dermae.DATA},
    }
    assert {row["accuracy"]["n"] for row in named.values() if "not_run" not in row} == {2}
    assert summary["networks"]["small"]["given"] == "random"
    assert summary["counts"]["num_test"] == 4


def test_a_row_is_the_mean_of_its_cells_and_a_difference_is_paired_by_seed(
    run: tuple[Path, list[str]], summary: dict[str, Any]
) -> None:
    cells = [json.loads(file.read_text()) for file in (run[0] / dermae.CELLS).iterdir()]
    assert len(cells) == 36

    def score(data: str, start: str, seed: int) -> float:
        (found,) = [
            cell["metrics"]["macro_f1"] for cell in cells
            if (cell["network"], cell["data"], cell["start"], cell["taught"], cell["seed"])
            == ("base", data, start, True, seed)
        ]  # fmt: skip
        return float(found)

    (row,) = [
        row["macro_f1"] for row in summary["rows"]
        if (row["network"], row["data"], row["start"], row["taught"]) == ("base", "real", "mae", True)
    ]  # fmt: skip
    first, second = (score("real", "mae", seed) for seed in (0, 1))
    half = 12.706 * abs(first - second) / 2  # t(0.975, 1) * s / sqrt(2)
    assert row["mean"] == pytest.approx((first + second) / 2)
    assert row["low"] == pytest.approx(max(0.0, row["mean"] - half), abs=1e-4)
    (gain,) = [one for one in summary["differences"] if (one["network"], one["factor"]) == ("small", "start")]
    taught = [cell for cell in cells if cell["network"] == "small" and cell["taught"]]
    by_start = {s: [cell["metrics"]["accuracy"] for cell in taught if cell["start"] == s] for s in ("mae", "given")}
    assert gain["accuracy"]["mean"] == pytest.approx(np.mean(by_start["mae"]) - np.mean(by_start["given"]))


def test_the_table_is_printed(run: tuple[Path, list[str]]) -> None:
    text = "\n".join(run[1])
    assert "cell 36 of 36" in text
    assert "small test_efficientnet       real             MAE      alone   not_a_vit" in text
    assert "large test_vit                real + synthetic over real  macro-F1 " in text


def test_mae_begins_where_the_random_arm_begins_and_moves_and_a_student_keeps_no_second_teacher(
    run: tuple[Path, list[str]],
) -> None:
    from safetensors.torch import load_file

    fits = run[0] / dermae.FITS
    assert not list(fits.glob("*/state.pt")) and not list(fits.glob("**/teacher"))
    (start,) = fits.glob("start-base-s1-*")
    (mae,) = fits.glob("mae-base-real-mae-s1-*")
    before, after = (load_file(one / "model.safetensors") for one in (start, mae / "weights"))
    assert torch.equal(before["pos_embed"], after["pos_embed"])  # fixed
    moved = (before["blocks.0.mlp.fc1.weight"] - after["blocks.0.mlp.fc1.weight"]).abs().max()
    assert 0 < float(moved) < 0.01  # two steps from the same random weights
    (taught,) = fits.glob("taught-small-real-given-s0-*")
    assert load_classifier(taught / "weights")(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_another_number_of_seeds_keeps_the_cells_and_another_recipe_does_not(
    run: tuple[Path, list[str]], corpus: pa.Table, samples: pa.Table
) -> None:
    def key(section: DermaeSection) -> str:
        sweep = dermae.Sweep(open_store(str(run[0])), run[0], rows_of(corpus, samples, 32), section)
        return sweep._key(dermae.Cell("base", "real", "mae", True, 0))

    asked = key(SECTION)
    assert key(SECTION.model_copy(update={"seeds": 7})) == asked
    for name, field in (("pretrain", "steps"), ("finetune", "steps"), ("student", "steps")):
        own = getattr(SECTION, name).model_copy(update={field: 3})
        assert key(SECTION.model_copy(update={name: own})) != asked  # the teacher's and the start's count too


def test_weights_that_do_not_fit_are_refused_by_name(
    run: tuple[Path, list[str]], corpus: pa.Table, samples: pa.Table, tmp_path: Path
) -> None:
    (wide,) = (run[0] / dermae.FITS).glob("start-large-s0-*")
    for weights, words in (
        (str(tmp_path / "not.safetensors"), r"evaluate\.dermae\.base\.weights must be a \.safetensors file"),
        (str(wide / "model.safetensors"), "must hold the weights of this model at this size, .* differs in blocks"),
    ):
        base = NetworkSection(model="vit_tiny_patch16_224", weights=weights)  # 192 wide, the file 64
        section = SECTION.model_copy(update={"base": base})
        with pytest.raises(ValueError, match=words):
            sweep = dermae.Sweep(open_store(str(tmp_path)), tmp_path, rows_of(corpus, samples, 32), section)
            sweep.result(dermae.Cell("base", "real", "given", False, 0))
    with pytest.raises(ValueError, match="evaluate.dermae.large must be a plain timm ViT, got test_efficientnet"):
        dermae.not_run(SECTION.model_copy(update={"large": NetworkSection(model="test_efficientnet")}))


def test_given_weights_are_where_a_fit_begins_and_are_named_imagenet(
    run: tuple[Path, list[str]], corpus: pa.Table, samples: pa.Table, tmp_path: Path
) -> None:
    from factory.fits.card import digest_of

    (own,) = (run[0] / dermae.FITS).glob("start-small-s0-*")
    path = own / "model.safetensors"
    section = SECTION.model_copy(update={"small": NetworkSection(model="test_efficientnet", weights=str(path))})
    sweep = dermae.Sweep(open_store(str(tmp_path)), tmp_path, rows_of(corpus, samples, 32), section)
    start = sweep.begun(dermae.Cell("small", "real", "given", False, 1))
    assert digest_of(start / "model.safetensors") == digest_of(path)
    assert sweep.about()["small"]["given"] == "ImageNet" and sweep.about()["base"]["given"] == "random"


def test_a_loss_that_is_not_finite_stops_the_sweep_with_the_cell_and_the_last_good_step_named(
    corpus: pa.Table, samples: pa.Table, tmp_path: Path
) -> None:
    wild = FinetuneSection(**FIT | {"steps": 40, "warmup_steps": 0, "checkpoint_every": 1}, learning_rate=1e18)
    section = SECTION.model_copy(update={"finetune": wild})
    words = r"large of large real given alone seed 0: the loss must stay finite, got nan at step \d+; .* of step \d"
    with pytest.raises(ValueError, match=words):
        dermae.run_table(open_store(str(tmp_path)), tmp_path, corpus, samples, section, progress=lambda line: None)


def test_an_interval_over_seeds_is_students_and_needs_two() -> None:
    found = over_seeds([0.1, 0.2, 0.3], (-1.0, 1.0))
    assert found["mean"] == pytest.approx(0.2)
    assert found["high"] == pytest.approx(0.2 + 4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    assert over_seeds([0.4], (0.0, 1.0)) == {"mean": 0.4, "n": 1, "low": None, "high": None}
