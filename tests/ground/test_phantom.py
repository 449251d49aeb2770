"""The phantom's truth must be exact: everything trained or measured downstream leans on it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from factory import phantom
from factory.phantom import ASYMMETRY_LEVELS, BORDER_LEVELS, COLORS, DEFAULT, DIAGNOSES, HELD_OUT, Phantom, draw

DRAWN = 600


@pytest.fixture(scope="module")
def attributes() -> list[phantom.Attributes]:
    return [phantom.draw_attributes(11, i) for i in range(DRAWN)]


def disc() -> np.ndarray:
    theta = np.linspace(0, 2 * np.pi, 512, endpoint=False)
    return np.stack([np.cos(theta), np.sin(theta)], axis=1)


def asymmetry_by_pixels(mask: np.ndarray) -> float:
    """The definition again by another route: reflect pixel coordinates, look them up, count the differences."""
    y, x = np.nonzero(mask)
    points = np.stack([x, y], axis=1).astype(float)
    centre = points.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov((points - centre).T))
    every = np.indices(mask.shape)[::-1].reshape(2, -1).T - centre
    found = []
    for axis in vectors.T:
        mirrored = np.rint(2 * np.outer(every @ axis, axis) - every + centre).astype(int)
        ok = ((mirrored >= 0) & (mirrored < mask.shape[0])).all(axis=1)
        other = np.zeros(len(every), bool)
        other[ok] = mask[mirrored[ok, 1], mirrored[ok, 0]]
        found.append(np.sum(other != mask.ravel()) / (2 * mask.sum()))
    return float(np.mean(found))


def touches_the_frame(mask: np.ndarray) -> bool:
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def same(a: Phantom, b: Phantom) -> bool:
    return bool((a.image == b.image).all() and (a.mask == b.mask).all()) and a.colors == b.colors


def test_the_same_seed_and_index_give_the_same_bytes() -> None:
    for i in range(12):
        assert same(draw(3, i, 64), draw(3, i, 64))


def test_the_order_of_drawing_does_not_matter() -> None:
    forwards = list(phantom.draw_many(3, range(8), 64))
    backwards = list(phantom.draw_many(3, reversed(range(8)), 64))[::-1]
    assert [p.index for p in forwards] == list(range(8))
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_another_seed_or_index_gives_another_picture() -> None:
    first = draw(0, 0, 64).image
    assert (first != draw(1, 0, 64).image).any() and (first != draw(0, 1, 64).image).any()


@pytest.mark.parametrize("size", [32, 128, 512])
def test_every_size_in_range_is_drawn(size: int) -> None:
    p = draw(5, 1, size)
    assert p.image.shape == (size, size, 3) and p.image.dtype == np.uint8
    assert p.mask.shape == (size, size) and p.mask.dtype == bool and p.size == size


@pytest.mark.parametrize("size", [16, 31, 513])
def test_a_size_out_of_range_is_refused_with_a_remedy(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be from 32 to 512 px, got {size}; draw at"):
        draw(0, 0, size)


def test_a_lesion_is_the_same_at_two_sizes() -> None:
    for i in range(25):
        small, large = draw(9, i, 128), draw(9, i, 256)
        up = cv2.resize(small.mask.astype(np.float32), (256, 256), interpolation=cv2.INTER_LINEAR) > 0.5
        assert (up & large.mask).sum() / (up | large.mask).sum() > 0.9
        down = cv2.resize(large.image, (128, 128), interpolation=cv2.INTER_AREA).astype(float)
        assert np.abs(down - small.image).mean() < 9
        assert (small.diagnosis, small.colors, small.artefacts) == (large.diagnosis, large.colors, large.artefacts)


def test_the_mask_holds_a_lesion_but_not_everything() -> None:
    for p in phantom.draw_many(2, range(60), 64):
        assert 0.002 < p.mask.mean() < 0.95


def test_stated_asymmetry_is_found_again_in_the_mask() -> None:
    checked = 0
    for i in range(60):
        p = draw(4, i, 256)
        if not touches_the_frame(p.mask) and p.mask.mean() > 0.05:
            # Near-round shapes have no definite axes, so there the two routes may pick different ones.
            spread = np.linalg.eigvalsh(np.cov(np.stack(np.nonzero(p.mask))))
            if spread[1] > 1.25 * spread[0]:
                assert asymmetry_by_pixels(p.mask) == pytest.approx(p.asymmetry, abs=0.02)
                checked += 1
    assert checked >= 10


def test_asymmetry_is_the_mean_over_both_axes(attributes: list[phantom.Attributes]) -> None:
    assert all(a.asymmetry == pytest.approx(sum(a.asymmetry_axes) / 2) and 0 <= a.asymmetry <= 1 for a in attributes)


def test_a_disc_is_symmetric_and_regular() -> None:
    assert max(phantom.measure_asymmetry(disc())) < 0.01
    assert phantom.measure_irregularity(disc()) == pytest.approx(0, abs=1e-3)


def test_a_ragged_contour_is_less_regular_than_its_disc() -> None:
    waves = 1 + 0.1 * np.cos(12 * np.linspace(0, 2 * np.pi, 512, endpoint=False))
    assert phantom.measure_irregularity(disc() * waves[:, None]) > 0.2


def test_diameter_of_the_contour_is_stated_in_millimetres(attributes: list[phantom.Attributes]) -> None:
    for a in attributes[:50]:
        equal_area = 2 * a.radius * phantom.FIELD_MM
        assert equal_area * 0.99 <= a.diameter_mm <= 3 * equal_area


def test_malignancy_follows_the_stated_logistic(attributes: list[phantom.Attributes]) -> None:
    stated = [phantom.malignancy_probability(a.asymmetry, a.border_irregularity, a.color_count) for a in attributes]
    assert stated == pytest.approx([a.probability for a in attributes])
    order = np.argsort(stated)
    malignant = np.array([a.malignant for a in attributes])[order]
    for part, chance in zip(np.split(malignant, 4), np.split(np.array(stated)[order], 4), strict=True):
        error = np.sqrt(np.sum(chance * (1 - chance))) / len(chance)
        assert abs(part.mean() - chance.mean()) < 4 * error
    assert 0.2 < malignant.mean() < 0.35


def test_the_diagnosis_follows_malignancy(attributes: list[phantom.Attributes]) -> None:
    assert all(a.malignant == (a.diagnosis == "melanoma") for a in attributes)
    benign = [a.diagnosis for a in attributes if not a.malignant]
    assert abs(benign.count("nevus") / len(benign) - phantom.NEVUS_SHARE) < 0.08


def test_levels_split_the_phantoms_near_terciles(attributes: list[phantom.Attributes]) -> None:
    for values, cuts in (
        ([a.asymmetry for a in attributes], ASYMMETRY_LEVELS),
        ([a.border_irregularity for a in attributes], BORDER_LEVELS),
    ):
        names = [phantom.level(v, cuts) for v in values]
        assert all(0.25 < names.count(n) / DRAWN < 0.42 for n in phantom.LEVELS)


@pytest.mark.parametrize("diagnosis", DIAGNOSES)
def test_a_pinned_diagnosis_is_drawn(diagnosis: str) -> None:
    for i in range(10):
        p = draw(1, i, 48, diagnosis=diagnosis)
        assert p.diagnosis == diagnosis and p.malignant == (diagnosis == "melanoma")


def test_pins_that_contradict_the_model_are_still_kept() -> None:
    a = phantom.draw_attributes(0, 0, diagnosis="melanoma", asymmetry="low", colors=("light-brown",))
    assert (a.diagnosis, a.colors, phantom.level(a.asymmetry, ASYMMETRY_LEVELS)) == (
        "melanoma",
        ("light-brown",),
        "low",
    )


@pytest.mark.parametrize("wanted", phantom.LEVELS)
def test_a_pinned_asymmetry_is_measured(wanted: str) -> None:
    drawn = [phantom.draw_attributes(1, i, asymmetry=wanted) for i in range(40)]
    assert {phantom.level(a.asymmetry, ASYMMETRY_LEVELS) for a in drawn} == {wanted}


@pytest.mark.parametrize("colors", [("white",), ("dark-brown", "red", "blue-gray"), COLORS])
def test_pinned_colours_are_reported(colors: tuple[str, ...]) -> None:
    p = draw(1, 2, 64, colors=colors)
    assert p.colors == colors and p.color_count == len(colors)


def test_every_stated_colour_covers_its_share_of_the_lesion() -> None:
    for i in range(40):
        a = phantom.draw_attributes(8, i)
        labels, rho, _ = phantom._painted(np.random.default_rng(i), a.contour, a.colors)
        counts = np.bincount(labels[rho < 1], minlength=a.color_count)
        assert (counts / counts.sum() > 0.03).all() and len(counts) == a.color_count


def test_skin_types_go_from_light_to_dark() -> None:
    for a, b in zip(range(1, 6), range(2, 7), strict=True):
        light, dark = (phantom.draw_attributes(0, 0, skin_type=k) for k in (a, b))
        assert light.skin_type == a and light.ita > phantom.ITA_EDGES[a - 1] >= dark.ita
        assert phantom.skin_lab(light.ita)[0] > phantom.skin_lab(dark.ita)[0]


def test_the_individual_typology_angle_of_the_base_skin_is_the_stated_one() -> None:
    for ita in (60.0, 45.0, 30.0, 15.0, -10.0, -45.0):
        lightness, _, b = phantom.skin_lab(ita)
        assert np.degrees(np.arctan2(lightness - 50, b)) == pytest.approx(ita)


def test_held_out_settings_draw_other_pictures() -> None:
    usual = [draw(6, i, 64) for i in range(40)]
    held = [draw(6, i, 64, settings=HELD_OUT) for i in range(40)]
    assert all((a.image != b.image).any() for a, b in zip(usual, held, strict=True))
    assert sum("hair" in p.artefacts for p in held) > sum("hair" in p.artefacts for p in usual)
    for name in ("mottle", "grain", "illumination", "noise"):
        assert getattr(HELD_OUT, name)[0] >= getattr(DEFAULT, name)[1]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"diagnosis": "wart"}, "diagnosis must be one of"),
        ({"skin_type": 7}, "skin_type must be one of"),
        ({"asymmetry": "extreme"}, "asymmetry must be one of"),
        ({"colors": ("green",)}, "colors must be a tuple"),
        ({"colors": "red"}, "colors must be a tuple"),
        ({"hair": True}, "cannot pin 'hair'"),
    ],
)
def test_a_pin_that_cannot_be_met_is_refused(wanted: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(0, 0, 64, **wanted)
