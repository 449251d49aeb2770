"""Probes: features are the patches' mean, what is linear is found, and scores are those of the books."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factory import images
from factory.fits.examples import ImageExamples
from factory.fits.probing import answers, features, linear_probe, nearest_neighbours, scores
from factory.models.classifier import Normalised, build_classifier, normalised


@pytest.fixture(scope="module")
def encoder() -> Normalised:
    import timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return normalised(timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0))


def _shades(seed: int, balanced: bool = False) -> ImageExamples:
    """Dark images are of class 0, light ones of class 1, which has a third of the rows."""
    rng = np.random.default_rng(seed)
    labels = [0, 0, 1] * 10
    drawn = [rng.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(150 * label) for label in labels]
    return ImageExamples([images.encode_png(one) for one in drawn], 32, labels, balanced=balanced)


def test_features_are_the_mean_of_the_patches_and_leave_the_class_token_out(encoder: Normalised) -> None:
    examples = _shades(1)
    pixels = examples.batch(np.arange(2))["image"].float() / 255
    with torch.no_grad():
        tokens = encoder.model.forward_features((pixels - encoder.mean) / encoder.std)
    assert tokens.shape[1] == 17
    np.testing.assert_allclose(features(encoder, examples)[:2], tokens[:, 1:].mean(1).numpy(), atol=1e-5)


@pytest.mark.parametrize("probe", [linear_probe, nearest_neighbours])
def test_a_probe_finds_light_and_dark(encoder: Normalised, probe: object) -> None:
    assert callable(probe)
    assert probe(encoder, _shades(1, balanced=True), _shades(2))["balanced_accuracy"] == 1.0


def test_scores_count_only_the_classes_that_are_shown() -> None:
    examples = ImageExamples([b""] * 5, 32, [0, 0, 0, 2, 2])
    said = np.array([0, 0, 1, 2, 0])
    found = scores(said, examples)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((2 * 2 / 6 + 2 * 1 / 3) / 2)  # 2 TP / (2 TP + FP + FN)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_answers_come_in_the_order_of_the_images() -> None:
    torch.manual_seed(0)
    model = build_classifier("test_efficientnet", 2, 32)
    examples = _shades(3)
    with torch.no_grad():
        whole = model.eval()(examples.batch(np.arange(30))["image"].float() / 255).argmax(1)
    assert answers(model, examples).tolist() == whole.tolist()
