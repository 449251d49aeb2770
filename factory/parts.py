"""One part of a table: its bytes, and what a manifest says about it.

The bytes are a function of the rows alone: fixed writer options, the schema of factory/records.py, row groups cut
by content. (They also depend on the Parquet library's version, which run.json records.)

    {"part": 42, "rows": 256, "bytes": 8123456, "sha256": "ab12...", "outcomes": {"accepted": 250, "rejected": 6}}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from factory import records

ROW_GROUP_BYTES = 32 * 2**20  # what a reader must hold to decode one column chunk
_ROW_OVERHEAD = 256  # bytes reckoned per row for everything that is not an encoded image


@dataclass(frozen=True)
class PartInfo:
    """What is known of one committed part: its rows, its size and SHA-256 in bytes, its rows per outcome."""

    part: int
    rows: int
    bytes: int
    sha256: str
    outcomes: dict[str, int]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PartInfo:
        """Of the dict that `asdict` makes; anything else is a KeyError, TypeError or ValueError."""
        outcomes = {str(key): int(value) for key, value in content["outcomes"].items()}
        part, rows, size = (int(content[key]) for key in ("part", "rows", "bytes"))
        return cls(part, rows, size, str(content["sha256"]), outcomes)


def canonical_json(content: object) -> bytes:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def schema_digest(schema: pa.Schema) -> str:
    """Of the column names, types and order; metadata and the library's own spelling of it do not count."""
    return sha256(canonical_json([[field.name, str(field.type), field.nullable] for field in schema]))


@cache
def written_schema(name: str) -> str:
    """The digest of a table's schema in factory/records.py, as a part under it has it."""
    return describe(0, encode(records.SCHEMAS[name].empty_table()))[1]


def conform(name: str, table: pa.Table) -> pa.Table:
    """The table under its schema in factory/records.py; tables that have none there keep theirs."""
    schema = records.SCHEMAS.get(name)
    if schema is not None:
        wrong = sorted(set(table.column_names) ^ set(schema.names))
        if wrong or len(table.column_names) != len(schema.names):
            raise ValueError(
                f"{name} must have the columns of records.SCHEMAS; they differ in {', '.join(wrong) or 'repeats'}; "
                "build it with records.rows_to_table"
            )
        table = table.select(schema.names).cast(schema)
    _check_outcomes(name, table)
    return table.combine_chunks()


def with_later_columns(name: str, table: pa.Table, columns: list[str] | None) -> pa.Table:
    """A table as an older version wrote it with null in the columns that were added since, of those asked for."""
    schema = records.SCHEMAS.get(name)
    if schema is None:
        return table
    for field in schema if columns is None else [schema.field(column) for column in columns if column in schema.names]:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names if columns is None else columns)


def _check_outcomes(name: str, table: pa.Table) -> None:
    unknown = sorted(set(count_outcomes(table)) - set(records.OUTCOMES))
    if unknown:
        raise ValueError(
            f"{name}.outcome must be one of {', '.join(records.OUTCOMES)}, got {', '.join(unknown)}; "
            "every row has exactly one"
        )


def count_outcomes(table: pa.Table) -> dict[str, int]:
    """Rows per outcome; empty for a table without that column. A missing outcome counts as `none`."""
    if "outcome" not in table.column_names:
        return {}
    counts = Counter(value or "none" for value in table["outcome"].to_pylist())
    return dict(sorted(counts.items()))


def encode(table: pa.Table, row_group_by: str | None = None) -> bytes:
    """Parquet bytes of a conformed table. Row groups stay below 32 MiB (or hold one row), and with `row_group_by`
    a new one starts wherever that column changes."""
    plain = [field for field in table.schema if not pa.types.is_struct(field.type)]
    # Images are PNG already: to compress them again takes as long as to write all the rest, and saves nothing.
    packed = [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in plain]
    sink = BytesIO()
    writer = pq.ParquetWriter(
        sink, table.schema, version="2.6", data_page_version="1.0",
        compression=dict.fromkeys(packed, "zstd"), compression_level=dict.fromkeys(packed, 3),
        use_dictionary=[field.name for field in plain if pa.types.is_string(field.type)],
        write_statistics=[field.name for field in plain],
    )  # fmt: skip
    with writer:
        for start, stop in _row_groups(table, row_group_by):
            writer.write_table(table.slice(start, stop - start), row_group_size=max(stop - start, 1))
    return sink.getvalue()


def _row_groups(table: pa.Table, row_group_by: str | None) -> Iterator[tuple[int, int]]:
    """Spans of rows, cut where the column changes and where the bytes would pass the limit."""
    edges = {0, table.num_rows}
    if row_group_by is not None and table.num_rows:
        values = table[row_group_by].to_numpy()
        edges |= {int(i) + 1 for i in np.flatnonzero(values[1:] != values[:-1])}
    sizes = _row_bytes(table)
    filled = 0
    for row in range(table.num_rows):
        filled = 0 if row in edges else filled
        if filled and filled + sizes[row] > ROW_GROUP_BYTES:
            edges.add(row)
            filled = 0
        filled += int(sizes[row])
    ordered = sorted(edges)
    return pairwise(ordered) if len(ordered) > 1 else iter([(0, 0)])


def _row_bytes(table: pa.Table) -> np.ndarray:
    """Bytes reckoned for each row, from the values alone (buffer sizes depend on how a table was built)."""
    total = np.full(table.num_rows, _ROW_OVERHEAD, dtype=np.int64)
    for field in table.schema:
        column = table[field.name]
        if field.type == records.IMAGE:
            column = pc.struct_field(column, "bytes")
        if pa.types.is_binary(column.type) or pa.types.is_string(column.type):
            total += pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    return total


def describe(part: int, data: bytes) -> tuple[PartInfo, str]:
    """What the bytes of a part say of themselves, and their schema's digest; unreadable: pyarrow.ArrowException."""
    file = pq.ParquetFile(BytesIO(data))
    schema = file.schema_arrow
    table = file.read(columns=["outcome"] if "outcome" in schema.names else [])
    info = PartInfo(part, file.metadata.num_rows, len(data), sha256(data), count_outcomes(table))
    return info, schema_digest(schema)


def spans(footer: pq.FileMetaData, column: str) -> list[tuple[float, float]]:
    """The least and the largest value that each row group may hold of a numeric column, by its statistics."""
    if not footer.num_row_groups:
        return []
    group = footer.row_group(0)
    place = next(n for n in range(group.num_columns) if group.column(n).path_in_schema == column)
    return [_span(footer.row_group(n), place) for n in range(footer.num_row_groups)]


def _span(group: pq.RowGroupMetaData, place: int) -> tuple[float, float]:
    if not group.num_rows:
        return math.inf, -math.inf
    known = group.column(place).statistics
    return (known.min, known.max) if known is not None and known.has_min_max else (-math.inf, math.inf)


def info_json(info: PartInfo) -> dict[str, Any]:
    return asdict(info)
