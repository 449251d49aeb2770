"""Copies of a photograph are found whatever was done to them, and other photographs are not."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pyarrow as pa
import pytest

from factory import phantom
from factory.images import RGB
from factory.quality import copies
from factory.quality.copies.frames import apply, invariants, turned
from factory.recipe import CorpusSection

SIZE, COUNT = 128, 24
ALIKE = CorpusSection().min_likeness


@pytest.fixture(scope="module")
def originals() -> list[RGB]:
    return [drawn.image for drawn in phantom.draw_many(41, range(COUNT), SIZE)]


def encoded(rgb: RGB, quality: int = 70) -> RGB:
    data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


def sized(rgb: RGB, side: int) -> RGB:
    return cv2.resize(np.ascontiguousarray(rgb), (side, side), interpolation=cv2.INTER_AREA)


def shifted(rgb: RGB) -> RGB:
    changed = (rgb / 255.0) ** 0.93 * (1.04, 0.98, 1.03)
    return (np.clip(changed, 0, 1) * 255).astype(np.uint8)


def cropped(rgb: RGB, rng: np.random.Generator) -> RGB:
    """A window of 0.75 to 0.95 of each side, anywhere."""
    height, width = (int(rng.uniform(0.75, 0.95) * side) for side in rgb.shape[:2])
    top, left = (int(rng.integers(0, room + 1)) for room in (rgb.shape[0] - height, rgb.shape[1] - width))
    return rgb[top : top + height, left : left + width]


CHANGES: dict[str, Callable[[RGB], RGB]] = {
    "encoded again": encoded,
    "a 224 px copy": lambda rgb: encoded(sized(rgb, 224)),
    "reduced": lambda rgb: sized(rgb, 96),
    "flipped": lambda rgb: encoded(rgb[:, ::-1]),
    "turned": lambda rgb: encoded(np.rot90(rgb)),
    "other colours": lambda rgb: encoded(shifted(rgb)),
}


def described(pictures: list[RGB]) -> copies.Description:
    found = [copies.describe(picture) for picture in pictures]
    return copies.Description(np.stack([d.frames for d in found]), np.stack([d.keys for d in found]))


def compared(pictures: list[RGB]) -> dict[tuple[int, int], float]:
    of = described(pictures)
    scores = {}
    found = copies.candidates(of)
    for a, b, *placed in zip(found.a, found.b, found.frame_a, found.frame_b, found.symmetry, strict=True):
        placements = [
            copies.Placement(of.frames[a, fa], of.frames[b, fb], int(k))
            for fa, fb, k in zip(*placed, strict=True)
            if fa >= 0
        ]
        scores[int(a), int(b)] = copies.likeness(copies.view(pictures[a]), copies.view(pictures[b]), placements, ALIKE)
    return scores


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_a_likely_copy_and_nothing_else_is(originals: list[RGB], change: str) -> None:
    scores = compared([*originals, *(CHANGES[change](rgb) for rgb in originals[:12])])
    assert {pair for pair, score in scores.items() if score >= ALIKE} == {(k, COUNT + k) for k in range(12)}


def test_crops_are_found_where_they_were_cut(originals: list[RGB]) -> None:
    rng = np.random.default_rng(5)
    cut = [encoded(cropped(rgb, rng)) for rgb in originals]
    scores = compared([*originals, *cut])
    found = {pair for pair, score in scores.items() if score >= ALIKE}
    assert found <= {(k, COUNT + k) for k in range(COUNT)} and len(found) >= COUNT - 2


def test_keys_turn_as_their_images_do(originals: list[RGB]) -> None:
    key = copies.describe(originals[0]).keys[0]
    for symmetry in range(8):
        its = copies.describe(apply(originals[0], symmetry)).keys[0]
        assert np.allclose(turned(key, symmetry), its, atol=1e-3)
        assert np.allclose(invariants(its), invariants(key), atol=1e-3)


def test_a_description_survives_its_column(originals: list[RGB]) -> None:
    kept = [copies.describe(rgb) for rgb in originals[:3]]
    read = copies.unpacked(pa.array([copies.packed(d) for d in kept]))
    assert read.keys.shape == (3, copies.FRAMES, copies.DIM)
    for index, original in enumerate(kept):
        assert np.allclose(read.keys[index], original.keys, atol=1e-3, equal_nan=True)
        assert np.allclose(read.frames[index], original.frames, atol=1e-3, equal_nan=True)


def test_flat_pictures_have_nothing_to_be_compared_by() -> None:
    flat = [np.full((64, 64, 3), grey, np.uint8) for grey in (0, 90, 255)]
    assert all(score == 0.0 for score in compared(flat).values())


def test_no_images_have_no_candidates() -> None:
    empty = copies.Description(np.zeros((0, copies.FRAMES, 3)), np.zeros((0, copies.FRAMES, copies.DIM)))
    assert len(copies.candidates(empty).a) == 0
