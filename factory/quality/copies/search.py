"""Which images of many may show one photograph, by their descriptions alone.

The nearest keys of other images are found for every key, in an inverted file over what no symmetry changes (faiss;
Jégou et al. 2011). A match that is much closer than the last neighbour stands for itself (Lowe 2004), whatever the
images are like and however many there are, so a pair of images counts by the sum of -log(distance / last distance)
over the matches of its frames. For the pairs that remain, a frame of each under one symmetry says where b lies on a,
and the placements are ranked by how many of the other frames agree. P pairs, B = BLOBS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import faiss
import numpy as np

from factory.quality.copies.frames import BLOBS, MATRICES, Description, Floats, Ints, invariants, turned

NEIGHBOURS = 8  # keys of other images that are looked at for each key
LEAST_DISTINCT = 0.7  # about two pairs in ten images are then no copies, in 15,000 phantoms as in 60,000
PLACEMENTS = 12  # of b on a, per pair, that are worth a look at the pixels: a twentieth of crops need the fourth on

_CLOSEST, _TELLING = 0.01, 0.95  # ratios of distances: closer is not more distinct, and further says next to nothing
_EXACT = 30_000  # keys; so many are compared each with each
_PROBES = 12  # cells of the inverted file that are searched
_REACH = 1.2  # keys further apart than this count nothing (unit length, so at most 2)
_HYPOTHESES = 24  # placements per pair whose consensus is counted
_PLACE_SLACK, _PLACE_LEAST = 0.12, 0.025  # of the way between two blobs; of the image's short side
_SCALE_SLACK = 0.35  # of the log of two frames' ratio
_MOST_SCALE = 2.5
_CHUNK = 4_096


class Candidates(NamedTuple):
    """Pairs of images, each once with a < b, (P,); the placements of each, likeliest first, (P, PLACEMENTS): a's frame,
    b's frame, and the symmetry that turns b into a. Where there are fewer, frame_a is -1."""

    a: Ints
    b: Ints
    frame_a: Ints
    frame_b: Ints
    symmetry: Ints


def candidates(described: Description) -> Candidates:
    """Pairs of images, of descriptions (N, F, ...), that may be copies; `likeness` decides."""
    pairs = _distinct_pairs(described)
    found = [_placed(described, pairs[start : start + _CHUNK]) for start in range(0, max(len(pairs), 1), _CHUNK)]
    return Candidates(*(np.concatenate(column) for column in zip(*found, strict=True)))


