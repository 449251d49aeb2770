"""Teachers that are there already, features, and answers that are kept by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from factory import images, phantom, recipe, records
from factory.fits.card import write_card
from factory.fits.classifiers import save_timm
from factory.fits.distill import distill_objective
from factory.fits.loop import train
from factory.fits.objective import RowNoise
from factory.fits.teaching import Teacher, kept_answers
from factory.models.classifier import build_classifier
from factory.models.student import TeacherStudent, cost, distillation_loss
from factory.recipe import DistillSection, RecipeError
from factory.storage import LocalStore

CLASSES = ["melanoma", "nevus"]


def _drawn(count: int) -> list[bytes]:
    return [images.encode_png(phantom.draw(5, index, 32).image) for index in range(count)]


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    rows: list[dict[str, Any]] = [
        {
            "row_id": f"r{index}", "record_id": f"c{index}", "diagnosis": CLASSES[index % 2], "split": "train",
            "image": records.image_struct(encoded, f"c{index}.png"), "licence": "CC0-1.0", "outcome": "accepted",
        }
        for index, encoded in enumerate(_drawn(8))
    ]  # fmt: skip
    return records.rows_to_table("corpus", rows)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    directory, model = tmp_path_factory.mktemp("teacher"), build_classifier("test_vit", 2, 32)
    save_timm(model, directory)
    write_card(directory, cost(model, 32), {"architecture": "test_vit", "classes": CLASSES})
    return directory


def _section(teacher: Path, **changed: Any) -> DistillSection:
    asked = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "checkpoint_every": 2, "student": "test_efficientnet"}
    return DistillSection(**{**asked, "teacher": str(teacher), **changed})


@pytest.mark.parametrize("student", ["vit_tiny_patch16_224", "efficientnet_b0", "mobilenetv3_small_050"])
def test_any_timm_model_learns_from_a_teacher_that_is_there(
    teacher: Path, corpus: pa.Table, tmp_path: Path, student: str
) -> None:
    section = _section(teacher, student=student, steps=1)
    objective = distill_objective(section, teacher, corpus)
    before, after = objective.build(), train(objective, section, tmp_path / "fit")
    assert isinstance(after, TeacherStudent)
    stored = build_classifier("test_vit", 2, 32, teacher / "model.safetensors").state_dict()
    assert all(torch.equal(after.teacher.state_dict()[name], value) for name, value in stored.items())
    head, old = after.student.model.get_classifier(), before.student.model.get_classifier()  # type: ignore[operator,union-attr]
    assert not torch.equal(head.weight, old.weight)
    objective.save(after, tmp_path / "out")
    again = objective.load(tmp_path / "out").eval()
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again.student(pixels), after.eval().student(pixels))


def test_the_feature_term_is_the_error_of_the_projected_pooled_features(teacher: Path, corpus: pa.Table) -> None:
    objective = distill_objective(_section(teacher, feature_weight=2.0), teacher, corpus)
    model = objective.build().eval()
    pixels = torch.rand(3, 3, 32, 32)
    student, soft, term = model.with_features(pixels)
    plain = model(pixels)
    torch.testing.assert_close(student, plain[0])
    torch.testing.assert_close(soft, plain[1])
    grabbed: list[torch.Tensor] = []
    for part in (model.teacher, model.student):
        part.model.get_classifier().register_forward_pre_hook(lambda module, given: grabbed.append(given[0]))  # type: ignore[operator,union-attr]
        part(pixels)
    torch.testing.assert_close(term, F.mse_loss(grabbed[1] @ model.projection.weight.T, grabbed[0]))
    rows = np.arange(4)
    found = objective.loss(model, objective.examples.batch(rows), RowNoise(0, 0, rows))
    without = distill_objective(_section(teacher), teacher, corpus)
    base = without.loss(model, without.examples.batch(rows), RowNoise(0, 0, rows))
    torch.testing.assert_close(found["loss"], base["loss"] + 2.0 * found["features"])


def test_answers_are_kept_by_image_and_teacher(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, drawn, store = build_classifier("test_vit", 3, 32), _drawn(4), LocalStore(tmp_path)
    first = Teacher(model, 32)
    answers = kept_answers(first, drawn[:3], store)
    pixels = torch.stack([torch.from_numpy(images.read_png(one)).permute(2, 0, 1) for one in drawn[:3]]).float() / 255
    np.testing.assert_allclose(answers, model.eval()(pixels).detach(), atol=1e-5)
    again = Teacher(model, 32)
    found = kept_answers(again, [drawn[2], drawn[3], drawn[0]], store)
    assert (first.asked, again.asked) == (3, 1)  # the new image alone
    np.testing.assert_array_equal(found[[0, 2]], answers[[2, 0]])
    other = build_classifier("test_vit", 3, 32)
    another = Teacher(other, 32)
    kept_answers(another, drawn[:3], store)
    assert another.asked == 3 and another.digest != first.digest


def test_a_student_learns_from_kept_answers_without_asking(teacher: Path, corpus: pa.Table, tmp_path: Path) -> None:
    section = _section(teacher, targets="whole_image")
    objective = distill_objective(section, teacher, corpus, store=LocalStore(tmp_path / "store"))
    model = objective.build().eval()
    rows = np.arange(4)
    batch, asked = objective.examples.batch(rows), []
    model.teacher.register_forward_hook(lambda *given: asked.append(1))
    found = objective.loss(model, batch, RowNoise(0, 0, rows))
    assert not asked
    with torch.no_grad():
        expected = model.teacher(batch["image"].float() / 255)
    torch.testing.assert_close(batch["teacher"], expected, atol=1e-5, rtol=1e-4)
    assert float(found["loss"]) > 0
    train(objective, section, tmp_path / "fit")


def test_a_teacher_of_other_classes_is_refused(corpus: pa.Table, tmp_path: Path) -> None:
    model = build_classifier("test_vit", 2, 32)
    save_timm(model, tmp_path)
    write_card(tmp_path, cost(model, 32), {"architecture": "test_vit", "classes": ["benign", "malignant"]})
    with pytest.raises(ValueError, match="must know the diagnoses of the corpus, melanoma, nevus, got one of benign"):
        distill_objective(_section(tmp_path), tmp_path, corpus)


def test_features_of_crops_and_answers_on_whole_images_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="feature_weight: must be 0 for the targets whole_image"):
        recipe.load(None, ["fit.distill.feature_weight=1.0", "fit.distill.targets=whole_image"])


def test_a_loss_without_features_is_the_distillation_loss(teacher: Path, corpus: pa.Table) -> None:
    objective = distill_objective(_section(teacher, temperature=2.0, alpha=0.5), teacher, corpus)
    model, rows = objective.build().eval(), np.arange(4)
    grabbed: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.register_forward_hook(lambda module, given, result: grabbed.append(result))
    batch = objective.examples.batch(rows)
    found = objective.loss(model, batch, RowNoise(0, 0, rows))
    torch.testing.assert_close(found["loss"], distillation_loss(*grabbed[0], batch["label"], 2.0, 0.5))
