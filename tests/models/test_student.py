"""Classifiers by name, normalisation as buffers, the distillation loss, and what a model costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from factory.models.classifier import Normalised, build_classifier
from factory.models.mae import MaskedAutoencoder, save_mae
from factory.models.student import TeacherStudent, cost, distillation_loss


def test_the_soft_term_alone_is_t_squared_kl_divergence() -> None:
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    temperature = 2.0
    p = [1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(-1.0))]  # softmax of (0, 2) / 2
    q = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))]  # softmax of (1, 0) / 2
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    loss = distillation_loss(student, teacher, torch.tensor([0]), temperature, 1.0)
    assert float(loss) == pytest.approx(4 * kl, rel=1e-5)


def test_the_hard_term_alone_is_cross_entropy() -> None:
    loss = distillation_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0]]), torch.tensor([0]), 4.0, 0.0)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-1.0)), rel=1e-5)


def test_a_student_that_equals_its_teacher_pays_only_the_hard_share() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    hard = nn.functional.cross_entropy(logits, labels)
    assert float(distillation_loss(logits, logits, labels, 4.0, 0.7)) == pytest.approx(0.3 * float(hard), rel=1e-5)


def test_normalisation_uses_each_models_own_mean_and_deviation() -> None:
    wrapped = Normalised(nn.Identity(), (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    assert wrapped(torch.full((1, 3, 1, 1), 0.6)).flatten().tolist() == pytest.approx([1.0, 1.6, 0.3])
    teacher, student = build_classifier("test_vit", 2, 32), build_classifier("mobilenetv3_small_050", 2, 32)
    assert teacher.mean.flatten().tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert student.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert "mean" in student.state_dict()


@pytest.mark.parametrize("name", ["test_vit", "mobilenetv3_small_050"])
def test_a_classifier_by_name_gives_a_logit_per_class(name: str) -> None:
    model = build_classifier(name, 5, 64).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_a_classifier_starts_from_an_mae_encoder(tmp_path: Path) -> None:
    mae = MaskedAutoencoder("test_vit", 32, 8, decoder_width=32, decoder_depth=1).eval()
    save_mae(mae, tmp_path)
    model = build_classifier("test_vit", 2, 32, tmp_path / "model.safetensors").eval()
    pixels = torch.rand(2, 3, 32, 32)
    expected = mae.encoder.forward_features((pixels - 0.5) / 0.5)
    assert torch.equal(model.model.forward_features((pixels - 0.5) / 0.5), expected)
    pooled = expected[:, 1:].mean(1)  # the average of the patches, without the class token
    torch.testing.assert_close(model(pixels), model.model.head(pooled))


def test_a_head_of_other_classes_is_left_out_and_one_of_the_same_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    two = build_classifier("mobilenetv3_small_050", 2, 32)
    save_file(two.model.state_dict(), tmp_path / "two.safetensors")
    same = build_classifier("mobilenetv3_small_050", 2, 32, tmp_path / "two.safetensors")
    other = build_classifier("mobilenetv3_small_050", 3, 32, tmp_path / "two.safetensors")
    assert torch.equal(same.model.classifier.weight, two.model.classifier.weight)
    assert torch.equal(other.model.conv_stem.weight, two.model.conv_stem.weight)
    assert other.model.classifier.out_features == 3


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a model of timm, got 'mobilenot'"):
        build_classifier("mobilenot", 2, 32)


def test_a_checkpoint_of_another_size_is_refused_with_what_differs(tmp_path: Path) -> None:
    save_mae(MaskedAutoencoder("test_vit", 32, 8, decoder_width=32, decoder_depth=1), tmp_path)
    with pytest.raises(ValueError, match="which differs in pos_embed"):
        build_classifier("test_vit", 2, 64, tmp_path / "model.safetensors")


def test_the_teacher_neither_trains_nor_leaves_evaluation() -> None:
    pair = TeacherStudent(build_classifier("test_vit", 2, 32), build_classifier("mobilenetv3_small_050", 2, 32)).train()
    assert not pair.teacher.training and pair.student.training
    student, teacher = pair(torch.rand(2, 3, 32, 32))
    assert student.requires_grad and not teacher.requires_grad


def test_cost_counts_two_operations_per_multiply_add() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    found = cost(model, 8)
    assert found.params == 4 * 3 * 9 + 256 * 5 + 5
    assert found.bytes == 4 * found.params
    assert found.flops == 2 * (8 * 8 * 4 * 27 + 256 * 5)


def test_cost_sees_attention() -> None:
    model = build_classifier("test_vit", 2, 32, patch_size=8)
    with_attention = cost(model, 32).flops
    vit = model.model
    linears = sum(
        2 * m.in_features * m.out_features * (17 if name.startswith("blocks") else 1)
        for name, m in vit.named_modules()
        if isinstance(m, nn.Linear)
    )
    patches = 2 * 16 * vit.embed_dim * 3 * 64
    attention = len(vit.blocks) * 2 * 2 * 17 * 17 * vit.embed_dim
    assert with_attention == linears + patches + attention


@pytest.mark.parametrize(
    ("name", "size", "options", "words"),
    [
        (
            "test_vit2",
            32,
            {"patch_size": 8, "global_pool": "token"},
            "test_vit2 must be .*global_pool=token",
        ),
        ("deit_tiny_distilled_patch16_224", 32, {}, "must be built with .*, which timm refuses"),
        ("test_vit", 36, {"patch_size": 8}, "image_size must be a multiple of patch_size, got 36 and 8"),
        ("test_vit", 8, {"patch_size": 16}, "image_size must be at least a patch, got 8 and patch_size 16"),
    ],
)
def test_what_timm_cannot_build_or_would_not_see_whole_is_refused(
    name: str, size: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build_classifier(name, 3, size, **options)


def test_features_of_a_head_that_is_no_linear_layer_are_refused_in_one_sentence() -> None:
    teacher, student = build_classifier("test_vit", 3, 32, patch_size=8), build_classifier("levit_128s", 3, 224)
    with pytest.raises(ValueError, match=r"feature_weight must be 0 for Levit\w*, whose head is a \w+ and no linear"):
        TeacherStudent(teacher, student, features=True)
