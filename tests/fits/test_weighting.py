"""Weights of noise levels: the plain rule where it holds, and a floor where it would be zero."""

from __future__ import annotations

import pytest
import torch

from factory.fits.weighting import MIN_WEIGHT, snr_weights

LEVELS = torch.tensor([0.0, 0.001, 0.5, 0.8, 0.9, 0.99, 1.0])  # alpha bar; SNR 0, .001, 1, 4, 9, 99, infinite


def test_without_gamma_all_levels_weigh_the_same() -> None:
    assert snr_weights("epsilon", LEVELS, None).tolist() == [1.0] * len(LEVELS)


def test_the_level_without_signal_is_still_fitted() -> None:
    """`min(snr, g) / (snr + 1)` is 0.0 there, so a fit with zero terminal SNR never learns its first step."""
    weights = snr_weights("v_prediction", LEVELS, 5.0)
    assert weights[0] == pytest.approx(MIN_WEIGHT) and weights[1] == pytest.approx(MIN_WEIGHT)
    torch.testing.assert_close(weights[2:6], torch.tensor([1 / 2, 4 / 5, 5 / 10, 5 / 100]))


def test_epsilon_weighs_clean_levels_less() -> None:
    weights = snr_weights("epsilon", LEVELS, 5.0)
    torch.testing.assert_close(weights[1:6], torch.tensor([1.0, 1.0, 1.0, 5 / 9, 5 / 99]))
    assert torch.isfinite(weights).all() and (weights >= 0).all()


def test_a_flow_has_none() -> None:
    with pytest.raises(ValueError, match="min_snr_gamma must be left out for a base that predicts flow"):
        snr_weights("flow", LEVELS, 5.0)
