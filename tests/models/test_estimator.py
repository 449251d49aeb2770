"""The estimate of the true IoU: learned from pairs, kept beside its segmenter, a row's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from factory.fits.iou_estimator import agreements, fit_estimator
from factory.lab.planted import calibration_error
from factory.models.estimator import FILE, IouEstimator, load_estimator, save_estimator


def unsure(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Agreements of a segmenter that finds less the less sure it is, and what is true."""
    rng = np.random.default_rng(seed)
    true, sure = rng.beta(4, 2, count), rng.uniform(0.5, 1, count)
    measured = true * sure
    return np.stack([measured, measured, sure, np.full(count, 0.8), np.full(count, 0.8)], 1), true


def test_it_learns_that_a_low_overlap_of_an_unsure_segmenter_is_no_low_overlap() -> None:
    model = fit_estimator(*unsure(2000, 0))
    rows, true = unsure(1000, 1)
    said = model.expected(rows)
    assert calibration_error(np.stack([rows[:, 0], true], 1)) > 0.15
    assert calibration_error(np.stack([said, true], 1)) < 0.03 and np.corrcoef(said, true)[0, 1] > 0.95
    again = fit_estimator(*unsure(2000, 0))
    assert again.expected(rows).tobytes() == said.tobytes()
    for number in (0, 999):  # whatever stands beside it
        assert model.expected(rows[number : number + 1])[0] == said[number]


def test_it_lies_beside_its_segmenter_and_need_not_be_there(tmp_path: Path) -> None:
    assert load_estimator(tmp_path) is None
    torch.manual_seed(0)
    model = IouEstimator()
    save_estimator(model, tmp_path)
    rows = unsure(5, 2)[0]
    again = load_estimator(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 10_000 and again is not None
    assert np.array_equal(again.expected(rows), model.double().expected(rows))
    assert again.expected(np.zeros((0, 5))).shape == (0,)
    ends = again.expected(np.array([[0.0] * 5, [1.0] * 5]))
    assert np.isfinite(ends).all()


def test_pairs_are_shown_as_other_cameras_would_and_their_truth_is_known() -> None:
    shown = []

    def find(pictures: np.ndarray) -> np.ndarray:
        shown.append(pictures)
        return np.full(pictures.shape[:3], 0.9, np.float32)

    rows, true = agreements(find, 20, 32)
    assert [len(part) for part in shown] == [16, 4] and rows.shape == (20, 5) and ((rows >= 0) & (rows <= 1)).all()
    assert 0.2 < (true > 0.7).mean() < 0.9 and (true == 1).sum() >= 5
    assert np.allclose(rows[:, 3], 1) and np.array_equal(agreements(find, 20, 32)[1], true)
