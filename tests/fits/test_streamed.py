"""Streamed images: every row once a pass, an order that is a function of seed and step, bounded parts in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from factory import images, records
from factory.fits.objective import batch_rows, evenly
from factory.fits.streamed import Shard, StreamedImages, images_of, shards_of
from factory.run import Run

SIDE = 8


def _image(value: int) -> bytes:
    return images.encode_png(np.full((SIDE, SIDE, 3), value, np.uint8))


class Parts:
    """Shards of images that hold their own row number, and what was read of them."""

    def __init__(self, *counts: int) -> None:
        starts = np.cumsum([0, *counts])
        self.read: list[int] = []
        self._lock = threading.Lock()
        self.shards = [
            Shard(self._reading(number, list(range(starts[number], starts[number + 1]))), count)
            for number, count in enumerate(counts)
        ]

    def _reading(self, number: int, rows: list[int]) -> Callable[[], list[bytes]]:
        def read() -> list[bytes]:
            with self._lock:
                self.read.append(number)
            return [_image(row) for row in rows]

        return read


def _seen(examples: StreamedImages, steps: range, batch_size: int, seed: int = 5) -> list[int]:
    found = []
    for step in steps:
        rows = batch_rows(examples, seed, step, batch_size)
        batch = examples.batch(rows)["image"]
        assert batch.shape == (batch_size, 3, SIDE, SIDE)
        assert [int(one[0, 0, 0]) for one in batch] == rows.tolist()  # a row is the image that lies there
        found += rows.tolist()
    return found


@pytest.mark.parametrize("keep", [0, 1 << 20])
def test_a_pass_holds_every_row_once_and_passes_differ(keep: int) -> None:
    examples = StreamedImages(Parts(7, 3, 5, 9).shards, SIDE, shuffle_rows=8, keep_bytes=keep)
    rows = _seen(examples, range(8), 6)  # 48 rows: two passes of 24
    assert sorted(rows[:24]) == sorted(rows[24:]) == list(range(24))
    assert rows[:24] != rows[24:] and rows[:24] != list(range(24))


def test_a_fit_that_begins_at_a_step_sees_what_one_that_came_there_sees() -> None:
    whole = StreamedImages(Parts(7, 3, 5, 9).shards, SIDE, shuffle_rows=8, keep_bytes=0)
    later = StreamedImages(Parts(7, 3, 5, 9).shards, SIDE, shuffle_rows=8, keep_bytes=0)
    assert _seen(whole, range(10), 5)[25:] == _seen(later, range(5, 10), 5)


def test_what_is_kept_decoded_changes_no_row() -> None:
    kept, streamed = (StreamedImages(Parts(6, 6, 6).shards, SIDE, shuffle_rows=6, keep_bytes=k) for k in (1 << 20, 0))
    assert _seen(kept, range(9), 4) == _seen(streamed, range(9), 4)


def test_rows_are_shuffled_across_the_parts_of_a_window() -> None:
    examples = StreamedImages(Parts(*[4] * 12).shards, SIDE, shuffle_rows=16, keep_bytes=0)
    rows = np.array(_seen(examples, range(3), 16))
    parts_of_windows = [set(window // 4) for window in rows.reshape(3, 16)]
    assert [len(parts) for parts in parts_of_windows] == [4, 4, 4]  # each window is of four parts, whole
    assert any((np.diff(window // 4) != 0).sum() > 6 for window in rows.reshape(3, 16))  # and they are mixed
    assert parts_of_windows[0] != {0, 1, 2, 3}  # the parts' own order is shuffled too


def test_only_two_windows_are_held_and_no_part_is_read_twice_in_a_pass() -> None:
    parts = Parts(*[5] * 20)
    examples = StreamedImages(parts.shards, SIDE, shuffle_rows=10, keep_bytes=0)
    for step in range(9):  # 90 of the 100 rows: the next pass is not looked at
        examples.batch(batch_rows(examples, 1, step, 10))
        assert len(examples._parts) <= 4
    assert len(parts.read) == len(set(parts.read)) == 20


def test_kept_rows_are_decoded_once_and_their_parts_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(5, 5)
    examples = StreamedImages(parts.shards, SIDE, shuffle_rows=5, keep_bytes=1 << 20)
    decoded: list[int] = []
    plain = images.read_png
    monkeypatch.setattr(images, "read_png", lambda data: (decoded.append(1), plain(data))[1])
    _seen(examples, range(6), 5)
    assert sorted(parts.read) == [0, 1] and len(decoded) == 10
    assert not examples._parts


def test_a_few_rows_are_chosen_evenly_and_only_their_parts_read() -> None:
    parts = Parts(*[10] * 10)
    rows = evenly(100, 4)
    assert rows.tolist() == [0, 33, 66, 99]
    assert [int(images.read_png(one)[0, 0, 0]) for one in images_of(parts.shards, rows)] == [0, 33, 66, 99]
    assert parts.read == [0, 3, 6, 9]
    assert evenly(7, 1000).tolist() == list(range(7)) and evenly(0, 3).tolist() == []


def test_shards_are_the_parts_rows_that_are_kept_and_have_an_image(tmp_path: Path) -> None:
    table, rows = Run(tmp_path / "run").table("corpus"), list[dict[str, Any]]()
    for index in range(9):
        image = None if index == 4 else records.image_struct(_image(index), f"{index}.png")
        lost = {"outcome": "rejected", "reason": "truncated"} if index == 5 else {"outcome": "accepted"}
        rows.append({"row_id": f"r{index}", "record_id": f"c{index}", "diagnosis": "nevus", "image": image,
                     "split": "test" if index in (0, 1, 2, 7) else "train"} | lost)  # fmt: skip
    for part in range(3):
        table.commit(part, records.rows_to_table("corpus", rows[3 * part : 3 * part + 3]))
    table.seal(3, {"of": "test"}, {})
    kept = (pc.field("split") == "train") & (pc.field("outcome") == "accepted")
    shards, light = shards_of(table, kept, ["split", "outcome", "record_id"])
    assert light["record_id"].to_pylist() == ["c3", "c6", "c8"]
    assert [shard.count for shard in shards] == [1, 2]
    assert [int(images.read_png(one)[0, 0, 0]) for shard in shards for one in shard.read()] == [3, 6, 8]
    assert isinstance(light, pa.Table) and light.column_names == ["split", "outcome", "record_id"]
