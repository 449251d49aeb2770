"""The arithmetic that all generator families share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from factory.models.denoiser import classifier_free_guidance, clean_estimate, log_snr


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_clean_estimate_is_exact_when_the_prediction_is(kind: str) -> None:
    z0, eps = _drawn(4, 8, 5, 3), _drawn(4, 8, 5, 3, seed=1)
    level = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    a = level.reshape(4, 1, 1, 1)
    noisy = (1 - a) * z0 + a * eps if kind == "flow" else a.sqrt() * z0 + (1 - a).sqrt() * eps
    exact = {"epsilon": eps, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * z0, "flow": eps - z0}[kind]
    torch.testing.assert_close(clean_estimate(kind, noisy, exact, level), z0, rtol=0, atol=1e-12)


def test_the_v_form_is_finite_at_zero_snr_where_the_epsilon_form_is_not() -> None:
    noise = _drawn(1, 1, 2, 2)
    zero = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(clean_estimate("v_prediction", noise, -3 * noise, zero), 3 * noise)
    assert not torch.isfinite(clean_estimate("epsilon", noise, 0.5 * noise, zero)).any()


def test_an_epsilon_error_is_amplified_as_the_paper_page_tabulates() -> None:
    # Stable Diffusion's scaled-linear schedule: sqrt((1 - a) / a) is 1.16 at t = 400 and 14.6 at t = 999.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[[400, 999]]
    still = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    gain = clean_estimate("epsilon", still, torch.ones_like(still), alpha_bar).abs().flatten()
    assert gain.tolist() == pytest.approx([1.16, 14.6], abs=0.05)


def test_levels_of_equal_noise_ratio_have_equal_log_snr_across_families() -> None:
    # A VP noise ratio of .572 is s = .364 on the flow's scale.
    alpha_bar = torch.tensor(1 / (1 + 0.572**2))
    s = torch.tensor(0.572 / 1.572)
    assert log_snr("flow", s).item() == pytest.approx(log_snr("epsilon", alpha_bar).item(), abs=1e-6)
    assert log_snr("v_prediction", alpha_bar).item() == pytest.approx(-2 * math.log(0.572), abs=1e-6)


def test_an_unknown_prediction_type_is_refused_by_name() -> None:
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"prediction_type must be one of .* got 'sample'"):
        clean_estimate("sample", one, one, torch.ones(1))


def test_guidance_is_one_call_of_twice_the_batch_with_the_unconditional_half_first() -> None:
    calls = []

    def network(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        calls.append((latents.shape[0], timesteps.tolist(), condition[:, 0, 0].tolist()))
        return condition[:, :1, :1, None].expand_as(latents)

    found = classifier_free_guidance(
        network,
        torch.zeros(2, 1, 2, 2),
        torch.tensor([7, 9]),
        torch.tensor([3.0, 5.0]).reshape(2, 1, 1),
        torch.tensor([1.0, 2.5]),
        torch.tensor([1.0]).reshape(1, 1, 1),
    )
    assert calls == [(4, [7, 9, 7, 9], [1.0, 1.0, 3.0, 5.0])]
    assert found.conditional[:, 0, 0, 0].tolist() == [3.0, 5.0]
    assert found.guided[:, 0, 0, 0].tolist() == [3.0, 1.0 + 2.5 * (5.0 - 1.0)]


def test_a_row_without_guidance_returns_its_conditional_half_to_the_last_bit() -> None:
    conditional, free = torch.randn(1, 4, 8, 8), 1e4 * torch.randn(1, 4, 8, 8)
    found = classifier_free_guidance(
        lambda *_: torch.cat([free, conditional]), free, torch.zeros(1), torch.zeros(1, 1, 1), torch.ones(1),
        torch.zeros(1, 1, 1),
    )  # fmt: skip
    assert torch.equal(found.guided, conditional)
