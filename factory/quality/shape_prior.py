"""What lesions' masks look like: a Gaussian over contour, area and place, by diagnosis.

A mask is described by the logarithm of its share of the image, its centre as shares of the sides, and the Fourier
coefficients of log r over the angle, r being how far the contour is from the centre. In the logarithm every coefficient
gives a contour, and size is in none of them. A diagnosis with fewer than MIN_MASKS masks is given the Gaussian of all;
covariances are shrunk as Ledoit and Wolf (2004) say, for there are more numbers in one than a rare diagnosis has masks.

Letters: N masks, D = 3 + 2 ORDER numbers of a mask, H and W pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from factory.images import Mask

Floats = NDArray[np.float64]

FILE = "shape_prior.json"  # beside a gate's weights
ORDER = 8  # harmonics; the 8th is a lobe of 45 degrees
ANGLES, RADII = 128, 256
MIN_MASKS = 32
MIN_SPREAD = 1e-3  # of any number, so that equal masks have a density
MIN_AREA = 1e-5  # of the image, what a speck is taken for
_ALL = ""  # the pool's name in a file


@dataclass(frozen=True)
class Gaussian:
    """Of D numbers: mean (D,), covariance (D, D), how many masks it was fitted on, and the range of their log areas."""

    mean: Floats
    covariance: Floats
    count: int
    log_area: tuple[float, float]

    @classmethod
    def fit(cls, described: Floats) -> Gaussian:
        """Of N masks, (N, D)."""
        from sklearn.covariance import LedoitWolf  # seconds of imports, which every actor that draws would pay

        # In units of their own spread: shrinkage is towards equal variances, and an area's is not a lobe's.
        spread = np.maximum(described.std(axis=0), MIN_SPREAD)
        found = LedoitWolf().fit(described / spread)
        lowest, highest = described[:, 0].min(), described[:, 0].max()
        covariance = found.covariance_ * np.outer(spread, spread)
        return cls(found.location_ * spread, covariance, len(described), (float(lowest), float(highest)))

    def mahalanobis(self, described: Floats) -> float:
        """Distance of one mask (D,) from the mean."""
        away = described - self.mean
        return float(np.sqrt(away @ np.linalg.solve(self.covariance, away)))

    def log_density(self, described: Floats) -> float:
        """Natural logarithm of the density at one mask, (D,)."""
        volume = np.linalg.slogdet(2 * np.pi * self.covariance)[1]
        return float(-0.5 * (self.mahalanobis(described) ** 2 + volume))


class ShapePrior:
    """The Gaussians of each diagnosis that has enough masks, and of all together."""

    def __init__(self, pool: Gaussian, by_diagnosis: dict[str, Gaussian]) -> None:
        self.pool, self.by_diagnosis = pool, by_diagnosis

    @classmethod
    def fit(cls, masks: Sequence[Mask], diagnoses: Sequence[str | None]) -> ShapePrior:
        """Of masks (H, W), each with its diagnosis or None; empty ones are left out."""
        return cls.of_described([describe(mask) for mask in masks], diagnoses)

    @classmethod
    def of_described(cls, described: Sequence[Floats | None], diagnoses: Sequence[str | None]) -> ShapePrior:
        """As `fit`, of what `describe` said of each mask."""
        known = [(row, name) for row, name in zip(described, diagnoses, strict=True) if row is not None]
        if len(known) < 2:
            raise ValueError(
                f"a shape prior must be fitted on at least two masks that are not empty, got {len(known)}; ingest "
                "images with masks."
            )
        rows = np.stack([row for row, _ in known])
        names = np.array([name or _ALL for _, name in known])
        counts = {str(name): int((names == name).sum()) for name in np.unique(names)}
        enough = [name for name, count in counts.items() if name != _ALL and count >= MIN_MASKS]
        return cls(Gaussian.fit(rows), {name: Gaussian.fit(rows[names == name]) for name in enough})

    def of(self, diagnosis: str | None) -> Gaussian:
        """The Gaussian that stands for a diagnosis: its own, or that of all."""
        return self.by_diagnosis.get(diagnosis or _ALL, self.pool)

    def sample(self, rng: np.random.Generator, diagnosis: str | None, size: int) -> Mask:
        """A mask (size, size) drawn from the prior, never empty. Its area is kept within what was seen, and it lies
        wholly inside: moved there, and made smaller if it is larger than the image."""
        gaussian = self.of(diagnosis)
        row = rng.multivariate_normal(gaussian.mean, gaussian.covariance, method="cholesky")
        row[0] = np.clip(row[0], *gaussian.log_area)
        return render(row, size)

    def mahalanobis(self, mask: Mask, diagnosis: str | None = None) -> float:
        """How far a mask (H, W) is from those of its diagnosis; infinite for an empty one."""
        row = describe(mask)
        return math.inf if row is None else self.of(diagnosis).mahalanobis(row)

    def log_density(self, mask: Mask, diagnosis: str | None = None) -> float:
        """The log density of a mask (H, W) among those of its diagnosis; minus infinity for an empty one."""
        row = describe(mask)
        return -math.inf if row is None else self.of(diagnosis).log_density(row)

    def save(self, path: Path) -> None:
        """JSON, whose numbers come back to the last bit."""
        held = {_ALL: self.pool, **self.by_diagnosis}
        content = {name: _to_json(gaussian) for name, gaussian in held.items()}
        path.write_text(json.dumps({"order": ORDER, "gaussians": content}) + "\n")

    @classmethod
    def load(cls, path: Path) -> ShapePrior:
        content = json.loads(path.read_text())
        if content.get("order") != ORDER:
            raise ValueError(
                f"a shape prior must have {ORDER} harmonics, got {content.get('order')} in {path}; fit it again."
            )
        held = {name: _from_json(found) for name, found in content["gaussians"].items()}
        return cls(held.pop(_ALL), held)


def describe(mask: Mask) -> Floats | None:
    """The D numbers of the largest piece of a mask (H, W), holes filled; None for an empty mask."""
    piece = _largest(mask)
    if piece is None:
        return None
    moments = cv2.moments(piece, binaryImage=True)
    area, (x, y) = moments["m00"], (moments["m10"] / moments["m00"], moments["m01"] / moments["m00"])
    height, width = mask.shape
    spectrum = np.fft.rfft(np.log(_radii(piece, x, y)))[1 : ORDER + 1] / ANGLES
    place = (math.log(area / mask.size), (x + 0.5) / width, (y + 0.5) / height)
    return np.array([*place, *spectrum.real, *spectrum.imag])


def render(described: Floats, size: int) -> Mask:
    """The mask (size, size) that D numbers describe, moved and if need be shrunk to lie wholly inside."""
    spectrum = np.zeros(ANGLES // 2 + 1, complex)
    spectrum[1 : ORDER + 1] = (described[3 : 3 + ORDER] + 1j * described[3 + ORDER :]) * ANGLES
    angle = np.arange(ANGLES) * 2 * np.pi / ANGLES
    contour = np.exp(np.fft.irfft(spectrum, ANGLES))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    unit = cv2.contourArea(contour.astype(np.float32))
    scale = math.sqrt(max(math.exp(described[0]), MIN_AREA) * size**2 / unit)
    scale = min(scale, (size - 3) / float(np.ptp(contour, axis=0).max()))
    points = contour * scale
    low, high = 1.0 - points.min(axis=0), size - 2.0 - points.max(axis=0)
    points += np.clip(described[1:3] * size - 0.5, low, np.maximum(low, high))
    fixed = np.round(points * 16).astype(np.int32)  # four bits below the pixel
    drawn = cv2.fillPoly(np.zeros((size, size), np.uint8), [fixed], 1, shift=4)
    return np.asarray(drawn > 0)


def _largest(mask: Mask) -> NDArray[np.uint8] | None:
    """The largest 8-connected piece without holes, (H, W) in {0, 1}."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return None
    areas = [_filled_area(np.asarray(contour, np.int32)) for contour in contours]
    largest = contours[int(np.argmax(areas))]
    return np.asarray(cv2.drawContours(np.zeros(mask.shape, np.uint8), [largest], -1, 1, cv2.FILLED), np.uint8)


