"""Near copies and licences of synthetic rows, with the truth planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from factory import images, phantom, records
from factory.lab.lineage import LICENCES, NEAR_COPIES, nearest_real, parent_licences
from factory.quality.duplicates import thumbnails
from factory.storage import open_store


def _image(seed: int, index: int) -> np.ndarray:
    return np.asarray(phantom.draw(seed, index, 48).image)


def _struct(pixels: np.ndarray) -> dict[str, object] | None:
    return records.image_struct(images.encode_png(pixels), "i.png")


@pytest.fixture(scope="module")
def real() -> pa.Table:
    rows: list[dict[str, Any]] = [
        {
            "row_id": f"r{i}", "record_id": f"c{i}", "group_id": f"g{i}", "image": _struct(_image(8, i)),
            "split": "test" if i == 29 else "train", "licence": "CC-BY-NC-4.0" if i == 0 else "CC0-1.0",
            "outcome": "accepted",
        }
        for i in range(30)
    ]  # fmt: skip
    return records.rows_to_table("corpus", rows)


@pytest.fixture(scope="module")
def synthetic() -> pa.Table:
    noisy = np.clip(_image(8, 4).astype(int) + np.random.default_rng(0).integers(-3, 4, (48, 48, 3)), 0, 255)
    rows: list[dict[str, Any]] = [
        {"sample_id": "copy", "image": _struct(noisy.astype(np.uint8)), "parents": ["c0", "c1"], "outcome": "accepted"},
        {"sample_id": "own", "image": _struct(_image(9, 2)), "parents": ["elsewhere"], "outcome": "accepted"},
        {"sample_id": "free", "image": _struct(_image(9, 3)), "parents": [], "outcome": "accepted"},
        {
            "sample_id": "lost",
            "image": _struct(_image(8, 5)),
            "parents": ["c5"],
            "outcome": "rejected",
            "reason": "iou",
        },
    ]
    return records.rows_to_table("samples", rows)


def test_a_copy_under_noise_is_flagged_with_the_image_it_copies(
    real: pa.Table, synthetic: pa.Table, tmp_path: Path
) -> None:
    found = nearest_real(open_store(str(tmp_path)), synthetic, real)
    assert json.loads((tmp_path / NEAR_COPIES).read_text()) == found
    assert found["copies"]["copy"] == ["c4"]
    first = found["nearest_pairs"][0]
    assert first["sample_id"] == "copy" and first["near_copy"]
    assert first["features"]["similarity"] > 0.999
    assert (found["num_real"], found["num_synthetic"]) == (29, 3)
    assert found["by"]["features"]["flagged"] == 1


def test_the_threshold_is_what_real_images_of_other_groups_reach(
    real: pa.Table, synthetic: pa.Table, tmp_path: Path
) -> None:
    found = nearest_real(open_store(str(tmp_path)), synthetic, real)
    flat = np.array([images.resized(_image(8, i), 16, 16).astype(float).ravel() for i in range(29)])
    correlation = np.corrcoef(flat)
    np.fill_diagonal(correlation, -1)
    expected = np.quantile(correlation.max(axis=1), 0.999)
    assert found["by"]["features"]["threshold"] == pytest.approx(expected, abs=0.01)  # the resizings differ a little


def test_a_thumbnails_cosine_ignores_brightness() -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (1, 16, 16, 3), dtype=np.uint8)
    assert np.allclose(thumbnails(pixels), thumbnails(pixels + 40), atol=1e-3)


def test_licences_of_parents_are_counted_once_per_sample(real: pa.Table, synthetic: pa.Table, tmp_path: Path) -> None:
    found = parent_licences(open_store(str(tmp_path)), synthetic, real)
    assert found["parents"] == {"CC-BY-NC-4.0": 1, "CC0-1.0": 1, "unknown": 1}
    assert found["without_parents"] == 1
    assert found["training_split"] == {"CC-BY-NC-4.0": 1, "CC0-1.0": 28}
    assert json.loads((tmp_path / LICENCES).read_text()) == found


def test_a_side_without_images_is_refused(real: pa.Table, synthetic: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images on both sides, got 29 real and 0 synthetic"):
        nearest_real(open_store(str(tmp_path)), synthetic.slice(3), real)
