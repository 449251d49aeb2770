"""What the papers' students and teachers cost, counted without a weight in memory."""

from __future__ import annotations

import pytest

from factory.models.student import cost, cost_at


@pytest.mark.parametrize(
    ("name", "gflops", "params"),
    [
        ("mobilenetv3_small_050", 0.046, 0.576e6),
        ("efficientnet_b0", 0.77, 4.02e6),
        ("vit_base_patch16_224", 35.1, 85.8e6),
        ("vit_huge_patch14_224", 334.0, 630.8e6),
    ],
)
def test_operations_and_parameters_at_224_px(name: str, gflops: float, params: float) -> None:
    found = cost_at(name, 7, 224)
    assert found.flops / 1e9 == pytest.approx(gflops, rel=0.06)
    assert found.params == pytest.approx(params, rel=0.05)
    assert (found.flops <= 0.8e9) == (name in ("mobilenetv3_small_050", "efficientnet_b0"))


def test_the_count_without_weights_is_the_count_of_the_model() -> None:
    from factory.models.classifier import build_classifier

    assert cost_at("test_vit", 3, 32, patch_size=8) == cost(build_classifier("test_vit", 3, 32, patch_size=8), 32)
