"""Training images read from table parts while a fit runs, in an order that is a function of the seed and the step.

    pass      every row once: the parts in a shuffled order, cut into windows of at least `shuffle_rows` rows (the last
              has what is left), the rows of a window shuffled
    memory    the encoded images of the window at hand and the next one; decoded rows are kept if all of them fit

So a corpus of any size trains on any machine, a fit that stops goes on with the row it would have seen next, and
another number of workers sees the same batches. Ray Data's own iterator gives no such order. Each worker reads each
part and decodes its own rows of it.

B rows  S side in pixels
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from factory import images
from factory.fits.examples import image_bytes
from factory.tables import Table

READERS = 2  # parts read at once
ROW, SEEN = "_row", "_seen"  # columns of their own beside a part's light ones

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """Images that are read together. read: their encoded bytes, in order; count: how many."""

    read: Callable[[], list[bytes]]
    count: int


def shards_of(table: Table, kept: pc.Expression, columns: Sequence[str]) -> tuple[list[Shard], pa.Table]:
    """The rows of a sealed table that have an image and are `kept`, a shard for each part that holds some, and those
    of their light `columns`, which `kept` may ask about. No image is read."""
    shards, light, read = [], [], table.reader(["image"])
    for part, (rows, seen) in enumerate(zip(table.batches(list(columns)), table.with_image(), strict=True)):
        numbered = rows.append_column(ROW, pa.array(np.arange(len(rows)))).append_column(SEEN, seen)
        here = numbered.filter(kept & pc.field(SEEN))
        if len(here):
            shards.append(Shard(_reading(read, part, here[ROW]), len(here)))
        light.append(here.select(list(columns)))
    return shards, pa.concat_tables(light)


def _reading(read: Callable[[int], pa.Table], part: int, places: pa.ChunkedArray) -> Callable[[], list[bytes]]:
    return lambda: image_bytes(read(part).take(places))


def images_of(shards: Sequence[Shard], rows: Rows) -> list[bytes]:
    """The encoded images of rows in ascending order; one shard is held at a time."""
    starts = np.cumsum([0, *(shard.count for shard in shards)])
    encoded: list[bytes] = []
    for shard, start, stop in zip(shards, starts[:-1], starts[1:], strict=True):
        own = rows[(rows >= start) & (rows < stop)] - start
        if len(own):
            held = shard.read()
            encoded += [held[row] for row in own]
    return encoded


class StreamedImages:
    """Rows of shards as `image` (B, 3, S, S) uint8, squeezed to squares; rows are numbered shard by shard.

    shuffle_rows: at least so many rows are shuffled among each other. keep_bytes: if all rows fit in so many bytes,
    3 S^2 each, they are kept decoded, and a part of which a worker has met every row is not read again: one worker
    reads each part once, several for as many passes as it takes until each has met all.
    """

    def __init__(
        self, shards: Sequence[Shard], image_size: int, *, shuffle_rows: int = 8192, keep_bytes: int = 4 << 30
    ) -> None:
        self.shards, self.image_size, self.shuffle_rows = list(shards), image_size, shuffle_rows
        self.counts = np.array([shard.count for shard in self.shards], np.int64)
        self.starts = np.cumsum([0, *self.counts])  # the first row of each shard
        shape = (len(self), image_size, image_size, 3)
        # Empty memory is not committed until a row is written.
        self._kept = np.empty(shape, np.uint8) if np.prod(shape, dtype=np.int64) <= keep_bytes else None
        self._known = np.zeros(len(self), bool)
        self._reader = ThreadPoolExecutor(READERS, thread_name_prefix="parts")
        self._decoder = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="rows")  # decoding holds no lock
        self._parts: dict[int, Future[list[bytes]]] = {}
        self._order = lru_cache(maxsize=3)(self._order_of)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows_of_step(self, seed: int, step: int, batch_size: int) -> Rows:
        """Indices of the global batch of a step; the parts that it and the next window need begin to be read."""
        positions = range(step * batch_size, (step + 1) * batch_size)
        places = [divmod(position, len(self)) for position in positions]
        self._read_ahead(seed, *places[0], *places[-1])
        return np.array([self._order(seed, number)[0][place] for number, place in places])

    def batch(self, indices: Rows) -> dict[str, Tensor]:
        """The rows at these indices."""
        for shard in np.unique(np.searchsorted(self.starts, indices[~self._known[indices]], side="right") - 1):
            self._part(int(shard))
        pixels = np.stack(list(self._decoder.map(self._pixels, indices.tolist())))
        return {"image": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()}  # (B, 3, S, S)

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        if self._kept is not None and self._known[row]:
            return self._kept[row]
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        encoded = self._part(shard).result()[row - self.starts[shard]]
        found = images.resized(images.read_png(encoded), self.image_size, self.image_size)
        if self._kept is not None:
            self._kept[row], self._known[row] = found, True
        return found

    def _part(self, shard: int) -> Future[list[bytes]]:
        if shard not in self._parts:
            self._parts[shard] = self._reader.submit(self.shards[shard].read)
        return self._parts[shard]

    def _read_ahead(self, seed: int, first_pass: int, first: int, last_pass: int, last: int) -> None:
        """Holds the parts of the windows from one place of one pass to another, and of the window after, and no
        others; what is kept decoded needs none."""
        needed: list[int] = []
        for number in range(first_pass, last_pass + 1):
            windows = self._order(seed, number)[1]
            start = first if number == first_pass else 0
            stop = last if number == last_pass else len(self)
            needed += [s for w in windows if w.stop > start and w.start <= stop for s in w.shards]
        needed += self._window_after(seed, last_pass, last).shards
        wanted = [s for s in dict.fromkeys(needed) if not self._known[self.starts[s] : self.starts[s + 1]].all()]
        self._parts = {shard: self._part(shard) for shard in wanted}

    def _window_after(self, seed: int, number: int, place: int) -> _Window:
        later = [window for window in self._order(seed, number)[1] if window.start > place]
        return later[0] if later else self._order(seed, number + 1)[1][0]

    def _order_of(self, seed: int, number: int) -> tuple[Rows, list[_Window]]:
        return _pass(self.counts, self.starts, self.shuffle_rows, (seed, number))


@dataclass(frozen=True)
class _Window:
    """Places of a pass, from `start` up to `stop`, whose rows are of these shards."""

    start: int
    stop: int
    shards: list[int]


def _pass(counts: Rows, starts: Rows, shuffle_rows: int, seed: tuple[int, int]) -> tuple[Rows, list[_Window]]:
    """The rows of a pass in their order, (N,), and its windows."""
    rng = np.random.default_rng(seed)
    rows, windows, shards, place = [], [], list[int](), 0
    order = rng.permutation(len(counts))
    for turn, shard in enumerate(order):
        shards.append(int(shard))
        held = int(counts[shards].sum())
        if held >= shuffle_rows or turn + 1 == len(order):
            own = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
            rows.append(rng.permutation(own))
            windows.append(_Window(place, place + held, shards))
            place, shards = place + held, []
    return np.concatenate(rows), windows
