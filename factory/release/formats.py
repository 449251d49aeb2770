"""The released files: accepted samples as Parquet shards that Hugging Face `datasets` reads as they are.

    OUT/data/train-00000-of-00002.parquet    image and mask as {bytes, path}, diagnosis as ClassLabel
    OUT/_MANIFEST.json                       written last: bytes and sha256 of every file, and what they were made from

A release is written beside its place and moved there in one step, so a folder without a manifest is never a release.
Every PNG in it carries the mark of `factory.release.marking`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from factory import records, taxonomy
from factory.images import ImageProblem
from factory.recipe import GateSection, ReleaseSection
from factory.release import licences, marking
from factory.release.provenance import as_store, parents_of
from factory.run import Run
from factory.storage import Store
from factory.tables import Table

MANIFEST = "_MANIFEST.json"
ROW_GROUP_BYTES = 32 * 2**20
_FOOTER_BYTES = 32_768  # more than the schema and its metadata need, and per row group what its statistics need
_GROUP_FOOTER_BYTES = 8_192

_CARRIED = (
    "skin_type", "prompt", "mask_source", "iou", *records.SCORES, "generator", "seed", "guidance",
    "num_inference_steps", "calls_run", "width", "height", "weights_digest", "gate_digest", "parents",
)  # fmt: skip


@dataclass(frozen=True)
class Shards:
    """The data files of a release, relative to it, with their rows and bytes; `left_out` by the re-applied policy."""

    files: dict[str, tuple[int, int]]
    diagnoses: dict[str, int]
    left_out: int = 0

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.files.values())

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files.values())


def release_schema() -> pa.Schema:
    """The columns of a shard, with the `huggingface` metadata that makes them Image, Image and ClassLabel.

    The label's names are the whole taxonomy, so that the same number means the same diagnosis in every release.
    """
    carried = [records.SAMPLES.field(name) for name in _CARRIED]
    fields = [
        pa.field("sample_id", pa.string()), pa.field("image", records.IMAGE), pa.field("mask", records.IMAGE),
        pa.field("diagnosis", pa.int64()), pa.field("malignant", pa.bool_()), *carried,
        pa.field("licence", pa.string()), pa.field("synthetic", pa.bool_()),
    ]  # fmt: skip
    schema = pa.schema(fields)
    known = json.loads(records.SAMPLES.metadata[b"huggingface"])["info"]["features"]
    own = {
        "diagnosis": {"names": list(taxonomy.DIAGNOSES), "_type": "ClassLabel"},
        "malignant": {"dtype": "bool", "_type": "Value"},
        "licence": {"dtype": "string", "_type": "Value"},
        "synthetic": {"dtype": "bool", "_type": "Value"},
    }
    features = {name: own.get(name) or known[name] for name in schema.names}
    return schema.with_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def write_parquet(
    run: Run | Store | str | Path,
    out: Path,
    section: ReleaseSection,
    *,
    verdict: licences.Verdict | None = None,
    gate: GateSection | None = None,
) -> Shards:
    """Write the accepted samples of a run to `out` as sealed Parquet shards of at most `section.shard_bytes`.

    verdict: the licence join, computed from the run where it is not given; it is stored with every row, and a verdict
        that `section.allow` does not permit is a ValueError before anything is written.
    gate: where given, this policy is applied again to the stored scores and may only leave samples out.
    A folder that already is this very release is left as it is. Raises ValueError for an `out` that holds something
    else, and where nothing was accepted.
    """
    store = as_store(run)
    verdict = verdict or licences.join(parents_of(store))
    licences.require(verdict, section.allow)
    facts = made_from(store, section, verdict, gate)
    done = released(Path(out), facts)
    if done is not None:
        return done
    with staged(out) as directory:
        shards = write_shards(store, directory, section, licence=verdict.licence, gate=gate)
        seal(directory, facts, shards)
    return shards


def made_from(
    store: Store, section: ReleaseSection, verdict: licences.Verdict, gate: GateSection | None
) -> dict[str, Any]:
    """What decides a release's content, for its manifest."""
    return {
        "samples": Table(store, "samples").digest(),
        "release": section.model_dump(),
        "licence": verdict.licence,
        "gate": None if gate is None else gate.model_dump(),
    }


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write a release into; it takes out's place when the block ends without an error."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(
            f"out must be a new or empty directory, got {out}, which holds files; choose another or remove it first."
        )
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # ours by name: what a killed release left
    staging.mkdir(parents=True)
    try:
        yield staging
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_shards(
    store: Store, directory: Path, section: ReleaseSection, *, licence: str, gate: GateSection | None = None
) -> Shards:
    """The data files alone, unsealed, under `directory`/data."""
    writer = _ShardWriter(directory / "data", section.shard_bytes)
    diagnoses: dict[str, int] = {}
    left_out = 0
    with writer:
        for batch in Table(store, "samples").batches():
            for row in batch.to_pylist():
                if row["outcome"] != records.ACCEPTED:
                    continue
                if gate is not None and not _passes(row, gate):
                    left_out += 1
                    continue
                writer.add(_released(row, licence))
                diagnoses[row["diagnosis"]] = diagnoses.get(row["diagnosis"], 0) + 1
    files = writer.finish()
    if not files:
        raise ValueError(
            f"samples must hold an accepted sample to release, got none ({left_out} left out by the policy); "
            "synthesize more, or look at the report for why they were rejected."
        )
    return Shards(files, dict(sorted(diagnoses.items())), left_out)


