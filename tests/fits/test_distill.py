"""Distillation: the teacher is fitted once and exactly, the student trains, both come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from factory import images, phantom, records
from factory.fits.card import read_card
from factory.fits.classifiers import load_classifier
from factory.fits.distill import DistillObjective, distill_objective, retained
from factory.fits.examples import ImageExamples
from factory.fits.loop import train
from factory.fits.mae import MaeObjective
from factory.models.student import TeacherStudent
from factory.recipe import DistillSection, MaeSection

SECTION = DistillSection(
    steps=4, batch_size=8, warmup_steps=1, teacher_steps=6, checkpoint_every=2, student="test_efficientnet"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mae")
    section = MaeSection(encoder="test_vit", image_size=32, patch_size=8, decoder_width=32, decoder_depth=1)
    objective = MaeObjective(section, ImageExamples([], 32))
    objective.save(objective.build(), directory)
    return directory


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    rows: list[dict[str, Any]] = []
    for index in range(18):
        wanted = ("nevus", "nevus", "melanoma")[index % 3]
        drawn = phantom.draw(5, index, 32, diagnosis=wanted)
        rows.append({
            "row_id": f"r{index}", "record_id": f"c{index}", "diagnosis": wanted,
            "image": records.image_struct(images.encode_png(drawn.image), f"c{index}.png"),
            "split": "val" if index < 6 else "train", "licence": "CC0-1.0", "outcome": "accepted",
        })  # fmt: skip
    rows.append(rows[-1] | {"row_id": "unlabelled", "diagnosis": None})
    return records.rows_to_table("corpus", rows)


def _objective(
    encoder: Path, corpus: pa.Table, teacher_dir: Path | None, log: list[str] | None = None
) -> DistillObjective:
    return distill_objective(
        SECTION, encoder, corpus, teacher_dir=teacher_dir, log=(log if log is not None else []).append
    )


def test_labels_are_the_diagnoses_present_and_every_class_is_seen_equally_often(
    encoder: Path, corpus: pa.Table
) -> None:
    objective = _objective(encoder, corpus, None)
    assert objective.classes == ["melanoma", "nevus"]
    assert len(objective.images.encoded) == 12
    assert len(objective.examples) == 2 * 8  # eight nevi, so eight turns of each class
    assert objective.held_out is not None and len(objective.held_out) == 6


def test_samples_add_to_the_classes_the_corpus_has(encoder: Path, corpus: pa.Table) -> None:
    image = corpus["image"][0].as_py()
    rows = [
        {"sample_id": "a", "image": image, "diagnosis": "melanoma", "outcome": "accepted"},
        {"sample_id": "b", "image": image, "diagnosis": "vascular", "outcome": "accepted"},
    ]
    objective = distill_objective(SECTION, encoder, corpus, records.rows_to_table("samples", rows))
    assert len(objective.images.encoded) == 13
    assert objective.provenance["num_synthetic"] == 1


def test_the_teacher_moves_from_its_encoder_and_then_holds_still(
    encoder: Path, corpus: pa.Table, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    said: list[str] = []
    objective = _objective(encoder, corpus, tmp_path / "teacher", said)
    before = objective.build()
    assert len(said) == 1 and "teacher: step 6 of 6, loss" in said[0]
    start = load_file(encoder / "model.safetensors")
    teacher = {name: value.clone() for name, value in before.teacher.state_dict().items()}
    assert not torch.equal(teacher["model.norm.weight"], start["norm.weight"])
    after = train(objective, SECTION, tmp_path / "student")
    assert isinstance(after, TeacherStudent)
    assert all(torch.equal(value, teacher[name]) for name, value in after.teacher.state_dict().items())
    head = "model.classifier.weight"
    assert not torch.equal(after.student.state_dict()[head], before.student.state_dict()[head])


def test_a_teacher_that_was_fitted_is_found_again(encoder: Path, corpus: pa.Table, tmp_path: Path) -> None:
    said: list[str] = []
    first = _objective(encoder, corpus, tmp_path, said).build().teacher.state_dict()
    again = _objective(encoder, corpus, tmp_path, said).build().teacher.state_dict()
    anew = _objective(encoder, corpus, None, said).build().teacher.state_dict()
    assert len(said) == 2  # the second build found what the first had fitted
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], anew[name]) for name in first)


def test_student_and_teacher_come_back_as_timm_directories(encoder: Path, corpus: pa.Table, tmp_path: Path) -> None:
    import timm

    objective = _objective(encoder, corpus, None)
    model = objective.build().eval()
    objective.save(model, tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    expected = model(pixels)
    for found, logits in zip(objective.load(tmp_path).eval()(pixels), expected, strict=True):
        torch.testing.assert_close(found, logits)
    torch.testing.assert_close(load_classifier(tmp_path)(pixels), expected[0])
    for directory, wrapped, logits in (
        (tmp_path, model.student, expected[0]),
        (tmp_path / "teacher", model.teacher, expected[1]),
    ):
        plain = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
        torch.testing.assert_close(plain((pixels - wrapped.get_buffer("mean")) / wrapped.get_buffer("std")), logits)


def test_the_card_states_cost_and_what_was_retained_on_the_validation_split(
    encoder: Path, corpus: pa.Table, tmp_path: Path
) -> None:
    objective = _objective(encoder, corpus, None)
    model = objective.build()
    objective.save(model, tmp_path)
    card = read_card(tmp_path)
    assert card["params"] == sum(p.numel() for p in model.student.parameters())
    assert card["teacher"]["params"] == sum(p.numel() for p in model.teacher.parameters())
    assert card["flops"] < card["teacher"]["flops"]
    assert card["held_out"]["num_images"] == 6
    assert card["classes"] == ["melanoma", "nevus"]


def test_a_student_that_is_its_teacher_retains_everything() -> None:
    from factory.models.classifier import build_classifier

    teacher = build_classifier("test_efficientnet", 2, 32)
    drawn = [images.encode_png(phantom.draw(5, index, 32).image) for index in range(4)]
    found = retained(TeacherStudent(teacher, teacher), ImageExamples(drawn, 32, [0, 1, 0, 1]))
    assert found["agreement"] == 1.0
    assert found["student_balanced_accuracy"] == found["teacher_balanced_accuracy"]


def test_one_diagnosis_alone_is_refused(encoder: Path, corpus: pa.Table) -> None:
    import pyarrow.compute as pc

    with pytest.raises(ValueError, match="at least two diagnoses to tell apart, got \\['nevus'\\]"):
        _objective(encoder, corpus.filter(pc.equal(corpus["diagnosis"], "nevus")), None)


def test_a_student_begins_from_its_checkpoint_and_one_of_another_width_is_refused(
    encoder: Path, corpus: pa.Table, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from factory.models.classifier import build_classifier

    path = tmp_path / "student.safetensors"
    save_file(build_classifier("test_efficientnet", 5, 32).model.state_dict(), path)  # a head of other classes
    change = {"student_weights": str(path), "teacher_steps": 1}
    section = SECTION.model_copy(update=change)
    student = distill_objective(section, encoder, corpus, log=lambda line: None).build().student.state_dict()
    known = load_file(path)
    assert all(
        torch.equal(student[f"model.{name}"], value) for name, value in known.items() if "classifier" not in name
    )
    assert student["model.classifier.weight"].shape[0] == 2
    for name, words in (
        ("mobilenetv3_small_050", "checkpoint must hold the weights of this model at this size, got .* differs in"),
        ("test_efficientnet", r"fit\.distill\.student_weights must be a \.safetensors file that is there, got .*gone"),
    ):
        weights = str(path) if "mobile" in name else str(tmp_path / "gone.safetensors")
        wrong = section.model_copy(update={"student": name, "student_weights": weights})
        with pytest.raises(ValueError, match=words):
            distill_objective(wrong, encoder, corpus, log=lambda line: None).build()


def test_a_class_that_training_lacks_or_shows_once_is_refused_or_left_out_and_counted(
    encoder: Path, corpus: pa.Table
) -> None:
    rows = [row for row in corpus.to_pylist() if row["diagnosis"] is not None]
    kept = [row for row in rows if row["diagnosis"] == "nevus" or row["split"] == "val" or row["row_id"] == "r8"]
    kept.append(rows[0] | {"row_id": "other", "diagnosis": "vascular"})  # of the validation split alone
    kept += [rows[-1] | {"row_id": name, "diagnosis": "dermatofibroma"} for name in ("one", "two")]
    table = records.rows_to_table("corpus", kept)
    words = r"at least two training images, got 1 of melanoma, none of vascular \(1 validation\); .* rare=leave_out"
    with pytest.raises(ValueError, match=words):
        distill_objective(SECTION, encoder, table)
    objective = distill_objective(SECTION.model_copy(update={"rare": "leave_out"}), encoder, table)
    assert objective.classes == ["dermatofibroma", "nevus"]
    assert objective.provenance["left_out"] == {
        "training_without_diagnosis": 0, "training_of_rare_class": 1, "samples_of_unknown_class": 0,
        "validation_of_unknown_class": 3,
    }  # fmt: skip
    assert objective.held_out is not None and len(objective.held_out) == 4


def test_a_loss_that_is_not_finite_stops_a_student_with_the_last_good_checkpoint_named(
    encoder: Path, corpus: pa.Table, tmp_path: Path
) -> None:
    change = {"learning_rate": 1e30, "warmup_steps": 0, "steps": 30, "checkpoint_every": 1, "teacher_steps": 1}
    section = SECTION.model_copy(update=change)
    objective = distill_objective(section, encoder, corpus, log=lambda line: None)
    with pytest.raises(
        ValueError, match=r"the loss must stay finite, got .*: the last checkpoint, of step \d+, is good"
    ):
        train(objective, section, tmp_path)
