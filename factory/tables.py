"""Tables: folders of Parquet parts with a manifest written last. The part is the commit, the manifest the seal.

    RUN/samples/part-000042.parquet   every planned sample of unit 42, put in place by the first writer to finish
    RUN/samples/_MANIFEST.json        written last; readers open what it lists and nothing else
    RUN/.parts/samples/42.json        rows, bytes, sha256 and outcomes of part 42; spares reading it, can be rebuilt
    RUN/.parts/samples/_FINGERPRINT.json   what the table depends on, written before its first part
    RUN/.parts/samples/_MANIFEST-0.json    the manifest of the first round, once a further one has replaced it

The manifest is the only file beside the parts: `datasets.load_dataset(RUN/samples)` goes by the commonest suffix.

A driver calls `require(fingerprint)`, then `missing(num_parts)`; workers call `commit`; the driver calls `seal`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from factory import parts, records
from factory.lock import RunLock, RunLocked, lock
from factory.manifest import Manifest
from factory.parts import PartInfo, canonical_json
from factory.storage import Store

__all__ = [
    "DamagedTable", "Manifest", "PartInfo", "RunLock", "RunLocked", "StaleTable", "Table", "UnsealedTable", "lock",
]  # fmt: skip

_PART = re.compile(r"part-(\d{6,})\.parquet")


class UnsealedTable(ValueError):
    """The table has no manifest, so for a reader it does not exist."""


class StaleTable(ValueError):
    """The table was made from something else than what is asked for now."""


class DamagedTable(ValueError):
    """What lies in the run is not what was sealed there."""


class Table:
    """One table of a run. Holds no state but the store and the name, so it travels to workers."""

    def __init__(self, store: Store, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)*", name):
            raise ValueError(f"table must be a plain name such as samples, got {name!r}; use letters, digits and _")
        self.store, self.name = store, name

    def part_path(self, part: int) -> str:
        """Where part `part` lies, relative to the run."""
        return f"{self.name}/part-{part:06d}.parquet"

    def _sidecar_path(self, part: int) -> str:
        return f".parts/{self.name}/{part}.json"

    @property
    def manifest_path(self) -> str:
        return f"{self.name}/_MANIFEST.json"

    @property
    def _fingerprint_path(self) -> str:
        return f".parts/{self.name}/_FINGERPRINT.json"

    def _predecessor_path(self, number: int) -> str:
        return f".parts/{self.name}/_MANIFEST-{number}.json"

    def __repr__(self) -> str:
        return f"Table({self.store.uri}, {self.name})"

    # Writing.

    def require(self, fingerprint: Mapping[str, str]) -> None:
        """Make sure that parts of this table may be added under this fingerprint, and record it if it is the first.

        Raises StaleTable, naming every field that differs.
        """
        wanted = dict(fingerprint)
        known = self.fingerprint()
        if known is None:
            if self.parts():
                raise StaleTable(f"{self._where} has parts but no record of what they were made from; {self._remedy}")
            self.store.put_if_absent(self._fingerprint_path, canonical_json(wanted))
            known = self.fingerprint()
        self._refuse_if_different(known or {}, wanted)
        self._refuse_other_columns()

    def _refuse_other_columns(self) -> None:
        """What an older version began with fewer columns can be read, and not gone on with."""
        there = self.parts() if self.name in records.SCHEMAS else []
        if there and self._info(there[0])[1] != parts.written_schema(self.name):
            raise StaleTable(
                f"{self._where} was begun by a version with other columns; go on with that version, or begin a new run"
            )

    def fingerprint(self) -> dict[str, str] | None:
        """What the table was, or is being, made from; None if nothing was begun."""
        manifest = self.manifest()
        if manifest is not None:
            return manifest.fingerprint
        try:
            kept = json.loads(self.store.read(self._fingerprint_path))
            return {str(key): str(value) for key, value in kept.items()}
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedTable(f"{self._where}: _FINGERPRINT.json cannot be read ({error}); {self._remedy}") from error

    def commit(self, part: int, table: pa.Table, row_group_by: str | None = None) -> bool:
        """Put part `part` in place; False if another writer already had. Columns must be those of records.SCHEMAS."""
        if part < 0:
            raise ValueError(f"part must be 0 or more, got {part}; units are numbered from 0")
        data = parts.encode(parts.conform(self.name, table), row_group_by)
        if not self.store.put_if_absent(self.part_path(part), data):
            return False
        info, schema = parts.describe(part, data)
        self._write_sidecar(info, schema)
        return True

    def parts(self) -> list[int]:
        """The numbers of all committed parts, sealed or not, ascending."""
        paths = (path.removeprefix(f"{self.name}/") for path in self.store.list(self.name))
        return sorted(int(match[1]) for match in map(_PART.fullmatch, paths) if match)

    def missing(self, num_parts: int) -> list[int]:
        """Which of parts 0 to num_parts - 1 are yet to be made."""
        return sorted(set(range(num_parts)) - set(self.parts()))

    def seal(self, num_parts: int, fingerprint: Mapping[str, str], parents: Mapping[str, str]) -> Manifest:
        """Write the manifest over parts 0 to num_parts - 1, atomically. Sealing the same again changes nothing; more
        parts than the last manifest lists are a further round. Raises UnsealedTable while a part is missing, and
        StaleTable if the table was made from something else."""
        absent = self.missing(num_parts)
        if absent or num_parts < 1:
            few = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
            raise UnsealedTable(f"{self._where} lacks {len(absent)} of {num_parts} parts ({few}); {self._command}")
        self.require_if_begun(fingerprint)
        infos, schema = self._infos(num_parts)
        last = self.manifest()
        new = Manifest(self.name, infos, schema, dict(fingerprint), dict(parents))
        if last is not None:
            new = self._next_round(last, new)
        if new is not last:
            if last is not None:  # what its successor names can then be looked up
                self.store.replace(self._predecessor_path(len(last.predecessors)), last.to_json())
            self.store.replace(self.manifest_path, new.to_json())
        return new

    def require_if_begun(self, fingerprint: Mapping[str, str]) -> None:
        """As `require`, but a table that nothing is recorded of is accepted, and nothing is written."""
        known = self.fingerprint()
        if known is not None:
            self._refuse_if_different(known, dict(fingerprint))

    def _next_round(self, last: Manifest, new: Manifest) -> Manifest:
        if new.parts[: len(last.parts)] != last.parts or new.schema != last.schema:
            raise DamagedTable(f"{self._where}: parts that were sealed have changed or are left out; {self._remedy}")
        if new.parts == last.parts and new.parents == last.parents:
            return last
        chain = (*last.predecessors, last.digest)
        return Manifest(new.table, new.parts, new.schema, new.fingerprint, new.parents, chain)

    def _infos(self, num_parts: int) -> tuple[tuple[PartInfo, ...], str]:
        with ThreadPoolExecutor(max_workers=16) as pool:
            found = list(pool.map(self._info, range(num_parts)))
        schemas = sorted({schema for _, schema in found})
        if len(schemas) > 1:
            odd = next(info.part for info, schema in found if schema != found[0][1])
            raise DamagedTable(f"{self._where}: part {odd} has other columns than part 0; {self._remedy}")
        return tuple(info for info, _ in found), schemas[0]

    def _info(self, part: int) -> tuple[PartInfo, str]:
        """From the sidecar if it fits the part, else from the part itself."""
        try:
            content = json.loads(self.store.read(self._sidecar_path(part)))
            info, schema = PartInfo.from_json(content), str(content["schema"])
            if info.part == part and info.bytes == self.store.size(self.part_path(part)):
                return info, schema
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            pass  # lost in a crash, or not ours: rebuilt below
        try:
            info, schema = parts.describe(part, self.store.read(self.part_path(part)))
        except pa.ArrowException as error:
            raise DamagedTable(f"{self._where}: part {part} cannot be read ({error}); {self._repair(part)}") from error
        self._write_sidecar(info, schema)
        return info, schema

    def _write_sidecar(self, info: PartInfo, schema: str) -> None:
        self.store.replace(self._sidecar_path(info.part), canonical_json({**parts.info_json(info), "schema": schema}))

    # Reading.

    def manifest(self) -> Manifest | None:
        """The last sealed round, or None."""
        try:
            return Manifest.from_json(self.store.read(self.manifest_path))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedTable(
                f"{self._where}: _MANIFEST.json cannot be trusted ({type(error).__name__}: {error}); "
                f"remove that file and {self._command}"
            ) from error

    def sealed(self) -> Manifest:
        """The last sealed round; UnsealedTable if there is none."""
        manifest = self.manifest()
        if manifest is None:
            there = len(self.parts())
            state = f"{there} parts are there but no manifest" if there else "nothing was made yet"
            raise UnsealedTable(f"{self._where} is not sealed: {state}; {self._command}")
        return manifest

    def digest(self) -> str:
        """SHA-256 of the manifest's canonical content: what a child records as its parent."""
        return self.sealed().digest

    def origin(self) -> str:
        """The digest of the table's first round: what belongs in a child's fingerprint (see Manifest.origin)."""
        return self.sealed().origin

    def counts(self) -> dict[str, int]:
        """Rows per outcome of the sealed table."""
        return self.sealed().counts

    def read(self, columns: list[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
        """All sealed rows in memory, in part order; `filter` may use columns that are not returned."""
        manifest = self.sealed()
        tables = [self._read_part(info, columns, filter) for info in manifest.parts]
        return pa.concat_tables(tables)

    def batches(self, columns: list[str] | None = None, filter: pc.Expression | None = None) -> Iterator[pa.Table]:
        """The sealed rows, one part at a time, so that memory holds one part."""
        manifest = self.sealed()
        return (self._read_part(info, columns, filter) for info in manifest.parts)

    def with_image(self) -> Iterator[pa.ChunkedArray]:
        """Which rows of each sealed part have an image, in part order, without reading one."""
        for info in self.sealed().parts:
            with self.store.open(self._checked(info)) as file:
                yield pc.is_valid(pq.ParquetFile(file).read(["image.path"])["image"])

    def committed(self, columns: list[str]) -> Iterator[pa.Table]:
        """The parts that are in place by now, sealed or not, in order."""
        for part in self.parts():
            with self.store.open(self.part_path(part)) as file:
                yield self._columns_of(file, columns, None)

    def read_part(self, part: int, columns: list[str] | None = None) -> pa.Table:
        """One sealed part: a unit of a table that was made unit by unit."""
        return self._read_part(self.sealed().parts[part], columns, None)

    def reader(self, columns: list[str] | None = None) -> Callable[[int], pa.Table]:
        """`read_part` for one who reads many: the manifest, which lists them all, is read once."""
        infos = self.sealed().parts
        return lambda part: self._read_part(infos[part], columns, None)

    def finder(self, column: str) -> Callable[[int], pa.Table]:
        """The sealed rows whose integer `column` has a value, in part order, for one who asks for many values: which
        row groups may hold one is learned once, from the parts' footers, and no others are read."""
        footers = [(info, self._footer(info)) for info in self.sealed().parts]
        spans = [(info, footer, parts.spans(footer, column)) for info, footer in footers]
        nothing = parts.with_later_columns(
            self.name, pa.Table.from_batches([], footers[0][1].schema.to_arrow_schema()), None
        )

        def found(value: int) -> pa.Table:
            holding = [(i, f, [n for n, (least, most) in enumerate(s) if least <= value <= most]) for i, f, s in spans]
            tables = [self._read_groups(info, footer, groups) for info, footer, groups in holding if groups]
            return pa.concat_tables([nothing, *tables]).filter(pc.field(column) == value)

        return found

    def _footer(self, info: PartInfo) -> pq.FileMetaData:
        with self.store.open(self._checked(info)) as file:
            return pq.read_metadata(file)

    def _read_groups(self, info: PartInfo, footer: pq.FileMetaData, groups: list[int]) -> pa.Table:
        with self.store.open(self._checked(info)) as file:
            table = pq.ParquetFile(file, metadata=footer).read_row_groups(groups)
        return parts.with_later_columns(self.name, table, None)

    def _read_part(self, info: PartInfo, columns: list[str] | None, filter: pc.Expression | None) -> pa.Table:
        path = self._checked(info)
        source = BytesIO(self.store.read(path)) if columns is None else self.store.open(path)
        with source as file:
            table = self._columns_of(file, columns, filter)
        # The `huggingface` metadata describes all columns, so a choice of them goes without.
        return table if columns is None else table.replace_schema_metadata(None)

    def _columns_of(self, file: Any, columns: list[str] | None, filter: pc.Expression | None) -> pa.Table:
        """Those of a part, and null for what was added to such tables after it was written."""
        try:
            table = pq.read_table(file, columns=columns, filters=filter)
        except pa.ArrowInvalid:  # a column is missing: an older version's part, unless nobody ever had it
            added = set(records.SCHEMAS[self.name].names if self.name in records.SCHEMAS else [])
            file.seek(0)
            there = set(pq.read_schema(file).names)
            if columns is None or not added & (set(columns) - there):
                raise
            file.seek(0)
            known = [column for column in columns if column in there or column not in added]
            table = pq.read_table(file, columns=known, filters=filter)
        return parts.with_later_columns(self.name, table, columns)

    def _checked(self, info: PartInfo) -> str:
        """The path of a sealed part, which is there and as long as it was."""
        path = self.part_path(info.part)
        try:
            size = self.store.size(path)
        except FileNotFoundError as error:
            raise DamagedTable(f"{self._where}: part {info.part} is gone; {self._repair(info.part)}") from error
        if size != info.bytes:
            raise DamagedTable(
                f"{self._where}: part {info.part} has {size} bytes, sealed with {info.bytes}; {self._repair(info.part)}"
            )
        return path

    # Checking.

    def verify(self) -> list[str]:
        """Recount the sealed table from its parts. Every problem is a sentence that names the part; none: []."""
        try:
            manifest = self.sealed()
        except (UnsealedTable, DamagedTable) as error:
            return [str(error)]
        problems = [problem for info in manifest.parts for problem in self._verify_part(info, manifest.schema)]
        return problems + list(self._verify_predecessors(manifest))

    def _verify_predecessors(self, manifest: Manifest) -> Iterator[str]:
        """Each earlier round is what its successor names, and its parts are still there as they were sealed."""
        for number, digest in enumerate(manifest.predecessors):
            where = f"{self.name}: predecessor {number} ({digest[:12]})"
            try:
                known = Manifest.from_json(self.store.read(self._predecessor_path(number)))
            except FileNotFoundError:
                yield f"{where} was removed; restore {self._predecessor_path(number)}"
                continue
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                yield f"{where} cannot be trusted ({error}); restore {self._predecessor_path(number)}"
                continue
            if known.digest != digest or known.predecessors != manifest.predecessors[:number]:
                yield f"{where} is not what {self.manifest_path} names; restore {self._predecessor_path(number)}"
            elif known.parts != manifest.parts[: len(known.parts)]:
                yield f"{where} lists other parts than {self.manifest_path}; restore {self.manifest_path}"

    def unlisted(self) -> list[int]:
        """Parts that no manifest lists: they are not part of the table, and that is no error."""
        return sorted(set(self.parts()) - {info.part for info in self.sealed().parts})

    def _verify_part(self, info: PartInfo, schema: str) -> Iterator[str]:
        where = f"{self.name} part {info.part}"
        try:
            data = self.store.read(self.part_path(info.part))
        except FileNotFoundError:
            yield f"{where} was removed: the manifest lists {info.rows} rows; {self._repair(info.part)}"
            return
        if len(data) != info.bytes:
            kind = "truncated" if len(data) < info.bytes else "lengthened"
            yield f"{where} was {kind}: {len(data)} bytes, sealed with {info.bytes}; {self._repair(info.part)}"
            return
        if parts.sha256(data) != info.sha256:
            yield f"{where} was edited: its SHA-256 is not the sealed one; {self._repair(info.part)}"
            return
        yield from self._recount(where, info, schema, data)

    def _recount(self, where: str, info: PartInfo, schema: str, data: bytes) -> Iterator[str]:
        try:
            found, found_schema = parts.describe(info.part, data)
        except pa.ArrowException as error:
            yield f"{where} is not a Parquet file ({error}); {self._repair(info.part)}"
            return
        if found.rows != info.rows:
            yield f"{where} holds {found.rows} rows, the manifest says {info.rows}; {self._repair(info.part)}"
        if found.outcomes != info.outcomes:
            yield f"{where} recounts to {found.outcomes}, the manifest says {info.outcomes}; {self._repair(info.part)}"
        if found.outcomes and sum(found.outcomes.get(name, 0) for name in records.OUTCOMES) != found.rows:
            yield f"{where}: accepted + rejected + failed is not its {found.rows} rows; {self._repair(info.part)}"
        if found_schema != schema:
            yield f"{where} has other columns than the manifest says; {self._repair(info.part)}"

    # Sentences.

    def _refuse_if_different(self, known: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        changed = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
        if changed:
            told = "; ".join(f"{key} was {known.get(key, 'absent')}, is {wanted.get(key, 'absent')}" for key in changed)
            raise StaleTable(f"{self._where} was made from something else: {told}; {self._remedy}")

    @property
    def _where(self) -> str:
        return f"{self.name} in {self.store.uri}"

    @property
    def _command(self) -> str:
        verb = records.MADE_BY.get(self.name, self.name)
        return f"run `factory {verb} --run {self.store.uri}` to make the rest of it"

    @property
    def _remedy(self) -> str:
        return f"use another --run, or remove {self.store.uri}/{self.name} and {self.store.uri}/.parts/{self.name}"

    def _repair(self, part: int) -> str:
        return f"restore it, or remove {self.part_path(part)} and {self.manifest_path} and make it again"
