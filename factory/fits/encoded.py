"""What a fit reads of its images, encoded once and kept by content.

    encoder = JointEncoder(weights, 128)              # a family's own: pixels to named arrays
    cache = EncodedCache(store, encoder.digest)
    cache.fill(encoder, images, masks)                # on any number of workers, or beforehand
    rows = cache.rows(keys_of(images, masks), folder) # random access from memory-mapped files

An entry's key is the digest of an image's and its mask's bytes; the folder it lies in is named by the encoder's digest,
which covers weights, transform and dtype. So another encoder never meets these, and a corpus that grows encodes what is
new. An image that cannot be used has an entry too, which says why. Files are put in place whole and never changed.

Letters: N images, B rows of a batch.
"""

from __future__ import annotations

import getpass
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import Tensor

from factory import records
from factory.storage import Store

FOLDER = "cache/latents"  # in a run's store
PART_IMAGES = 256
LAYOUT = "layout.json"
_SCHEMA = pa.schema([("key", pa.string()), ("shape", pa.string()), ("arrays", pa.binary()), ("reason", pa.string())])

Arrays = dict[str, NDArray[np.generic]]


class Encoder(Protocol):
    """A family's way from pixels to what its fit reads."""

    @property
    def digest(self) -> str:
        """Of all that decides the result: weights, size, transform, dtype."""
        ...

    def __call__(self, images: Sequence[bytes], masks: Sequence[bytes | None]) -> list[Arrays | str]:
        """Encoded images and masks (None: there is none) -> for each its arrays by name, or the reason it is lost."""
        ...


