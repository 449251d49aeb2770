"""Losses on the decoded clean estimate: their values, whom they count for, and that gradients reach the network."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny_sd import SIDE, save_pipeline
from torch import Tensor

from factory.fits.perceptual import DecodedTerms, edge_difference, ssim
from factory.models.joint import JointDenoiser


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ssim_is_the_formula_under_a_gaussian_window() -> None:
    a, b = noise(1, 1, 11, 11).clamp(-1, 1), noise(1, 1, 11, 11, seed=1).clamp(-1, 1)
    line = cv2.getGaussianKernel(11, 1.5)
    window, x, y = line @ line.T, a[0, 0].double().numpy(), b[0, 0].double().numpy()

    def mean(values: np.ndarray) -> float:
        return float((window * values).sum())

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.02**2, 0.06**2
    wanted = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b).item() == pytest.approx(wanted, abs=1e-5)


def test_ssim_is_one_for_equal_images_falls_with_noise_and_takes_small_images() -> None:
    picture = torch.linspace(-1, 1, 32).expand(2, 3, 32, 32)
    blurred = [ssim(picture, picture + level * noise(2, 3, 32, 32)) for level in (0.0, 0.1, 0.5)]
    assert torch.allclose(blurred[0], torch.ones(2)) and (blurred[0] > blurred[1]).all()
    assert (blurred[1] > blurred[2]).all()
    assert ssim(picture[..., :4, :6], picture[..., :4, :6]).shape == (2,)


def test_the_gradients_of_a_ramp_differ_from_a_flat_images_by_its_slope() -> None:
    ramp = (0.25 * torch.arange(8.0)).expand(1, 3, 8, 8)
    # One of the two directions differs by 0.25 everywhere, the other by nothing.
    assert edge_difference(ramp, torch.zeros_like(ramp)).item() == pytest.approx(0.125)
    assert edge_difference(ramp, ramp + 5).item() == pytest.approx(0.0, abs=1e-6)


def test_only_rows_near_the_clean_end_count_and_gradients_reach_the_estimate(tmp_path: Path) -> None:
    denoiser = JointDenoiser.load(save_pipeline(tmp_path))
    latents, estimate = noise(3, 8, SIDE // 2, SIDE // 2), noise(3, 8, SIDE // 2, SIDE // 2, seed=1).requires_grad_()
    terms = DecodedTerms(denoiser, 0.1, 0.05)
    found = terms(estimate, latents, torch.tensor([400, 401, 7]))
    assert {name: weight for name, (weight, _) in found.items()} == {"ssim": 0.1, "edge": 0.05}
    (found["ssim"][1] + found["edge"][1]).backward()
    assert estimate.grad is not None
    moved = estimate.grad.flatten(1).abs().sum(1)
    assert moved[0] > 0 and moved[1] == 0 and moved[2] > 0
    assert estimate.grad[:, 4:].abs().max() == 0  # of the image alone
    with torch.no_grad():
        images = [denoiser.decoded_image(rows[[0, 2]]) for rows in (estimate, latents)]
    assert found["ssim"][1].item() == pytest.approx(float((1 - ssim(*images)).sum()) / 3, abs=1e-5)
    assert found["edge"][1].item() == pytest.approx(float(edge_difference(*images).sum()) / 3, abs=1e-5)
    assert terms(latents, latents, torch.tensor([1, 2, 3]))["ssim"][1].item() == pytest.approx(0.0, abs=1e-5)
    late = terms(estimate, latents, torch.tensor([900, 901, 999]))
    assert all(value.item() == 0 for _, value in late.values())
    assert set(DecodedTerms(denoiser, 0.0, 0.05)(estimate, latents, torch.tensor([1, 1, 1]))) == {"edge"}
