"""The MAE objective: rows, augmentation by row, a loss that falls, weights that come back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from factory import images, phantom, records
from factory.fits.card import digest_of, read_card
from factory.fits.examples import ImageExamples, augment, balanced_order
from factory.fits.loop import train
from factory.fits.mae import MaeObjective, mae_objective
from factory.fits.objective import RowNoise
from factory.recipe import MaeSection
from factory.run import Run
from factory.tables import Table

SECTION = MaeSection(
    encoder="test_vit", image_size=32, patch_size=8, decoder_width=32, decoder_depth=1, steps=12, batch_size=8,
    warmup_steps=2, checkpoint_every=6,
)  # fmt: skip


def _corpus(count: int = 10) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for index in range(count):
        drawn = phantom.draw(3, index, 48)
        rows.append({
            "row_id": f"r{index}", "record_id": f"c{index}", "diagnosis": drawn.diagnosis,
            "image": records.image_struct(images.encode_png(drawn.image), f"c{index}.png"),
            "split": "train" if index < count - 2 else "test", "licence": "CC0-1.0", "outcome": "accepted",
        })  # fmt: skip
    rows.append({"row_id": "broken", "split": "train", "outcome": "rejected", "reason": "truncated"})
    return records.rows_to_table("corpus", rows)


def _samples() -> pa.Table:
    image = records.image_struct(images.encode_png(phantom.draw(4, 0, 48).image), "s.png")
    rows: list[dict[str, Any]] = [
        {"sample_id": "s0", "image": image, "outcome": "accepted"},
        {"sample_id": "s1", "image": image, "outcome": "rejected", "reason": "iou"},
    ]
    return records.rows_to_table("samples", rows)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Table]:
    """A sealed corpus of two parts and its samples."""
    run = Run(tmp_path_factory.mktemp("mae") / "run")
    corpus, samples, rows = run.table("corpus"), run.table("samples"), _corpus()
    for part in range(2):
        corpus.commit(part, rows.slice(6 * part, 6))
    corpus.seal(2, {"of": "test"}, {})
    samples.commit(0, _samples())
    samples.seal(1, {"of": "test"}, {})
    return corpus, samples


@pytest.mark.parametrize(("corpus", "samples", "count"), [(True, True, 8 + 1), (True, False, 8), (False, True, 1)])
def test_only_accepted_training_images_and_accepted_samples_are_learned_from(
    tables: tuple[Table, Table], corpus: bool, samples: bool, count: int
) -> None:
    arm = SECTION.model_copy(update={"include_corpus": corpus, "include_samples": samples})
    assert len(mae_objective(arm, *tables).examples) == count


def test_an_arm_without_images_is_refused(tables: tuple[Table, Table]) -> None:
    with pytest.raises(ValueError, match="must have images of the tables that it includes, got none; ingest"):
        mae_objective(SECTION.model_copy(update={"include_corpus": False}), tables[0])
    with pytest.raises(ValueError, match="include_corpus and include_samples must not both be false"):
        MaeSection(include_corpus=False, include_samples=False)


def test_examples_are_decoded_when_asked_for_and_do_not_travel() -> None:
    drawn = phantom.draw(3, 0, 32).image
    examples = ImageExamples([images.encode_png(drawn), b"not an image"], 32, [1, 0])
    batch = examples.batch(np.array([0, 0]))  # the second is never touched
    assert torch.equal(batch["image"][1], torch.from_numpy(drawn).permute(2, 0, 1))
    assert batch["label"].tolist() == [1, 1]
    copy = pickle.loads(pickle.dumps(examples))
    assert not copy._known.any()
    assert torch.equal(copy.batch(np.array([0]))["image"], batch["image"][:1])


def test_a_balanced_pass_shows_every_class_as_often_as_the_largest() -> None:
    assert balanced_order(np.array([0, 0, 0, 1])).tolist() == [0, 3, 1, 3, 2, 3]


def test_augmentation_depends_on_seed_step_and_row_and_not_on_the_batch() -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    rows = np.array([5, 6, 7, 8])
    together = augment(pixels, RowNoise(1, 2, rows), 0.2)
    alone = augment(pixels[2:3], RowNoise(1, 2, rows[2:3]), 0.2)
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together, augment(pixels, RowNoise(1, 3, rows), 0.2))


def test_a_crop_of_the_whole_image_is_the_image_or_its_mirror() -> None:
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    expected = pixels.float() / 255
    mirrors = [expected, expected.flip(3), expected.flip(2), expected.flip(2, 3)]
    seen = set()
    for step in range(40):
        found = augment(pixels, RowNoise(0, step, np.array([0])), 1.0)
        matches = [index for index, mirror in enumerate(mirrors) if torch.allclose(found, mirror, atol=1e-5)]
        assert len(matches) == 1
        seen.update(matches)
    assert seen == {0, 1, 2, 3}


def test_the_loss_falls_on_a_few_images(tables: tuple[Table, Table], tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"steps": 60, "checkpoint_every": 60})
    train(mae_objective(section, tables[0]), section, tmp_path, log_every=10)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("keep_gib", [0.0, 4.0])
def test_a_fit_that_stops_and_goes_on_ends_where_one_that_did_not_stop_ends(
    tables: tuple[Table, Table], tmp_path: Path, keep_gib: float
) -> None:
    section = SECTION.model_copy(update={"shuffle_rows": 4, "keep_gib": keep_gib})
    half = section.model_copy(update={"steps": 6})
    train(mae_objective(half, *tables), half, tmp_path / "stopped")
    stopped = train(mae_objective(section, *tables), section, tmp_path / "stopped").state_dict()
    whole = train(mae_objective(section, *tables), section, tmp_path / "whole").state_dict()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_features_are_probed_on_the_way_and_the_fit_ends_where_one_that_was_not_probed_ends(
    tmp_path: Path,
) -> None:
    rows = []
    for index in range(36):
        light, split = index % 2, "train" if index < 24 else "val"
        pixels = np.random.default_rng(index).integers(0, 90, (32, 32, 3), dtype=np.uint8) + np.uint8(150 * light)
        image = records.image_struct(images.encode_png(pixels), "i.png")
        named = {"row_id": f"r{index}", "record_id": f"c{index}", "diagnosis": ("melanoma", "nevus")[light]}
        rows.append(named | {"image": image, "split": split, "licence": "CC0-1.0", "outcome": "accepted"})
    corpus = Run(tmp_path / "run").table("corpus")
    corpus.commit(0, records.rows_to_table("corpus", rows))  # type: ignore[arg-type]
    corpus.seal(1, {"of": "test"}, {})
    probed = SECTION.model_copy(update={"probe_every": 6, "validate_every": 6})
    ends = [
        train(mae_objective(section, corpus), section, tmp_path / name).state_dict()
        for name, section in (("probed", probed), ("plain", SECTION))
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    curve = [json.loads(line) for line in (tmp_path / "probed" / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["linear_probe"], row["nearest_neighbours"]) for row in curve if "linear_probe" in row]
    assert found == [(6, 1.0, 1.0), (12, 1.0, 1.0)]  # dark and light images are told apart by any features
    held_out = [row["validation_loss"] for row in curve if "validation_loss" in row]
    assert len(held_out) == 2 and held_out[1] < held_out[0]


def test_a_probe_without_labels_is_refused(tables: tuple[Table, Table]) -> None:
    with pytest.raises(ValueError, match=r"probe_every must have images of two diagnoses .*, got \d in (train|val);"):
        mae_objective(SECTION.model_copy(update={"probe_every": 6}), *tables)


def test_saved_weights_come_back_and_their_card_says_what_they_are(tables: tuple[Table, Table], tmp_path: Path) -> None:
    objective = mae_objective(SECTION, *tables)
    model = objective.build()
    objective.save(model, tmp_path)
    loaded = objective.load(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    card = read_card(tmp_path)
    encoder = model.model.encoder
    assert card["params"] == sum(p.numel() for p in encoder.parameters())
    assert card["digest"] == digest_of(tmp_path / "model.safetensors")
    assert card["bytes"] == (tmp_path / "model.safetensors").stat().st_size > 4 * card["params"]
    assert card["flops"] > 0 and card["image_size"] == 32 and card["architecture"] == "test_vit"
    assert (card["num_real"], card["num_synthetic"], card["licences"]) == (8, 1, ["CC0-1.0"])


def test_the_model_at_step_zero_is_a_function_of_the_seed() -> None:
    first, second = (MaeObjective(SECTION, ImageExamples([], 32)).build().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_directory_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a directory with a card\.json"):
        read_card(tmp_path)


def test_biases_and_norms_are_fitted_without_weight_decay(tables: tuple[Table, Table]) -> None:
    objective = mae_objective(SECTION, *tables)
    model = objective.build()
    free, decayed = sorted(objective.parameter_groups(model), key=lambda group: group["weight_decay"])
    assert free["weight_decay"] == 0 and decayed["weight_decay"] == SECTION.weight_decay
    assert {value.ndim for value in free["params"]} == {1} and min(value.ndim for value in decayed["params"]) >= 2
    assert len(free["params"]) + len(decayed["params"]) == sum(p.requires_grad for p in model.parameters())


def test_gradients_may_go_unclipped(tables: tuple[Table, Table], tmp_path: Path) -> None:
    ends = []
    for name, clip in (("clipped", 1e-6), ("loose", 1e6), ("not", None)):
        section = SECTION.model_copy(update={"clip_norm": clip, "steps": 2})
        ends.append(train(mae_objective(section, *tables), section, tmp_path / name).state_dict())
    weight = "model.decoder_pred.weight"
    assert torch.equal(ends[1][weight], ends[2][weight]) and not torch.equal(ends[0][weight], ends[2][weight])
