"""A whole phantom: truth first, then skin, lesion and artefacts painted over each other and photographed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import cv2
import numpy as np

from factory.phantom.artefacts import ARTEFACTS, vignette
from factory.phantom.camera import expose, light
from factory.phantom.fields import Array, generator
from factory.phantom.lesion import paint_lesion
from factory.phantom.settings import DEFAULT, MAX_SIZE, MIN_SIZE, PhantomSettings
from factory.phantom.skin import follicles, freckles, neighbours, paint_skin, skin_lab
from factory.phantom.strokes import polygon_cover
from factory.phantom.truth import Attributes, Truth, draw_attributes


@dataclass(frozen=True, kw_only=True)
class Phantom(Truth):
    """One image (size, size, 3) uint8 and its mask (size, size) bool, with their exact truth."""

    image: Array = field(repr=False)
    mask: Array = field(repr=False)
    artefacts: tuple[str, ...]
    index: int
    seed: int
    size: int


def _chosen(rng: np.random.Generator, s: PhantomSettings) -> tuple[str, ...]:
    """Names of the artefacts that this phantom has."""
    names = ("freckles", "follicles", "neighbours", *ARTEFACTS, "vignette")
    return tuple(name for name in names if rng.uniform() < getattr(s, name))


def _photograph(
    at: Attributes, cover: Array, seed: int, index: int, s: PhantomSettings
) -> tuple[Array, tuple[str, ...]]:
    """Paint the scene in Lab and take its picture. Each stage has a stream of its own, so none shifts another."""
    size = cover.shape[0]
    rng, skin_rng, spoil = (generator(seed, index, k) for k in (1, 2, 3))
    base = skin_lab(at.ita, float(skin_rng.uniform(0, 1)))
    artefacts = _chosen(spoil, s)
    lab = paint_skin(skin_rng, base, s, size)
    for name, paint in (("freckles", freckles), ("follicles", follicles)):
        if name in artefacts:
            paint(skin_rng, lab, size)
    if "neighbours" in artefacts:
        neighbours(skin_rng, lab, at.centre, at.radius, size)
    paint_lesion(rng, at, base, s, lab, cover)
    rgb = cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)
    for name, spoil_with in ARTEFACTS.items():
        if name in artefacts:
            spoil_with(spoil, rgb, s, size)
    light(spoil, rgb, s, size)
    if "vignette" in artefacts:
        vignette(spoil, rgb, s, size)
    return expose(spoil, generator(seed, index, 1000 + size), rgb, s, size), artefacts


def draw(seed: int, index: int, size: int = 128, *, settings: PhantomSettings = DEFAULT, **wanted: Any) -> Phantom:
    """Phantom number `index` of `seed`.

    `wanted` may pin `diagnosis`, `skin_type` (1..6), `asymmetry` ("low", "medium", "high") and `colors` (a tuple of
    names from `COLORS`, the base colour first).
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"size must be from {MIN_SIZE} to {MAX_SIZE} px, got {size}; draw at a size in that range and resize"
        )
    at = draw_attributes(seed, index, settings=settings, **wanted)
    outline = (at.contour * at.radius + np.array(at.centre)) * size
    cover = polygon_cover(outline, size, 4 if size <= 192 else 2)
    image, artefacts = _photograph(at, cover.astype(np.float32) / 255, seed, index, settings)
    stated = {known.name: getattr(at, known.name) for known in fields(Truth)}
    return Phantom(**stated, image=image, mask=cover > 127, artefacts=artefacts, index=index, seed=seed, size=size)


def draw_many(
    seed: int, indices: Iterable[int], size: int = 128, *, settings: PhantomSettings = DEFAULT, **wanted: Any
) -> Iterator[Phantom]:
    """Phantoms of `seed`, one at a time, in the order of `indices`."""
    for index in indices:
        yield draw(seed, index, size, settings=settings, **wanted)
