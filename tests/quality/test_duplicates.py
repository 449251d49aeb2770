"""Hashes, neighbours and the threshold that real images set."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from factory import phantom
from factory.quality import duplicates
from factory.quality.duplicates import dhash, hamming, near_copies, near_copy_threshold, nearest


def test_a_reencoded_and_resized_copy_keeps_its_hash_and_another_lesion_does_not() -> None:
    image, other = phantom.draw(5, 1, 128).image, phantom.draw(5, 2, 128).image
    _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])
    copy = cv2.resize(cv2.imdecode(code, cv2.IMREAD_COLOR), (100, 100), interpolation=cv2.INTER_AREA)
    assert hamming(dhash(image), dhash(copy)) <= 6 < hamming(dhash(image), dhash(other))


def test_a_ramp_has_all_bits_and_its_mirror_none() -> None:
    ramp = np.dstack([np.tile(np.arange(90, dtype=np.uint8)[::-1], (80, 1))] * 3)
    assert dhash(ramp) == 2**64 - 1 and dhash(ramp[:, ::-1]) == 0


def test_neighbours_of_hashes_are_by_bits() -> None:
    references = np.asarray([0, 2**64 - 1, 0b1111], np.uint64)
    found = nearest(np.asarray([1, 2**63], np.uint64), references)
    assert found.position.tolist() == [0, 0] and found.similarity.tolist() == pytest.approx([63 / 64] * 2)


def test_neighbours_of_features_are_by_angle_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(50, 8)), rng.normal(size=(70, 8))
    whole = nearest(queries, references)
    cosine = (queries @ references.T) / np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(references, axis=1))
    assert whole.position.tolist() == cosine.argmax(axis=1).tolist()
    assert whole.similarity == pytest.approx(cosine.max(axis=1), abs=1e-5)
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    assert nearest(queries, references).position.tolist() == whole.position.tolist()


def test_the_threshold_ignores_the_own_group_and_flags_a_planted_copy() -> None:
    rng = np.random.default_rng(2)
    lesions = rng.normal(size=(200, 16))
    features = np.repeat(lesions, 2, axis=0) + 0.01 * rng.normal(size=(400, 16))
    threshold = near_copy_threshold(features, np.repeat(np.arange(200), 2))
    assert threshold < 0.95  # the two views of one lesion are at 0.999, and do not count
    made = np.vstack([features[3] + 0.001, rng.normal(size=(30, 16))])
    flagged = near_copies(made, features, threshold)
    assert flagged[0] and flagged[1:].mean() < 0.1


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="compute them alike"):
        nearest(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="compute them alike"):
        nearest(np.zeros(2, np.uint64), np.zeros(0, np.uint64))
    with pytest.raises(ValueError, match="at least two"):
        near_copy_threshold(np.ones((3, 2)), np.zeros(3))
    assert nearest(np.ones((1, 2)), np.ones((1, 2)), np.zeros(1), np.zeros(1)).position.tolist() == [-1]