def alike(vectors: Floats, least: float) -> tuple[Ints, Ints, Floats]:
    """Pairs a < b of vectors (N, d) of unit length with a cosine of at least `least`, among the nearest of each, and
    that cosine: (P,) each."""
    found: dict[tuple[int, int], float] = {}
    for start, distance, near in _nearest(np.ascontiguousarray(vectors)):
        cosine = 1 - distance**2 / 2
        own, place = np.nonzero((near >= 0) & (cosine >= least))
        for one, other, value in zip(own + start, near[own, place], cosine[own, place], strict=True):
            if one != other:
                found[min(int(one), int(other)), max(int(one), int(other))] = float(value)
    pairs = np.array(sorted(found), np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.array([found[one, other] for one, other in pairs.tolist()], np.float32)


def _distinct_pairs(described: Description) -> Ints:
    """Pairs (P, 2), a < b in order, of images whose keys are closer to each other than keys are in general."""
    rows, frames = np.nonzero(np.isfinite(described.keys[..., 0]))
    if len(rows) < 2:
        return np.zeros((0, 2), np.int64)
    count = len(described.keys)
    codes, distinct = [], []
    for start, distance, near in _nearest(invariants(described.keys[rows, frames].astype(np.float32))):
        ratio = distance / np.maximum(distance[:, -1:], 1e-6)
        own = rows[start : start + len(near), None]
        match = (near >= 0) & (rows[near] != own) & (ratio < _TELLING)
        a, b = np.broadcast_to(own, near.shape)[match], rows[near[match]]
        codes.append(np.minimum(a, b) * count + np.maximum(a, b))
        distinct.append(-np.log(np.maximum(ratio[match], _CLOSEST)))
    pairs, member = np.unique(np.concatenate(codes), return_inverse=True)
    chosen = np.bincount(member, np.concatenate(distinct), len(pairs)) >= LEAST_DISTINCT
    return np.stack(np.divmod(pairs[chosen], count), axis=1)


def _nearest(points: Floats) -> Iterator[tuple[int, Floats, Ints]]:
    """The nearest points of each (M, d), itself among them, a chunk at a time: where it starts, distances and places
    (m, K), nearest first, -1 for none."""
    # Nothing else runs meanwhile, and a task's own limit on threads is for tasks that run beside others.
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    index = _index(points)
    index.add(points)
    wanted = min(NEIGHBOURS + 1, len(points))
    for start in range(0, len(points), 16 * _CHUNK):
        squares, near = index.search(points[start : start + 16 * _CHUNK], wanted)
        yield start, np.sqrt(np.maximum(squares, 0)), near


def _index(points: Floats) -> Any:
    if len(points) <= _EXACT:
        return faiss.IndexFlatL2(points.shape[1])
    cells = int(4 * np.sqrt(len(points)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(points.shape[1]), points.shape[1], cells)
    index.cp.niter, index.cp.max_points_per_centroid, index.nprobe = 8, 64, _PROBES
    sample = np.random.default_rng(0).permutation(len(points))[: 48 * cells]
    index.train(points[np.sort(sample)])
    return index


def _placed(described: Description, pairs: Ints) -> Candidates:
    """Pairs (P, 2) with the placements of one image on the other that explain most of both."""
    if not len(pairs):
        none = np.zeros((0, PLACEMENTS), np.int64)
        return Candidates(none[:, 0], none[:, 0], none, none, none)
    a, b = pairs.T
    keys_a, keys_b = (described.keys[side].astype(np.float32) for side in (a, b))
    frames_a, frames_b = (described.frames[side].astype(np.float32) for side in (a, b))
    distance = _distances(keys_a, keys_b)  # (P, 8, F, F)
    flat = distance.reshape(len(pairs), -1)
    best = np.argpartition(flat, _HYPOTHESES, axis=1)[:, :_HYPOTHESES]
    symmetry, frame_a, frame_b = np.unravel_index(best, distance.shape[1:])  # (P, H) each
    score = _consensus(distance, frames_a, frames_b, symmetry, frame_a, frame_b)
    score += _REACH - np.take_along_axis(flat, best, axis=1)
    order = np.argsort(-score, axis=1, kind="stable")[:, :PLACEMENTS]
    score, symmetry, frame_a, frame_b = (
        np.take_along_axis(values, order, axis=1) for values in (score, symmetry, frame_a, frame_b)
    )
    frame_a = np.where(np.isfinite(score), frame_a, -1)
    return Candidates(a, b, frame_a, frame_b, symmetry)


def _distances(keys_a: Floats, keys_b: Floats) -> Floats:
    """Between keys (P, F, D) under each symmetry: (P, 8, F, F), inf where there is no frame, or where one of the two is
    the whole image and the other is not."""
    dots = np.stack([keys_a @ turned(keys_b, k).transpose(0, 2, 1) for k in range(8)], axis=1)
    found = np.sqrt(np.maximum(2 - 2 * dots, 0))
    found[~np.isfinite(found)] = np.inf
    found[:, :, 0, 1:] = found[:, :, 1:, 0] = np.inf
    return np.asarray(found)


def _consensus(
    distance: Floats, frames_a: Floats, frames_b: Floats, symmetry: Ints, frame_a: Ints, frame_b: Ints
) -> Floats:
    """How far each placement (P, H) puts b's other blobs on a's: the sum over a's blobs of how near the keys are of one
    that b has there, (P, H). -inf where the placement cannot be."""
    of = np.arange(len(frames_a))[:, None]
    from_a, from_b = frames_a[of, frame_a], frames_b[of, frame_b]  # (P, H, 3)
    scale = np.where(frame_a == 0, frames_a[:, :1, :2].min(axis=2), from_a[..., 2])
    scale = scale / np.where(frame_b == 0, frames_b[:, :1, :2].min(axis=2), from_b[..., 2])
    way_b = frames_b[:, None, 1:, :2] - from_b[:, :, None, :2]  # (P, H, B, 2)
    way_b = scale[..., None, None] * np.einsum("phij,phbj->phbi", MATRICES[symmetry], way_b)
    way_a = frames_a[:, None, 1:, :2] - from_a[:, :, None, :2]
    apart = np.linalg.norm(way_a[:, :, :, None] - way_b[:, :, None], axis=-1)  # (P, H, B of a, B of b)
    least = _PLACE_LEAST * 2 * frames_a[:, 0, :2].min(axis=1)
    reach = least[:, None, None] + _PLACE_SLACK * np.linalg.norm(way_a, axis=-1)
    sizes = np.log(frames_a[:, None, 1:, None, 2]) - np.log(scale[..., None, None] * frames_b[:, None, None, 1:, 2])
    with np.errstate(invalid="ignore"):
        fits = (apart < reach[..., None]) & (np.abs(sizes) < _SCALE_SLACK)
    worth = np.maximum(_REACH - distance[of, symmetry][:, :, 1:, 1:], 0)
    counted = np.where(fits, worth, 0.0).max(axis=3)  # (P, H, B of a)
    counted[np.arange(BLOBS) == frame_a[..., None] - 1] = 0.0  # its own blob says nothing new
    found = counted.sum(axis=2)
    found[(np.abs(np.log(scale)) > np.log(_MOST_SCALE)) | ~np.isfinite(scale)] = -np.inf
    return np.asarray(found)