def _passes(row: Mapping[str, Any], gate: GateSection) -> bool:
    from factory.quality.policy import decide

    scores = {"iou": row["iou"]} | {name: row[name] for name in records.SCORES}
    return decide(scores, gate)[0] == records.ACCEPTED


def _released(row: Mapping[str, Any], licence: str) -> dict[str, Any]:
    """A row of a shard from an accepted sample: marked pictures, the label, and what is carried over."""
    packet = marking.xmp_packet(
        {
            "generator": row["generator"],
            "seed": row["seed"],
            "row_id": row["sample_id"],
            "weights": row["weights_digest"],
        }
    )
    return {
        "sample_id": row["sample_id"],
        "image": _marked(row, "image", packet),
        "mask": _marked(row, "mask", packet),
        "diagnosis": taxonomy.DIAGNOSES.index(taxonomy.check(row["diagnosis"], taxonomy.DIAGNOSES, "diagnosis")),
        "malignant": taxonomy.is_malignant(row["diagnosis"]),
        **{name: row[name] for name in _CARRIED},
        "licence": licence,
        "synthetic": True,
    }


def _marked(row: Mapping[str, Any], column: str, packet: str) -> dict[str, Any] | None:
    data = (row[column] or {}).get("bytes")
    if data is None:
        if column == "mask":
            return None
        raise ImageProblem(
            "empty_file",
            f"accepted sample {row['sample_id']} must hold an image, got none; run `factory verify` on the run.",
        )
    return {"bytes": marking.mark(data, packet), "path": f"synthetic-{row['sample_id']}-{column}.png"}


