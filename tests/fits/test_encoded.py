"""Encoded images: by content, once, in the order they were asked for, with every loss counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from factory import images
from factory.fits.encoded import Arrays, EncodedCache, encode, keys_of
from factory.storage import LocalStore


class Halve:
    """Every image's colours at half the size, half of those of 16 px and more; darker ones than 10 are lost."""

    digest = "halve-one-and-more-letters"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, encoded: Sequence[bytes], masks: Sequence[bytes | None]) -> list[Arrays | str]:
        self.seen += len(encoded)
        return [self._one(images.read_png(data), mask) for data, mask in zip(encoded, masks, strict=True)]

    def _one(self, rgb: np.ndarray, mask: bytes | None) -> Arrays | str:
        if rgb.mean() < 10:
            return "too_dark"
        found: Arrays = {"small": rgb[::2, ::2].astype(np.float16).transpose(2, 0, 1)}  # not as it lies in memory
        return found if mask is None else found | {"mask": images.read_mask(mask)}


def drawn(values: Sequence[int], side: int = 8) -> list[bytes]:
    return [images.encode_png(np.full((side, side, 3), value, np.uint8)) for value in values]


def test_rows_come_in_the_order_of_their_images_bucket_after_bucket() -> None:
    given = [*drawn([200, 5, 100]), *drawn([50], side=16), *drawn([150])]
    rows = encode(Halve(), given)
    assert len(rows) == 4 and rows.dropped == Counter(too_dark=1)
    sides = {int(place): rows.batch(np.array([row]))["small"] for row, place in enumerate(rows.index)}
    assert {place: (float(small.mean()), small.shape[2]) for place, small in sides.items()} == {
        0: (200.0, 4), 2: (100.0, 4), 3: (50.0, 8), 4: (150.0, 4),
    }  # fmt: skip
    small = [list(part) for part in np.split(rows.index, rows.starts[1:-1])]
    assert all(part == sorted(part) for part in small)


def test_what_is_known_is_not_encoded_again_and_files_hold_what_memory_held(tmp_path: Path) -> None:
    given = drawn([200, 5, 100, 150])
    outlines: list[bytes | None] = [images.encode_mask(np.eye(8, dtype=bool) * bool(k)) for k in range(4)]
    cache, encoder = EncodedCache(LocalStore(tmp_path / "store"), Halve.digest), Halve()
    assert cache.fill(encoder, given[2:], outlines[2:]) == 2
    assert cache.fill(encoder, given, outlines) == 2  # the other two
    assert cache.fill(encoder, given, outlines) == 0 and encoder.seen == 4
    twice = [*given, given[0]], [*outlines, outlines[0]]
    kept, memory = cache.rows(keys_of(*twice), tmp_path / "node"), encode(Halve(), *twice)
    assert kept.index.tolist() == memory.index.tolist() == [0, 2, 3, 4] and kept.dropped == memory.dropped
    order = np.array([3, 0, 1])
    for name, values in kept.batch(order).items():
        assert np.array_equal(values, memory.batch(order)[name]) and str(values.dtype) == "torch.float32"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "node").rglob("*") if path.is_file()}
    cache.rows(keys_of(*twice), tmp_path / "node")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "node").rglob("*") if path.is_file()} == before


def test_another_mask_is_another_entry_and_another_encoder_another_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    cache = EncodedCache(store, Halve.digest)
    one, other = (images.encode_mask(np.full((8, 8), value)) for value in (True, False))
    assert cache.fill(Halve(), drawn([99]), [one]) == cache.fill(Halve(), drawn([99]), [other]) == 1
    assert EncodedCache(store, "another encoder altogether").known() == set()


def test_an_image_without_an_entry_is_refused(tmp_path: Path) -> None:
    cache = EncodedCache(LocalStore(tmp_path / "store"), Halve.digest)
    cache.fill(Halve(), drawn([99]), [None])
    with pytest.raises(ValueError, match="must find its images encoded in .*, got 1 without an entry; fit again"):
        cache.rows(keys_of(drawn([99, 98]), [None, None]), tmp_path / "node")
    assert not (tmp_path / "node").exists()
