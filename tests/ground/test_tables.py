"""A part is committed once, a manifest seals what is there, readers see no more, verify misses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory import parts, records
from factory.fingerprint import fingerprint_of
from factory.recipe import FINGERPRINTS, Recipe, load
from factory.storage import LocalStore
from factory.tables import DamagedTable, Manifest, StaleTable, Table, UnsealedTable

FINGERPRINT = {"caption.captioner": '"measured"', "parents.corpus": "c0"}


def captions(part: int, outcomes: str = "aarf") -> pa.Table:
    """One part of the captions table; a, r and f are the outcomes of its rows."""
    names = {"a": ("accepted", None), "r": ("rejected", "blank"), "f": ("failed", "unreadable")}
    rows: list[dict[str, object]] = [
        {"record_id": f"{part}-{i}", "caption": f"a lesion, number {i}", "color_count": i, "colors": ["red"] * i,
         "outcome": names[letter][0], "reason": names[letter][1]}
        for i, letter in enumerate(outcomes)
    ]  # fmt: skip
    return records.rows_to_table("captions", rows)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(LocalStore(tmp_path), "captions")


@pytest.fixture
def sealed(table: Table) -> Table:
    for part in range(3):
        table.commit(part, captions(part))
    table.seal(3, FINGERPRINT, {"corpus": "c0"})
    return table


def file_of(table: Table, part: int) -> Path:
    assert isinstance(table.store, LocalStore)
    return table.store.root / table.part_path(part)


# Committing.


def test_the_first_to_commit_a_part_wins_and_the_late_one_finds_it_done(table: Table) -> None:
    assert table.commit(7, captions(7)) is True
    assert table.commit(7, captions(7, "ffff")) is False
    assert table.parts() == [7]
    assert file_of(table, 7).name == "part-000007.parquet"


def test_racing_writers_leave_one_part_and_its_own_sidecar(table: Table) -> None:
    start = threading.Barrier(6)

    def write(writer: int) -> bool:
        start.wait()
        return table.commit(0, captions(0, "a" * (writer + 1)))

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(write, range(6)))
    assert won.count(True) == 1
    assert table.seal(1, FINGERPRINT, {}).rows == won.index(True) + 1
    assert table.verify() == []


def test_missing_names_what_is_left_to_make(table: Table) -> None:
    for part in (0, 2, 9):
        table.commit(part, captions(part))
    assert table.missing(5) == [1, 3, 4]


def test_the_bytes_of_a_part_follow_from_its_rows_alone(table: Table) -> None:
    once, again = parts.encode(captions(0)), parts.encode(captions(0))
    assert once == again


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), offset=st.integers(0, 9), large=st.booleans())
def test_how_a_table_was_put_together_does_not_show_in_its_bytes(cuts: list[int], offset: int, large: bool) -> None:
    whole = captions(0, "aarf" * 10)
    edges = [0, *sorted(cuts), 40]
    longer = pa.concat_tables([captions(1, "a" * offset), whole])
    pieces = [longer.slice(offset + a, b - a) for a, b in pairwise(edges)]
    built = pa.concat_tables(pieces)
    if large:  # as Ray and pandas like to hand text over
        built = built.set_column(1, "caption", built["caption"].cast(pa.large_string()))
    assert parts.encode(parts.conform("captions", built)) == parts.encode(parts.conform("captions", whole))


def test_what_comes_back_is_what_went_in_with_the_datasets_features(sealed: Table) -> None:
    expected = pa.concat_tables([captions(part) for part in range(3)])
    found = sealed.read()
    assert found.equals(expected)
    assert found.schema.metadata[b"huggingface"] == records.CAPTIONS.metadata[b"huggingface"]


def test_the_folder_of_a_sealed_table_loads_with_datasets_as_it_is(table: Table, tmp_path: Path) -> None:
    import datasets

    table.require(FINGERPRINT)
    table.commit(0, captions(0))  # one part is the hard case: every other file in the folder counts against it
    table.seal(1, FINGERPRINT, {})
    found = datasets.load_dataset(str(tmp_path / "captions"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["record_id"][:2] == ["0-0", "0-1"]
    assert found.features["color_count"].dtype == "int32"


def samples(sizes: list[int]) -> pa.Table:
    rows: list[dict[str, object]] = [
        {"sample_id": str(i), "unit": i // 2, "outcome": "accepted",
         "image": records.image_struct(os.urandom(size), f"{i}.png")}
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    return records.rows_to_table("samples", rows)


def test_row_groups_stay_below_their_limit_and_a_larger_row_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", 10_000)
    data = parts.encode(parts.conform("samples", samples([4000, 4000, 4000, 50_000, 100, 100])))
    meta = pq.ParquetFile(BytesIO(data)).metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [2, 1, 1, 2]


def test_row_groups_can_follow_the_units_of_a_plan() -> None:
    plan = records.rows_to_table(
        "plan", [{"sample_id": str(i), "unit": unit} for i, unit in enumerate([0, 0, 0, 1, 2, 2])]
    )
    meta = pq.ParquetFile(BytesIO(parts.encode(parts.conform("plan", plan), row_group_by="unit"))).metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [3, 1, 2]


def test_a_part_without_rows_is_a_part(table: Table) -> None:
    table.commit(0, captions(0, ""))
    assert table.seal(1, FINGERPRINT, {}).rows == 0
    assert table.read().num_rows == 0
    assert table.verify() == []


def test_a_table_outside_the_record_keeps_its_own_columns(tmp_path: Path) -> None:
    table = Table(LocalStore(tmp_path), "lab/worth")
    table.commit(0, pa.table({"seed": [1, 2], "auc": [0.7, 0.8]}))
    table.seal(1, {}, {})
    assert table.read().to_pydict() == {"seed": [1, 2], "auc": [0.7, 0.8]}
    assert table.counts() == {}


def test_wrong_columns_outcomes_names_and_numbers_are_refused(table: Table, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="they differ in reason;"):
        table.commit(0, captions(0).drop_columns(["reason"]))
    odd = captions(0).to_pylist()
    odd[1]["outcome"], odd[2]["outcome"] = "lost", None
    with pytest.raises(ValueError, match="captions.outcome must be one of accepted, rejected, failed, got lost, none"):
        table.commit(0, pa.Table.from_pylist(odd, schema=records.CAPTIONS))
    with pytest.raises(ValueError, match="part must be 0 or more, got -1"):
        table.commit(-1, captions(0))
    with pytest.raises(ValueError, match="table must be a plain name such as samples, got '../x'"):
        Table(LocalStore(tmp_path), "../x")
    assert table.parts() == []


# Sealing and reading.


def test_an_unsealed_table_is_not_read_and_says_what_to_do(table: Table) -> None:
    with pytest.raises(UnsealedTable, match=r"not sealed: nothing was made yet; run `factory caption --run .*`"):
        table.read()
    table.commit(0, captions(0))
    for ask in (table.read, table.batches, table.digest, table.origin, table.counts):
        with pytest.raises(UnsealedTable, match="1 parts are there but no manifest"):
            ask()
    assert table.manifest() is None
    assert "is not sealed" in table.verify()[0]


def test_sealing_waits_for_every_part(table: Table) -> None:
    table.commit(1, captions(1))
    with pytest.raises(UnsealedTable, match=r"lacks 6 of 7 parts \(0, 2, 3, 4, 5, \.\.\.\)"):
        table.seal(7, FINGERPRINT, {})


def test_the_manifest_tells_rows_bytes_hashes_and_outcomes(sealed: Table) -> None:
    manifest = sealed.sealed()
    data = file_of(sealed, 1).read_bytes()
    assert manifest.parts[1].sha256 == hashlib.sha256(data).hexdigest()
    assert (manifest.parts[1].bytes, manifest.parts[1].rows, manifest.rows) == (len(data), 4, 12)
    assert sealed.counts() == {"accepted": 6, "failed": 3, "rejected": 3}
    assert manifest.parents == {"corpus": "c0"}
    assert sealed.digest() == sealed.origin() == manifest.digest


def test_sealing_the_same_again_changes_nothing(sealed: Table) -> None:
    before = sealed.store.read(sealed.manifest_path)
    sealed.seal(3, FINGERPRINT, {"corpus": "c0"})
    assert sealed.store.read(sealed.manifest_path) == before


def test_two_runs_of_the_same_thing_have_one_digest(sealed: Table, tmp_path: Path) -> None:
    other = Table(LocalStore(tmp_path / "other"), "captions")
    for part in (2, 0, 1):  # in another order
        other.commit(part, captions(part))
    assert other.seal(3, FINGERPRINT, {"corpus": "c0"}).digest == sealed.digest()


def test_a_sidecar_that_is_lost_or_torn_is_rebuilt_from_its_part(table: Table, tmp_path: Path) -> None:
    for part in range(3):
        table.commit(part, captions(part))
    before = [table._info(part) for part in range(3)]
    folder = tmp_path / ".parts/captions"
    (folder / "0.json").unlink()
    (folder / "1.json").write_text("{")
    (folder / "2.json").write_text(
        json.dumps({"part": 2, "rows": 1, "bytes": 5, "sha256": "", "outcomes": {}, "schema": ""})
    )
    assert [table._info(part) for part in range(3)] == before
    assert json.loads((folder / "0.json").read_text())["rows"] == 4
    assert table.seal(3, FINGERPRINT, {}).rows == 12


def test_a_torn_part_cannot_be_sealed_and_the_refusal_names_it(table: Table, tmp_path: Path) -> None:
    table.commit(0, captions(0))
    file_of(table, 0).write_bytes(b"PAR1 torn")
    with pytest.raises(DamagedTable, match=r"part 0 cannot be read .*remove captions/part-000000.parquet"):
        table.seal(1, FINGERPRINT, {})


def test_parts_with_different_columns_cannot_be_sealed(tmp_path: Path) -> None:
    table = Table(LocalStore(tmp_path), "lab")
    table.commit(0, pa.table({"a": [1]}))
    table.commit(1, pa.table({"b": [1]}))
    with pytest.raises(DamagedTable, match="part 1 has other columns than part 0"):
        table.seal(2, {}, {})


def test_a_further_round_names_its_predecessor_and_readers_keep_the_last_sealed_one(sealed: Table) -> None:
    first = sealed.digest()
    sealed.commit(3, captions(3))
    assert sealed.read().num_rows == 12  # committed, not sealed
    assert sealed.unlisted() == [3]
    second = sealed.seal(4, FINGERPRINT, {"corpus": "c0"})
    assert second.predecessors == (first,)
    assert second.digest != first
    assert sealed.origin() == first
    assert sealed.read().num_rows == 16
    sealed.commit(4, captions(4))
    assert sealed.seal(5, FINGERPRINT, {"corpus": "c1"}).predecessors == (first, second.digest)


def test_a_round_cannot_leave_out_or_change_what_was_sealed(sealed: Table, tmp_path: Path) -> None:
    with pytest.raises(DamagedTable, match="parts that were sealed have changed or are left out"):
        sealed.seal(2, FINGERPRINT, {"corpus": "c0"})
    file_of(sealed, 0).unlink()
    sealed.commit(0, captions(0, "ff"))
    with pytest.raises(DamagedTable, match="parts that were sealed have changed"):
        sealed.seal(3, FINGERPRINT, {"corpus": "c0"})


def test_a_reader_opens_only_what_the_manifest_lists(sealed: Table) -> None:
    (file_of(sealed, 0).parent / "part-000099.parquet").write_bytes(b"not ours")
    assert sealed.read().num_rows == 12
    assert sealed.verify() == []
    assert sealed.unlisted() == [99]


def test_columns_and_filters_choose(sealed: Table) -> None:
    found = sealed.read(["record_id"], pc.field("outcome") == "failed")
    assert found.to_pydict() == {"record_id": ["0-3", "1-3", "2-3"]}
    assert [batch.num_rows for batch in sealed.batches(["outcome"])] == [4, 4, 4]
    assert [batch.num_rows for batch in sealed.batches(filter=pc.field("color_count") > 1)] == [2, 2, 2]


def plan_part(units: list[int]) -> pa.Table:
    rows = [{"sample_id": f"{unit}-{n}", "unit": unit, "prompt": "x" * 50} for n, unit in enumerate(units)]
    return records.rows_to_table("plan", rows)


def test_rows_found_by_their_unit_are_those_a_filter_finds_and_no_other_row_group_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Table(LocalStore(tmp_path), "plan")
    for part, units in enumerate([[0] * 3 + [1] * 5 + [2] * 2, [2] * 4 + [3], [], [5]]):  # unit 2 lies in two parts
        plan.commit(part, plan_part(units), row_group_by="unit")
    plan.seal(4, FINGERPRINT, {})
    read: list[tuple[int, list[int]]] = []
    real = Table._read_groups

    def noted(self: Table, info: Any, footer: Any, groups: list[int]) -> pa.Table:
        read.append((info.part, groups))
        return real(self, info, footer, groups)

    monkeypatch.setattr(Table, "_read_groups", noted)
    found = plan.finder("unit")
    for unit in range(7):
        assert found(unit).equals(plan.read(filter=pc.field("unit") == unit)), unit
    assert read == [(0, [0]), (0, [1]), (0, [2]), (1, [0]), (1, [1]), (3, [0])]
    (tmp_path / "plan/part-000003.parquet").unlink()
    with pytest.raises(DamagedTable, match="part 3 is gone"):
        found(5)


def test_a_reader_notices_a_part_of_another_size_or_none(sealed: Table) -> None:
    path = file_of(sealed, 1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedTable, match=r"part 1 has \d+ bytes, sealed with \d+; restore it, or remove"):
        sealed.read(["record_id"])
    path.unlink()
    with pytest.raises(DamagedTable, match="part 1 is gone"):
        list(sealed.batches())


# Verifying.


def test_verify_is_silent_on_what_is_sound(sealed: Table) -> None:
    assert sealed.verify() == []


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda data: data[:-1], "captions part 1 was truncated"),
        (lambda data: b"", "captions part 1 was truncated: 0 bytes"),
        (lambda data: data + b"x", "captions part 1 was lengthened"),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "captions part 1 was edited"),
        (None, "captions part 1 was removed: the manifest lists 4 rows"),
    ],
)
def test_verify_names_the_part_and_what_befell_it(sealed: Table, harm: Any, says: str) -> None:
    path = file_of(sealed, 1)
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes()))
    (problem,) = sealed.verify()
    assert problem.startswith(says)
    assert "remove captions/part-000001.parquet and captions/_MANIFEST.json and make it again" in problem


def test_the_repair_that_is_named_repairs(sealed: Table) -> None:
    before = sealed.sealed()
    file_of(sealed, 1).write_bytes(b"x")
    file_of(sealed, 1).unlink()
    sealed.store.delete(sealed.manifest_path)
    assert sealed.missing(3) == [1]
    sealed.commit(1, captions(1))
    assert sealed.seal(3, FINGERPRINT, {"corpus": "c0"}) == before


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_anywhere_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    table = Table(LocalStore(tmp_path_factory.mktemp("run")), "captions")
    table.commit(0, captions(0))
    table.seal(1, FINGERPRINT, {})
    content = bytearray(file_of(table, 0).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    file_of(table, 0).write_bytes(content)
    (problem,) = table.verify()
    assert problem.startswith("captions part 0 was edited")


def forged(table: Table, **changes: Any) -> None:
    """A manifest that agrees with itself but tells something else of part 0."""
    manifest = table.sealed()
    info = parts.PartInfo(**{**parts.info_json(manifest.parts[0]), **changes})
    new = Manifest("captions", (info, *manifest.parts[1:]), manifest.schema, manifest.fingerprint, manifest.parents)
    table.store.replace(table.manifest_path, new.to_json())


def test_verify_recounts_rather_than_believes(sealed: Table) -> None:
    forged(sealed, rows=5)
    assert sealed.verify()[0].startswith("captions part 0 holds 4 rows, the manifest says 5")
    forged(sealed, rows=4, outcomes={"accepted": 4})
    assert sealed.verify()[0].startswith(
        "captions part 0 recounts to {'accepted': 2, 'failed': 1, 'rejected': 1}, the manifest says {'accepted': 4}"
    )


def test_verify_checks_columns_totals_and_that_a_part_is_parquet(sealed: Table) -> None:
    stray = pa.table({"outcome": ["accepted", None], "x": [1, 2]})
    sink = BytesIO()
    pq.write_table(stray, sink)
    for content, says in (
        (sink.getvalue(), "has other columns than the manifest says"),
        (sink.getvalue(), "accepted + rejected + failed is not its 2 rows"),
        (b"junk", "is not a Parquet file"),
    ):
        file_of(sealed, 0).write_bytes(content)
        forged(sealed, rows=2, bytes=len(content), sha256=parts.sha256(content), outcomes={"accepted": 1, "none": 1})
        assert any(says in problem for problem in sealed.verify())


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"parts": []}', b"null", b"\xff\xfe"])
def test_a_manifest_that_is_not_one_is_damage(sealed: Table, content: bytes) -> None:
    sealed.store.replace(sealed.manifest_path, content)
    with pytest.raises(DamagedTable, match="_MANIFEST.json cannot be trusted"):
        sealed.read()
    assert "cannot be trusted" in sealed.verify()[0]


def test_a_manifest_edited_by_hand_gives_itself_away(sealed: Table) -> None:
    content = json.loads(sealed.store.read(sealed.manifest_path))
    content["parts"][0]["rows"] = 40
    sealed.store.replace(sealed.manifest_path, json.dumps(content).encode())
    with pytest.raises(DamagedTable, match="does not match its own digest"):
        sealed.manifest()


# What a table was made from.


def test_a_changed_field_is_named_with_both_values_and_the_remedy(sealed: Table) -> None:
    sealed.require(FINGERPRINT)
    with pytest.raises(StaleTable) as caught:
        sealed.require({"caption.captioner": '"other"', "weights.captioner": "w1"})
    message = str(caught.value)
    assert 'caption.captioner was "measured", is "other"; parents.corpus was c0, is absent' in message
    assert "weights.captioner was absent, is w1" in message
    assert "use another --run, or remove" in message
    with pytest.raises(StaleTable):
        sealed.seal(3, {"caption.captioner": '"other"'}, {})


def test_an_unsealed_table_remembers_what_its_parts_are_made_from(table: Table) -> None:
    table.require(FINGERPRINT)
    table.commit(0, captions(0))
    table.require(FINGERPRINT)
    with pytest.raises(StaleTable, match="parents.corpus was c0, is c1"):
        table.require(FINGERPRINT | {"parents.corpus": "c1"})


def test_parts_of_unknown_making_are_not_added_to(table: Table) -> None:
    table.commit(0, captions(0))
    with pytest.raises(StaleTable, match="no record of what they were made from"):
        table.require(FINGERPRINT)


def test_a_fingerprint_that_cannot_be_read_is_damage(table: Table) -> None:
    table.store.replace(".parts/captions/_FINGERPRINT.json", b"[")
    with pytest.raises(DamagedTable, match="_FINGERPRINT.json cannot be read"):
        table.require(FINGERPRINT)


def test_a_fingerprint_has_the_fields_the_table_depends_on_and_no_others() -> None:
    before = fingerprint_of(Recipe(), "samples", {"plan": "p0"}, {"gate": "g0"})
    after = fingerprint_of(load(None, ["gate.min_iou=0.5"]), "samples", {"plan": "p0"}, {"gate": "g1"})
    assert {key for key in before if before[key] != after[key]} == {"gate.min_iou", "weights.gate"}
    assert (before["gate.min_iou"], after["gate.min_iou"]) == ("0.7", "0.5")
    elsewhere = load(None, ["fit.lora.steps=7", "plan.seed=9", "release.name=x"])
    assert fingerprint_of(elsewhere, "samples", {"plan": "p0"}, {"gate": "g0"}) == before


@pytest.mark.parametrize("name", sorted(FINGERPRINTS))
def test_every_table_has_a_fingerprint_of_short_texts(name: str) -> None:
    long = load(None, [f"corpus.sources.isic2017={'x' * 500}", "plan.count=100"])
    found = fingerprint_of(long, name, {"parent": "p0"}, {})  # some depend on their parents alone
    assert found
    assert all(isinstance(value, str) and len(value) <= 120 for value in found.values())


def test_what_an_older_version_wrote_with_fewer_columns_is_read_and_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, whole = LocalStore(tmp_path), records.PLAN
    older = pa.schema([field for field in whole if field.name not in ("bank", "site")])
    rows = [{"sample_id": f"s{k}", "unit": k, "index": k, "seed": k, "audit": False, "parents": []} for k in range(3)]
    with monkeypatch.context() as before:
        before.setitem(records.SCHEMAS, "plan", older)
        parts.written_schema.cache_clear()
        table = Table(store, "plan")
        table.require({"a": "1"})
        table.commit(0, pa.Table.from_pylist(rows, schema=older), row_group_by="unit")
        table.seal(1, {"a": "1"}, {})
    parts.written_schema.cache_clear()
    table = Table(store, "plan")
    assert table.read().schema.names == whole.names and table.read()["bank"].null_count == 3
    assert table.read(["bank", "sample_id"]).column_names == ["bank", "sample_id"]
    assert table.finder("unit")(1).to_pylist()[0] | {"site": None} == table.read().to_pylist()[1]
    assert next(iter(table.committed(["site"])))["site"].null_count == 3
    with pytest.raises(pa.ArrowInvalid, match="nowhere"):
        table.read(["nowhere"])
    with pytest.raises(StaleTable, match="begun by a version with other columns; go on with that version, or begin"):
        table.require({"a": "1"})


def test_every_table_names_the_verb_of_the_command_that_makes_it() -> None:
    from factory.cli import app

    assert set(records.MADE_BY) == set(records.SCHEMAS)
    assert set(records.MADE_BY.values()) <= {command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