class _ShardWriter:
    """Rows into numbered Parquet files below a size, named `train-00003-of-00012.parquet` once the count is known."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory, self._limit = directory, shard_bytes
        self._schema = release_schema()
        self._group_bytes = min(ROW_GROUP_BYTES, max(1, (shard_bytes - _FOOTER_BYTES) // 2))
        self._rows: list[dict[str, Any]] = []
        self._pending = 0
        self._counts: list[int] = []
        self._groups = 0
        self._sink: pa.OSFile | None = None
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        if not any(error):
            self._flush()
        self._close()

    def add(self, row: dict[str, Any]) -> None:
        size = _size(row)
        if self._rows and self._pending + size > self._group_bytes:
            self._flush()
        self._rows.append(row)
        self._pending += size

    def finish(self) -> dict[str, tuple[int, int]]:
        """Give the files their names; path relative to the release -> (rows, bytes)."""
        files = {}
        for number, rows in enumerate(self._counts):
            name = f"train-{number:05d}-of-{len(self._counts):05d}.parquet"
            (self._directory / f"{number}.parquet").rename(self._directory / name)
            files[f"data/{name}"] = (rows, (self._directory / name).stat().st_size)
        return files

    def _flush(self) -> None:
        """One row group, in a new file where this one would grow beyond the limit."""
        if not self._rows:
            return
        footers = _FOOTER_BYTES + (self._groups + 1) * _GROUP_FOOTER_BYTES
        if self._sink is not None and self._sink.tell() + self._pending + footers > self._limit:
            self._close()
        if self._writer is None:
            self._open()
        assert self._writer is not None
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), row_group_size=len(self._rows))
        self._groups += 1
        self._counts[-1] += len(self._rows)
        self._rows, self._pending = [], 0

    def _open(self) -> None:
        scalars = [field.name for field in self._schema if not pa.types.is_nested(field.type)]
        self._sink = pa.OSFile(str(self._directory / f"{len(self._counts)}.parquet"), "wb")
        # PNG bytes do not compress again, and statistics of pictures would only fill the footer.
        self._writer = pq.ParquetWriter(
            self._sink, self._schema, compression="zstd", use_dictionary=[n for n in scalars if n != "sample_id"],
            write_statistics=[n for n in scalars if n != "prompt"], store_schema=True,
        )  # fmt: skip
        self._counts.append(0)
        self._groups = 0

    def _close(self) -> None:
        if self._writer is not None and self._sink is not None:
            self._writer.close()
            self._sink.close()
        self._writer = self._sink = None


def _size(row: Mapping[str, Any]) -> int:
    """Bytes that a row takes at most, near enough: its pictures and texts, and 8 bytes for each number."""
    pictures = sum(len(row[name]["bytes"]) + len(row[name]["path"]) for name in ("image", "mask") if row[name])
    texts = sum(len(value.encode()) for value in row.values() if isinstance(value, str))
    return pictures + texts + sum(len(parent) for parent in row["parents"] or []) + 8 * len(row)


def released(out: Path, facts: Mapping[str, Any]) -> Shards | None:
    """The shards of a sealed release in `out` that was made from these facts and is whole, else None."""
    if not (out / MANIFEST).exists():
        return None
    manifest = json.loads((out / MANIFEST).read_text())
    if manifest["made_from"] != json.loads(json.dumps(facts)) or verify(out):
        return None
    files = {name: (f["rows"], f["bytes"]) for name, f in manifest["files"].items() if "rows" in f}
    return Shards(files, manifest["diagnoses"], manifest["left_out"])


def seal(directory: Path, facts: Mapping[str, Any], shards: Shards) -> dict[str, Any]:
    """Write the manifest, last: every file of the release with bytes and sha256, and what it was made from."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
    }
    for name, (rows, _) in shards.files.items():
        files[name]["rows"] = rows
    manifest = {
        "rows": shards.rows, "diagnoses": shards.diagnoses, "left_out": shards.left_out, "synthetic": True,
        "made_from": dict(facts), "files": files,
    }  # fmt: skip
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def verify(out: Path) -> list[str]:
    """What is wrong with a release, a sentence each: files removed, added or changed since it was sealed."""
    out = Path(out)
    if not (out / MANIFEST).exists():
        return [f"{out} has no {MANIFEST}, so it is not a sealed release; write it again."]
    listed = json.loads((out / MANIFEST).read_text())["files"]
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {MANIFEST}
    problems = [f"{name} is listed and missing." for name in sorted(set(listed) - there)]
    problems += [f"{name} is there and not listed." for name in sorted(there - set(listed))]
    for name in sorted(there & set(listed)):
        if _sha256(out / name) != listed[name]["sha256"]:
            problems.append(f"{name} has changed since it was sealed.")
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