class EncodedRows:
    """Arrays of the images that could be encoded, in buckets of one shape.

    buckets: arrays by name, (N_b, ...) each; index: the position of each row among the images that were asked for,
    (N,), ascending within a bucket, bucket after bucket; dropped: how many images were left out, by reason.
    """

    def __init__(
        self, buckets: Sequence[Mapping[str, NDArray]], index: NDArray[np.int64], dropped: Counter[str]
    ) -> None:
        self.buckets, self.index, self.dropped = list(buckets), index, dropped
        self.starts = np.cumsum([0, *(len(next(iter(bucket.values()))) for bucket in self.buckets)])

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Rows of one bucket, (B, ...) by name; half precision comes as float32 and truth values as float32."""
        bucket = int(np.searchsorted(self.starts, indices[0], side="right")) - 1
        rows = indices - self.starts[bucket]
        return {name: _tensor(values[rows]) for name, values in self.buckets[bucket].items()}


def _tensor(values: NDArray) -> Tensor:
    narrow = values.dtype == bool or values.dtype == np.float16
    return torch.from_numpy(values.astype(np.float32) if narrow else np.ascontiguousarray(values))


def encode(encoder: Encoder, images: Sequence[bytes], masks: Sequence[bytes | None] | None = None) -> EncodedRows:
    """Encodes images here and keeps them in memory: for one process, a test, a benchmark."""
    found = list(_encoded(encoder, images, masks or [None] * len(images)))
    layout = _Layout([one if isinstance(one, str) else _shape(one) for one in found])
    buckets = layout.allocated(None)
    for place, one in enumerate(found):
        if not isinstance(one, str):
            layout.put(buckets, place, one)
    return EncodedRows(buckets, layout.index, layout.dropped)


class EncodedCache:
    """The entries of one encoder in a store."""

    def __init__(self, store: Store, encoder_digest: str) -> None:
        self.store, self.folder = store, f"{FOLDER}/{encoder_digest[:16]}"

    def known(self) -> set[str]:
        """The keys of all entries."""
        return {key for path in self._files() for key in self._read(path, ["key"])["key"].to_pylist()}

    def fill(self, encoder: Encoder, images: Sequence[bytes], masks: Sequence[bytes | None]) -> int:
        """Encodes what has no entry yet, and returns how many that were."""
        known = self.known()
        wanted = {key: place for place, key in enumerate(keys_of(images, masks)) if key not in known}
        missing = list(wanted.items())
        for start in range(0, len(missing), PART_IMAGES):
            part = missing[start : start + PART_IMAGES]
            places = [place for _, place in part]
            found = _encoded(encoder, [images[place] for place in places], [masks[place] for place in places])
            self._put([key for key, _ in part], list(found))
        return len(missing)

    def rows(self, keys: Sequence[str], folder: Path) -> EncodedRows:
        """The entries of these keys, as files under `folder` that all processes of a machine share; written once.

        Raises ValueError if a key has no entry.
        """
        kept = folder / records.digest(self.folder, *keys)
        if not (kept / LAYOUT).is_file():
            self._unpack(keys, kept)
        layout = _Layout(json.loads((kept / LAYOUT).read_text()))
        return EncodedRows(layout.opened(kept), layout.index, layout.dropped)

    def _unpack(self, keys: Sequence[str], kept: Path) -> None:
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        shapes = {
            row["key"]: row["reason"] or json.loads(row["shape"])
            for path in self._files()
            for row in self._read(path, ["key", "shape", "reason"]).to_pylist()
            if row["key"] in places
        }
        if len(shapes) < len(places):
            raise ValueError(
                f"a fit must find its images encoded in {self.store.uri}/{self.folder}, got "
                f"{len(places) - len(shapes)} without an entry; fit again, so that they are encoded first."
            )
        layout = _Layout([shapes[key] for key in keys])
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as staged:
            folder = Path(staged) / "new"
            buckets = layout.allocated(folder)
            for row in self._entries(set(places)):
                for place in places.pop(row["key"], ()):
                    layout.put(buckets, place, load_arrays(row["arrays"]))
            layout.save(folder)
            try:
                os.rename(folder, kept)
            except OSError:  # another process of this machine was first
                if not (kept / LAYOUT).is_file():
                    raise

    def _entries(self, wanted: set[str]) -> Iterator[dict[str, Any]]:
        """The entries with arrays among these keys, file by file."""
        for path in self._files():
            if not wanted.isdisjoint(self._read(path, ["key"])["key"].to_pylist()):
                yield from (r for r in self._read(path).to_pylist() if r["key"] in wanted and r["reason"] is None)

    def _files(self) -> list[str]:
        return sorted(path for path in self.store.list(self.folder) if path.endswith(".parquet"))

    def _read(self, path: str, columns: list[str] | None = None) -> pa.Table:
        with self.store.open(path) as file:
            return pq.ParquetFile(file).read(columns)

    def _put(self, keys: Sequence[str], found: Sequence[Arrays | str]) -> None:
        rows = [
            {"key": key, "shape": None, "arrays": None, "reason": one}
            if isinstance(one, str)
            else {"key": key, "shape": json.dumps(_shape(one)), "arrays": _saved(one), "reason": None}
            for key, one in zip(keys, found, strict=True)
        ]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), sink, compression="zstd")
        self.store.put_if_absent(f"{self.folder}/{records.digest(*keys)}.parquet", sink.getvalue())


@dataclass(frozen=True)
class CachedImages:
    """Images of a fit that were encoded before, by their keys and in the place of their bytes."""

    store: Store
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)


def taken(images: Sequence[bytes] | CachedImages, places: Sequence[int]) -> Sequence[bytes] | CachedImages:
    """Some of the images, in this order."""
    if isinstance(images, CachedImages):
        return CachedImages(images.store, tuple(images.keys[place] for place in places))
    return [images[place] for place in places]


def encoded_rows(
    encoder: Encoder, images: Sequence[bytes] | CachedImages, masks: Sequence[bytes | None] | None = None
) -> EncodedRows:
    """The rows of a fit: found where they were encoded before, or encoded here."""
    if not isinstance(images, CachedImages):
        return encode(encoder, images, masks)
    folder = Path(tempfile.gettempdir()) / f"dermafactory-{getpass.getuser()}" / "latents"
    return EncodedCache(images.store, encoder.digest).rows(images.keys, folder)


def _saved(arrays: Arrays) -> bytes:
    """As safetensors, which writes memory as it lies: a view of a batch in another order must be laid out first."""
    return save_arrays({name: np.ascontiguousarray(values) for name, values in arrays.items()})


def keys_of(images: Sequence[bytes], masks: Sequence[bytes | None]) -> list[str]:
    """The key of each image with its mask: SHA-256 over both."""
    return [
        hashlib.sha256(b"%d|" % len(image) + image + b"|" + (mask or b"")).hexdigest()
        for image, mask in zip(images, masks, strict=True)
    ]


def _encoded(encoder: Encoder, images: Sequence[bytes], masks: Sequence[bytes | None]) -> Iterator[Arrays | str]:
    step = 8  # images at once: a fixed small shape, which an encoder pads if it has to
    for start in range(0, len(images), step):
        yield from encoder(images[start : start + step], masks[start : start + step])


Shape = dict[str, list[Any]]  # by name: the dtype, then the sides


def _shape(arrays: Arrays) -> Shape:
    return {name: [str(values.dtype), *values.shape] for name, values in sorted(arrays.items())}


def _sides(shape: str) -> list[list[Any]]:
    """By what shapes are ordered: their sides, so that small images come first."""
    return [sides for _, *sides in json.loads(shape).values()]


class _Layout:
    """Where each image's arrays lie: images of one shape share a bucket, in the order they were asked for.

    found: for each image its arrays' shape, or the reason that it has none.
    """

    def __init__(self, found: Sequence[Shape | str]) -> None:
        self.found = found
        self.dropped = Counter(one for one in found if isinstance(one, str))
        names = [None if isinstance(one, str) else json.dumps(one) for one in found]
        self.shapes = sorted({name for name in names if name is not None}, key=_sides)
        rows = [[place for place, name in enumerate(names) if name == shape] for shape in self.shapes]
        self.sizes = [len(bucket) for bucket in rows]
        self.at = {place: (bucket, row) for bucket, own in enumerate(rows) for row, place in enumerate(own)}
        self.index = np.array([place for own in rows for place in own], np.int64)

    def allocated(self, folder: Path | None) -> list[dict[str, NDArray]]:
        """Empty arrays for every bucket: in memory, or in files of a new folder."""
        if folder is None:
            return self._arrays(lambda number, name, dtype, shape: np.empty(shape, dtype))
        folder.mkdir()
        return self._arrays(
            lambda number, name, dtype, shape: np.memmap(folder / f"{number}-{name}.bin", dtype, "w+", shape=shape)
        )

    def opened(self, folder: Path) -> list[dict[str, NDArray]]:
        """The arrays in a folder, mapped into memory; to write to them changes no file."""
        return self._arrays(
            lambda number, name, dtype, shape: np.memmap(folder / f"{number}-{name}.bin", dtype, "c", shape=shape)
        )

    def _arrays(self, make: Callable[[int, str, str, tuple[int, ...]], NDArray]) -> list[dict[str, NDArray]]:
        return [
            {name: make(number, name, dtype, (size, *sides)) for name, (dtype, *sides) in json.loads(shape).items()}
            for number, (shape, size) in enumerate(zip(self.shapes, self.sizes, strict=True))
        ]

    def put(self, buckets: list[dict[str, NDArray]], place: int, arrays: Arrays) -> None:
        bucket, row = self.at[place]
        for name, values in arrays.items():
            buckets[bucket][name][row] = values

    def save(self, folder: Path) -> None:
        (folder / LAYOUT).write_text(json.dumps(self.found))
