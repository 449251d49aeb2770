"""Text embeddings, each computed once: by the caption's digest and the encoder's.

    cache = TextEmbeddings(store, "cache/text", denoiser.condition, digest)
    conditions, index = cache.of(prompts)          # (U, L, D); that of prompts[n] is conditions[index[n]]

A cache is files of Parquet in a store, named by what they hold and put in place whole, so that any number of workers
may fill one: two that embed the same prompts write the same file. Another encoder, length or dtype has another digest
and never meets these. Embeddings are stored as the encoder returns them, in float32, so a fit that reads them sees the
values it would have computed.

What is larger than MAX_BYTES (half a million captions of CLIP are 157 GB) is not held in memory: it is a file of this
machine, in the encoder's own dtype, written once, put in place whole, and mapped by all its processes.

Letters: N prompts, U different ones, L tokens, D token width.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import io
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from factory import records
from factory.storage import Store

PART_PROMPTS = 512
READ_ROWS = 64  # embeddings that are read at once
MAX_BYTES = 2**31  # of embeddings in float32, above which they are a mapped file
ROWS_FILE, LAYOUT = "rows.bin", "layout.json"
_SCHEMA = pa.schema([("caption_digest", pa.string()), ("shape", pa.list_(pa.int32())), ("embedding", pa.binary())])


class TextEmbeddings:
    """The embeddings of one text encoder below `folder` of a store.

    store: None keeps nothing; embed: prompts -> (N, L, D); encoder_digest: of all that decides what it returns; dtype:
    what the encoder computes in, which a mapped file is stored in; scratch: where this machine's files are, by default
    a folder of temporary files.
    """

    def __init__(
        self,
        store: Store | None,
        folder: str,
        embed: Callable[[list[str]], Tensor],
        encoder_digest: str,
        dtype: torch.dtype = torch.float32,
        scratch: Path | None = None,
    ) -> None:
        self.store, self.folder, self.embed = store, f"{folder}/{encoder_digest[:16]}", embed
        self.dtype, self.encoder_digest = dtype, encoder_digest
        self.scratch = scratch or Path(tempfile.gettempdir()) / f"dermafactory-{getpass.getuser()}" / "text"
        self.computed = 0  # prompts that were embedded here, not found
        self._ahead: dict[str, Tensor] = {}  # what was embedded to learn the shape

    def of(self, prompts: Sequence[str]) -> tuple[Tensor, NDArray[np.int64]]:
        """Embeddings (U, L, D) of the U different prompts, and which of them is each prompt's, (N,). Of no prompts
        there are none, (0, 0, 0). They are float32, or where they are mapped from a file (not to be written to) the
        encoder's dtype, with the same values."""
        wanted = {caption_digest(prompt): prompt for prompt in sorted(set(prompts))}
        place = {prompt: number for number, prompt in enumerate(wanted.values())}
        index = np.asarray([place[prompt] for prompt in prompts], np.int64)
        if not wanted:
            return torch.empty(0, 0, 0), index
        kept = self.scratch / records.digest(self.encoder_digest, str(self.dtype), *wanted)
        if (kept / LAYOUT).is_file():
            return self._opened(kept), index
        shape = self._shape(wanted)
        if 4 * len(wanted) * shape[0] * shape[1] <= MAX_BYTES:
            rows = torch.empty(len(wanted), *shape)
            self._fill(rows, wanted)
            return rows, index
        return self._mapped(kept, wanted, shape), index

    def _shape(self, wanted: dict[str, str]) -> tuple[int, int]:
        """(L, D), by an embedding that is stored or else by that of the first part, which is then."""
        for path in self._files():
            with self._parquet(path) as parquet:
                first = next(parquet.iter_batches(1, columns=["shape"])).to_pylist()[0]
            return first["shape"][0], first["shape"][1]
        part = list(wanted)[:PART_PROMPTS]
        embedded = self._embedded(part, wanted)
        self._ahead = dict(zip(part, embedded, strict=True))
        return embedded.shape[1], embedded.shape[2]

    def _embedded(self, digests: Sequence[str], wanted: dict[str, str]) -> Tensor:
        """Embeds prompts, stores them and returns them in float32."""
        embedded = self.embed([wanted[digest] for digest in digests]).float().cpu()
        self._put(digests, embedded)
        self.computed += len(digests)
        return embedded

    def _fill(self, rows: Tensor, wanted: dict[str, str]) -> None:
        """Writes the embeddings of all that is wanted into rows (U, L, D), which lose nothing of them."""
        place = {digest: number for number, digest in enumerate(wanted)}
        missing = set(wanted)
        for digest, value in chain(self._ahead.items(), self._stored(set(wanted))):
            if digest in missing:
                missing.remove(digest)
                self._write(rows, place[digest], value)
        self._ahead = {}
        left = [digest for digest in wanted if digest in missing]
        for start in range(0, len(left), PART_PROMPTS):
            part = left[start : start + PART_PROMPTS]
            for digest, value in zip(part, self._embedded(part, wanted), strict=True):
                self._write(rows, place[digest], value)

    def _write(self, rows: Tensor, number: int, value: Tensor) -> None:
        rows[number] = value
        assert torch.equal(rows[number].float(), value) or not torch.isfinite(value).all(), "narrower than its encoder"

    def _stored(self, wanted: set[str]) -> Iterable[tuple[str, Tensor]]:
        """What the store has of these, a few rows of a file at a time."""
        for path in self._files():
            with self._parquet(path) as parquet:
                if wanted.isdisjoint(parquet.read(["caption_digest"])["caption_digest"].to_pylist()):
                    continue
                for batch in parquet.iter_batches(READ_ROWS):
                    for row in batch.to_pylist():
                        if row["caption_digest"] in wanted:
                            values = np.frombuffer(row["embedding"], np.float32).reshape(row["shape"])
                            yield row["caption_digest"], torch.from_numpy(values.copy())

    def _mapped(self, kept: Path, wanted: dict[str, str], shape: tuple[int, int]) -> Tensor:
        """The embeddings (U, L, D) as a file of this machine, made by the first process that wants it."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for it: a copy each might not fit on the disk
            if not (kept / LAYOUT).is_file():
                self._make(kept, wanted, shape)
        return self._opened(kept)

    def _make(self, kept: Path, wanted: dict[str, str], shape: tuple[int, int]) -> None:
        sides = (len(wanted), *shape)
        with tempfile.TemporaryDirectory(dir=self.scratch) as staged:
            new = Path(staged) / "new"
            new.mkdir()
            size = math.prod(sides) * self.dtype.itemsize
            values = torch.from_numpy(np.memmap(new / ROWS_FILE, np.uint8, "w+", shape=(size,)))
            self._fill(values.view(self.dtype).reshape(sides), wanted)
            (new / LAYOUT).write_text(json.dumps(sides))
            os.rename(new, kept)

    def _opened(self, kept: Path) -> Tensor:
        values = np.memmap(kept / ROWS_FILE, np.uint8, "r")
        with warnings.catch_warnings():  # torch has no tensors that cannot be written to
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(values).view(self.dtype).reshape(json.loads((kept / LAYOUT).read_text()))

    def _files(self) -> list[str]:
        if self.store is None:
            return []
        return sorted(path for path in self.store.list(self.folder) if path.endswith(".parquet"))

    @contextmanager
    def _parquet(self, path: str) -> Iterator[pq.ParquetFile]:
        assert self.store is not None
        with self.store.open(path) as file:
            yield pq.ParquetFile(file)

    def _put(self, digests: Sequence[str], embedded: Tensor) -> None:
        if self.store is None:
            return
        rows = [
            {"caption_digest": digest, "shape": list(values.shape), "embedding": values.numpy().tobytes()}
            for digest, values in zip(digests, embedded, strict=True)
        ]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), sink, compression="zstd")
        self.store.put_if_absent(f"{self.folder}/{records.digest(*digests)}.parquet", sink.getvalue())


def caption_digest(text: str) -> str:
    """SHA-256 of a caption's UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()
