"""Near copies: a 64-bit perceptual hash, nearest neighbours, and a threshold that real images set themselves.

A synthetic image is flagged as a near copy when its nearest training image is closer than all but 0.1% of real
images are to their nearest image of another patient or lesion, so no magic number is needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
_BLOCK = 2048
_SIDE = 16


class Nearest(NamedTuple):
    """Per query, (Q,): where the nearest reference is (-1: there is none) and its similarity, at most 1."""

    position: NDArray[np.int64]
    similarity: NDArray[np.float32]


def dhash(rgb: NDArray[np.uint8]) -> int:
    """64 bits: whether brightness falls from each of 8 x 8 cells to its right neighbour. Survives re-encoding."""
    cells = cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    bits = (cells[:, :-1] > cells[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnails(images: NDArray[np.uint8]) -> Floats:
    """Images (N, S, S, 3) as 16 x 16 thumbnails less their mean, (N, 768): cosine is then normalised correlation."""
    small = [cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).reshape(-1) for image in images]
    flat = np.array(small, dtype=np.float32).reshape(len(images), -1)
    return np.asarray(flat - flat.mean(axis=1, keepdims=True))


def hamming(a: int, b: int) -> int:
    """The number of bits in which two hashes differ."""
    return (a ^ b).bit_count()


def nearest(
    queries: Floats, references: Floats, query_groups: Floats | None = None, reference_groups: Floats | None = None
) -> Nearest:
    """The nearest reference of each query: hashes (N,) uint64 by 1 - Hamming / 64, features (N, D) by cosine.

    With groups, a reference of the query's own group does not count. Blockwise: memory is block x references.
    """
    _check(queries, references)
    indices, similarities = [], []
    for start in range(0, len(queries), _BLOCK):
        part = _similarity(queries[start : start + _BLOCK], references)  # (b, R)
        if query_groups is not None and reference_groups is not None:
            own = np.asarray(query_groups)[start : start + _BLOCK, None] == np.asarray(reference_groups)[None]
            part = np.where(own, -np.inf, part)
        best = part.argmax(axis=1)
        similarity = part[np.arange(len(part)), best]
        indices.append(np.where(np.isfinite(similarity), best, -1))
        similarities.append(similarity)
    return Nearest(np.concatenate(indices).astype(np.int64), np.concatenate(similarities).astype(np.float32))


def near_copy_threshold(features: Floats, groups: Floats, quantile: float = 0.999) -> float:
    """The similarity above which a nearest neighbour is a near copy, from real images of disjoint groups."""
    found = nearest(features, features, groups, groups).similarity
    found = found[np.isfinite(found)]
    if not len(found):
        raise ValueError("groups must name at least two, got one; a threshold needs images of different lesions.")
    return float(np.quantile(found, quantile))


def near_copies(queries: Floats, references: Floats, threshold: float) -> NDArray[np.bool_]:
    """Which queries lie closer to a reference than the threshold, (N,)."""
    return np.asarray(nearest(queries, references).similarity > threshold)


def _similarity(queries: Floats, references: Floats) -> Floats:
    if queries.dtype == np.uint64:
        return np.asarray(1.0 - np.bitwise_count(queries[:, None] ^ references[None]) / 64.0)
    return np.asarray(_unit(queries) @ _unit(references).T)


def _unit(features: Floats) -> Floats:
    rows = features.astype(np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def _check(queries: Floats, references: Floats) -> None:
    same = queries.ndim == references.ndim and queries.shape[1:] == references.shape[1:]
    hashes = queries.dtype == np.uint64 and references.dtype == np.uint64 and queries.ndim == 1
    features = queries.dtype.kind == "f" and references.dtype.kind == "f" and queries.ndim == 2
    if not (len(queries) and len(references) and same and (hashes or features)):
        raise ValueError(
            "queries and references must be hashes (N,) uint64 or features (N, D) of floats, and not empty, got "
            f"{queries.dtype} {queries.shape} and {references.dtype} {references.shape}; compute them alike."
        )
