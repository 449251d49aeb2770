"""Text embeddings, each computed once: by the caption's digest and the encoder's.

    cache = TextEmbeddings(store, "cache/text", denoiser.condition, digest)
    conditions, index = cache.of(prompts)          # (U, L, D); that of prompts[n] is conditions[index[n]]

A cache is files of Parquet in a store, named by what they hold and put in place whole, so that any number of workers
may fill one: two that embed the same prompts write the same file. Another encoder, length or dtype has another digest
and never meets these. Embeddings are stored as the encoder returns them, in float32, so a fit that reads them sees the
values it would have computed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from factory import records
from factory.storage import Store

PART_PROMPTS = 512
_SCHEMA = pa.schema([("caption_digest", pa.string()), ("shape", pa.list_(pa.int32())), ("embedding", pa.binary())])


class TextEmbeddings:
    """The embeddings of one text encoder below `folder` of a store.

    store: None keeps nothing; embed: prompts -> (N, L, D); encoder_digest: of all that decides what it returns.
    """

    def __init__(
        self, store: Store | None, folder: str, embed: Callable[[list[str]], Tensor], encoder_digest: str
    ) -> None:
        self.store, self.folder, self.embed = store, f"{folder}/{encoder_digest[:16]}", embed
        self.computed = 0  # prompts that were embedded here, not found

    def of(self, prompts: Sequence[str]) -> tuple[Tensor, NDArray[np.int64]]:
        """Embeddings (U, L, D) float32 of the U different prompts, and which of them is each prompt's, (N,). Of no
        prompts there are none, (0, 0, 0)."""
        wanted = {caption_digest(prompt): prompt for prompt in sorted(set(prompts))}
        found = self._stored(set(wanted))
        missing = [digest for digest in wanted if digest not in found]
        for start in range(0, len(missing), PART_PROMPTS):
            part = missing[start : start + PART_PROMPTS]
            embedded = self.embed([wanted[digest] for digest in part]).float().cpu()
            self._put(part, embedded)
            self.computed += len(part)
            found.update(zip(part, embedded, strict=True))
        place = {prompt: number for number, prompt in enumerate(wanted.values())}
        index = np.asarray([place[prompt] for prompt in prompts], np.int64)
        return torch.stack([found[digest] for digest in wanted]) if wanted else torch.empty(0, 0, 0), index

    def _stored(self, wanted: set[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.store is None:
            return found
        for path in self.store.list(self.folder):
            if not path.endswith(".parquet"):
                continue
            with self.store.open(path) as file:
                parquet = pq.ParquetFile(file)
                held = parquet.read(["caption_digest"])["caption_digest"].to_pylist()
                if wanted.isdisjoint(held):
                    continue
                for row in parquet.read().to_pylist():
                    if row["caption_digest"] in wanted:
                        values = np.frombuffer(row["embedding"], np.float32).reshape(row["shape"])
                        found[row["caption_digest"]] = torch.from_numpy(values.copy())
        return found

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
