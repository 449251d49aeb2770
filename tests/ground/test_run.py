"""A run keeps its header, weights, events and tables on any store, and verifies its lineage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import factory
from factory import records, run
from factory.fingerprint import fingerprint_of
from factory.recipe import load
from factory.run import Run, read_events
from factory.storage import Store
from factory.tables import DamagedTable, Table


@pytest.fixture(params=["local", "s3"])
def a_run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return Run(tmp_path / "run" if request.param == "local" else request.getfixturevalue("s3").uri)


def weights(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def corpus(part: int) -> Any:
    rows: list[dict[str, object]] = [
        {"row_id": f"{part}-{i}", "image": records.image_struct(bytes([i]) * 5000, "x.png"), "outcome": "accepted"}
        for i in range(4)
    ]
    return records.rows_to_table("corpus", rows)


def filled(found: Run, name: str = "corpus", parents: dict[str, str] | None = None) -> Table:
    table = found.table(name)
    table.require({"a": "b"})
    for part in table.missing(2):
        table.commit(part, corpus(part) if name == "corpus" else records.rows_to_table(name, []))
    table.seal(2, {"a": "b"}, parents or {})
    return table


def test_a_table_is_committed_sealed_read_and_verified(a_run: Run) -> None:
    table = filled(a_run)
    assert table.commit(0, corpus(5)) is False
    assert table.read(["row_id"])["row_id"].to_pylist() == [f"{part}-{i}" for part in range(2) for i in range(4)]
    assert table.read()["image"][1].as_py() == {"bytes": b"\x01" * 5000, "path": "x.png"}
    assert a_run.verify() == []
    data = bytearray(a_run.store.read(table.part_path(1)))
    data[100] ^= 1
    a_run.store.replace(table.part_path(1), bytes(data))
    assert [problem[:26] for problem in a_run.verify()] == ["corpus part 1 was edited: "]


def test_tables_are_listed_parents_first_and_only_when_sealed(a_run: Run) -> None:
    filled(a_run, "plan")
    filled(a_run)
    a_run.table("captions").require({})
    assert a_run.tables() == ["corpus", "plan"]


def test_a_child_of_a_remade_parent_is_told_and_of_a_grown_one_is_not(a_run: Run) -> None:
    parent = filled(a_run)
    filled(a_run, "captions", {"corpus": parent.digest()})
    parent.commit(2, corpus(2))
    parent.seal(3, {"a": "b"}, {})
    assert a_run.verify() == []
    for path in (*a_run.store.list("corpus"), *a_run.store.list(".parts/corpus")):
        a_run.store.delete(path)
    parent.commit(0, corpus(9))
    parent.seal(1, {"a": "b"}, {})
    (problem,) = a_run.verify()
    assert problem.startswith("captions was made from corpus ")
    assert "remove captions and make it again, or restore corpus" in problem


def test_a_group_in_two_splits_is_a_leak_and_is_named(a_run: Run) -> None:
    rows: list[dict[str, object]] = [
        {"row_id": str(i), "group_id": group, "split": split, "outcome": "accepted"}
        for i, (group, split) in enumerate(
            [("g", "train"), ("g", "train"), ("h", "train"), ("h", "test"), ("i", "val")]
        )
    ]
    table = a_run.table("corpus")
    table.commit(0, records.rows_to_table("corpus", rows))
    table.seal(1, {}, {})
    (problem,) = a_run.verify()
    assert problem.startswith("corpus has group h in 2 splits")


def test_a_damaged_manifest_is_one_problem_and_stops_nothing(a_run: Run) -> None:
    filled(a_run)
    filled(a_run, "plan")
    a_run.store.replace("plan/_MANIFEST.json", b"{")
    (problem,) = a_run.verify()
    assert "_MANIFEST.json cannot be trusted" in problem


def test_the_header_holds_the_recipe_and_the_versions(a_run: Run) -> None:
    assert a_run.header() is None
    recipe = load("smoke", [])
    a_run.write_header(recipe)
    header = a_run.header()
    assert header is not None
    assert header["recipe"]["plan"]["count"] == 18
    assert header["versions"]["dermafactory"] == factory.__version__
    assert header["versions"]["torch"].startswith("2.")
    first = header["fingerprint"]
    assert a_run.write_header(load("smoke", ["plan.seed=9"]))["fingerprint"] != first
    a_run.store.replace("run.json", b"{")
    with pytest.raises(DamagedTable, match=r"run.json is not JSON .*remove it and run again"):
        a_run.header()


def test_versions_say_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LIBRARIES", ("no-such-library",))
    assert run.library_versions()["no-such-library"] == "not installed"


def test_weights_are_published_with_their_card_last_and_read_back(a_run: Run, tmp_path: Path) -> None:
    made = weights(tmp_path / "made", unet__model="w" * 1000, card_json='{"params": 5}')
    a_run.put_weights("lora-joint", made)
    assert a_run.weights() == ["lora-joint"]
    assert a_run.card("lora-joint") == {"params": 5}
    found = a_run.weights_dir("lora-joint")
    assert (found / "unet/model").read_text() == "w" * 1000
    assert a_run.weights_dir("lora-joint") == found


def test_newer_weights_replace_all_of_the_old(a_run: Run, tmp_path: Path) -> None:
    a_run.put_weights("gate", weights(tmp_path / "a", old="1", both="1", card_json='{"digest": 1}'))
    before = a_run.weights_dir("gate")
    a_run.put_weights("gate", weights(tmp_path / "b", both="2", card_json='{"digest": 2}'))
    found = a_run.weights_dir("gate")
    assert sorted(path.name for path in found.iterdir()) == ["both", "card.json"]
    assert (found / "both").read_text() == "2"
    assert before.exists()


def test_weights_without_a_card_are_not_weights(a_run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights must come with a card.json, got .*half"):
        a_run.put_weights("half", weights(tmp_path / "half", model="w"))
    a_run.store.replace("weights/torn/model", b"w")
    assert a_run.weights() == []
    with pytest.raises(ValueError, match=r"weights must be among those of .* \(none yet\), got 'torn'"):
        a_run.weights_dir("torn")
    with pytest.raises(ValueError, match=r"weights/torn must be complete, got no card.json"):
        run.get_tree(a_run.store, "weights/torn", tmp_path / "x", last="card.json")


def test_a_tree_that_another_process_fetched_first_is_kept(a_run: Run, tmp_path: Path) -> None:
    a_run.put_weights("gate", weights(tmp_path / "a", card_json="{}"))
    run.get_tree(a_run.store, "weights/gate", tmp_path / "copy", last="card.json")
    run.get_tree(a_run.store, "weights/gate", tmp_path / "copy", last="card.json")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("tmp")) == ["tmp"]
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/other").touch()
    with pytest.raises(OSError, match="not empty"):
        run.get_tree(a_run.store, "weights/gate", tmp_path / "occupied", last="card.json")


def test_events_are_kept_per_driver_and_a_torn_line_is_skipped(a_run: Run) -> None:
    with a_run.events() as first:
        first.write("started", stage="plan", path=Path("x"))
    with pytest.raises(KeyError), a_run.events() as second:
        second.write("started")
        raise KeyError("why")
    a_run.store.replace("events/torn.jsonl", b'{"event": "fine"}\n{"event": "to')
    names = sorted(str(event["event"]) for event in read_events(a_run.store))
    assert names == ["fine", "started", "started", "stopped"]
    assert len(a_run.store.list("events")) == 3
    assert next(iter(json.loads(line) for line in a_run.store.read(first.path).splitlines()))["path"] == "x"


def test_events_on_an_object_store_are_seen_before_the_end(s3: Store) -> None:
    events = run.Events(s3, flush_s=0.0)
    events.write("one")
    events.write("two")
    assert [event["event"] for event in read_events(s3)] == ["one", "two"]


def test_a_run_is_locked_by_its_store(a_run: Run) -> None:
    with a_run.lock(interval_s=0.1, stale_s=1.0):
        assert a_run.store.exists("_LOCK.json")
    assert not a_run.store.exists("_LOCK.json")


def test_a_plan_grown_by_a_round_does_not_refuse_the_samples(a_run: Run) -> None:
    plan = filled(a_run, "plan")
    before = fingerprint_of(load(None), "samples", {"plan": plan.origin()}, {})
    plan.commit(2, records.rows_to_table("plan", []))
    plan.seal(3, {"a": "b"}, {})
    assert fingerprint_of(load(None), "samples", {"plan": plan.origin()}, {}) == before


def test_the_ground_imports_nothing_heavy() -> None:
    code = (
        "import sys, factory.run, factory.recipe_yaml; "
        "print(sorted({'torch', 'ray', 's3fs', 'diffusers', 'timm', 'transformers', 'fsspec'} & set(sys.modules)))"
    )
    root = Path(factory.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert found.stdout.strip() == "[]"