def _filled_area(contour: NDArray[np.int32]) -> int:
    """Pixels of a contour and what it encloses, counted in its own rectangle: a noisy mask has thousands of them."""
    x, y, width, height = cv2.boundingRect(contour)
    canvas = np.zeros((height, width), np.uint8)
    return int(cv2.drawContours(canvas, [contour - (x, y)], -1, 1, cv2.FILLED).sum())


def _radii(piece: NDArray[np.uint8], x: float, y: float) -> Floats:
    """How far the contour is from the centre in each of ANGLES directions, px: the outermost crossing."""
    # A ray of the polar picture is sampled RADII times over the piece's own reach, so that small ones are seen as well.
    rows, columns = np.nonzero(piece)
    reach = float(np.hypot(columns - x, rows - y).max()) + 1.0
    # Without the last flag, what lies outside the image is whatever the memory held.
    how = cv2.INTER_LINEAR | cv2.WARP_POLAR_LINEAR | cv2.WARP_FILL_OUTLIERS
    polar = cv2.warpPolar(piece.astype(np.float32), (RADII, ANGLES), (x, y), reach, how)
    inside = polar >= 0.5
    outermost = RADII - inside[:, ::-1].argmax(axis=1)
    radii = np.where(inside.any(axis=1), outermost, 1) * (reach / RADII)
    return np.maximum(radii, 0.5)


def _to_json(gaussian: Gaussian) -> dict[str, Any]:
    return {
        "mean": gaussian.mean.tolist(), "covariance": gaussian.covariance.tolist(), "count": gaussian.count,
        "log_area": list(gaussian.log_area),
    }  # fmt: skip


def _from_json(found: dict[str, Any]) -> Gaussian:
    lowest, highest = found["log_area"]
    return Gaussian(np.array(found["mean"]), np.array(found["covariance"]), found["count"], (lowest, highest))
