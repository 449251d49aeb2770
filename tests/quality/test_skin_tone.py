"""The typology angle, and what must not enter it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy.stats import spearmanr

from factory import phantom, taxonomy
from factory.quality.skin_tone import hair_mask, ita, skin_mask, skin_type, vignette_mask, without_hair


def painted(lab: tuple[float, float, float], size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Skin of one Lab colour with a dark disk, and the disk's mask."""
    rgb = cv2.cvtColor(np.full((size, size, 3), lab, np.float32), cv2.COLOR_Lab2RGB)
    image = np.round(rgb * 255).astype(np.uint8)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    mask = x**2 + y**2 <= (size / 6) ** 2
    image[mask] = (60, 40, 30)
    return image, mask


@pytest.mark.parametrize(("angle", "name"), [*zip((65, 48, 35, 20, -10, -40), taxonomy.SKIN_TYPES, strict=True)])
def test_the_angle_of_painted_skin_is_read_back_and_banded(angle: float, name: str) -> None:
    image, mask = painted((50 + 14 * np.tan(np.radians(angle)), 9, 14))
    assert ita(image, mask) == pytest.approx(angle, abs=1.5)
    assert skin_type(image, mask) == name


def test_hair_glare_and_vignette_do_not_move_the_angle() -> None:
    image, mask = painted((68, 10, 15))
    clean = ita(image, mask)
    for offset in range(-60, 80, 14):
        cv2.line(image, (0, 20 + offset), (95, 60 + offset), (25, 18, 15), 1)
    image[60:70, 70:80] = 255
    y, x = np.mgrid[:96, :96] - 47.5
    image[x**2 + y**2 > 50**2] = 5
    assert ita(image, mask) == pytest.approx(clean, abs=2)
    assert not skin_mask(image, mask)[0, 0] and not skin_mask(image, mask)[mask].any()


def test_too_little_skin_or_blue_light_gives_no_angle() -> None:
    image, mask = painted((70, 10, 15))
    assert np.isnan(ita(image, np.ones_like(mask)))
    assert skin_type(image, np.ones_like(mask)) is None
    blue, mask = painted((75, 2, -8))
    assert np.isnan(ita(blue, mask)) and skin_type(blue, mask) is None


def test_strands_are_found_and_removed_and_round_spots_are_not() -> None:
    image, _ = painted((72, 10, 15))
    clean = image.copy()
    cv2.line(image, (2, 5), (90, 20), (25, 18, 15), 1)
    cv2.circle(image, (20, 70), 2, (90, 60, 40), -1)
    hair = hair_mask(image)
    assert hair[12, 45] and not hair[70, 20]
    away = np.abs(without_hair(image).astype(int) - clean)[:30]
    assert away.max() < 12
    assert not hair_mask(clean).any() and without_hair(clean) is clean


def test_a_dark_lesion_in_the_middle_is_no_vignette() -> None:
    image, mask = painted((70, 10, 15))
    image[mask] = 3
    assert not vignette_mask(image).any()


def test_the_angle_follows_the_phantoms() -> None:
    drawn = [phantom.draw(79, index, 96) for index in range(100)]
    found = np.asarray([ita(p.image, p.mask) for p in drawn])
    seen = np.isfinite(found)
    # Exposure and white balance move the angle, so ranks are what can be asked for.
    assert seen.sum() > 40
    assert spearmanr(np.asarray([p.ita for p in drawn])[seen], found[seen])[0] > 0.6
