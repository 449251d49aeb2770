"""Ingest of thousands of images: memory stays flat, nothing is spilled, no row is lost. And how that is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from factory.run import Run

ROOT = Path(__file__).resolve().parent.parent
ROWS, SIZE = 5_000, 64  # px; what is held per row is the same at any size, but for the pixels themselves
TIMEOUT_S = 900  # a busy machine; it takes a tenth of that


def test_thousands_of_images_leave_the_driver_flat_spill_nothing_and_are_all_accounted_for(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/corpus_scale.py", "--count", ROWS, "--size", SIZE, "--every", 1, "--keep"]
    done = subprocess.run(
        [*map(str, command), "--work", str(tmp_path), "--out", str(tmp_path / "result.json")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(result["goals"].values()), result
    assert not result["resumed"]
    assert result["object_store"]["samples"] > 10  # so that no spilling was looked for, not only not seen
    # A driver that held its rows would hold these: they are stored twice, and it has seen both.
    assert result["driver_mib"]["growth"] < result["bytes"]["intake"] / 2**20 / 2

    run = Run(tmp_path / f"corpus_scale-{ROWS}/run")
    identifiers = run.table("corpus").read(["row_id"])["row_id"].to_pylist()
    assert len(identifiers) == len(set(identifiers)) == ROWS
    assert identifiers == run.table("intake").read(["row_id"])["row_id"].to_pylist()
    assert run.verify() == []


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import ingest_phases

    return ingest_phases


@pytest.fixture
def scale(phases: ModuleType) -> ModuleType:
    import corpus_scale

    return corpus_scale


def sealed(run: Path, table: str, commits: list[tuple[float, int]], at: float) -> None:
    """A table as the clock sees it: parts of so many rows, committed at these times, and a manifest."""
    (run / table).mkdir(parents=True)
    for part, (time, _) in enumerate(commits):
        file = run / table / f"part-{part:06d}.parquet"
        file.write_bytes(b"x" * 10)
        os.utime(file, (time, time))
    parts = [{"part": part, "rows": rows} for part, (_, rows) in enumerate(commits)]
    total = sum(rows for _, rows in commits)
    manifest = run / table / "_MANIFEST.json"
    manifest.write_text(json.dumps({"parts": parts, "rows": total, "outcomes": {"accepted": total}}))
    os.utime(manifest, (at, at))


@pytest.fixture
def paused(tmp_path: Path) -> Path:
    """Begun at 100; stopped after its second part at 125 and gone on with at 200; done at 260."""
    sealed(tmp_path, "listing", [(105, 40)], at=105)
    sealed(tmp_path, "intake", [(115, 10), (125, 10), (225, 10), (235, 10)], at=235)
    sealed(tmp_path, "copies", [(245, 0)], at=245)
    sealed(tmp_path, "corpus", [(246, 10), (248, 10), (250, 10), (252, 10)], at=252)
    return tmp_path


def looked(time: float, phase: str, parts: int, rss_mib: int) -> dict[str, object]:
    return {
        "time": time, "cpu_s": time, "phase": phase, "parts": {"intake": parts, "corpus": 0},
        "driver_rss": rss_mib * 2**20, "tree_rss": 900 * 2**20,
        "largest_rss": 300 * 2**20, "largest": "ray::IDLE", "processes": 9,
    }  # fmt: skip


def test_the_pause_of_a_resumed_run_is_not_counted_and_is_told(scale: ModuleType, paused: Path) -> None:
    from factory.recipe import load

    recipe = load(None, ["corpus.unit_rows=10"])
    noted = [
        {"driver_started": 100}, looked(110, "intake", 0, 200), looked(120, "intake", 1, 210),
        {"driver_started": 200}, looked(230, "intake", 3, 230), looked(259, "end", 4, 220),
        {"driver_ended": 260, "status": 0},
    ]  # fmt: skip
    assert scale.idle_spans(noted, paused) == [(125, 200)]
    result = scale.result_of(paused, noted, recipe, 40)
    assert result["resumed"] and result["drivers"] == 2
    assert result["wall_s"] == 260 - 100 - 75
    assert result["phases_s"] == {"start": 5, "first_part": 10, "intake": 45, "copies": 10, "settle": 7, "end": 8}
    assert result["driver_mib"]["max"] == 230
    assert result["driver_mib"]["growth"] == pytest.approx(20)  # 210 MiB at 10 rows, 230 at 30
    assert result["goals"] == {
        "driver_below_1536_mib": True, "driver_flat": True, "every_row_accounted_for": True,
        "nothing_spilled": False,  # nobody asked Ray, so it is not known
    }  # fmt: skip


def test_a_steady_rate_leaves_out_what_the_actors_did_ahead_of_the_first_commit(phases: ModuleType) -> None:
    burst = [(50.0, 10), (50.1, 10), (50.2, 10)]
    steady = [(51.0 + k, 10) for k in range(17)]
    assert phases.steady_rate(burst + steady) == pytest.approx(10)


def test_cost_windows_share_all_rows_after_the_first_part(phases: ModuleType) -> None:
    done = [(float(k), 10) for k in range(51)] + [(50.0 + 2 * k, 10) for k in range(1, 51)]
    windows = phases.cost_windows(done, 500)
    assert [window["rows"] for window in windows] == [500, 500]
    assert [window["ms_per_row"] for window in windows] == [100, 200]


def test_two_runs_are_compared_by_what_an_image_costs(scale: ModuleType) -> None:
    small = {
        "count": 50_000, "size": 128, "ms_per_image": 20.0, "ms_per_image_by_phase": {"intake": 15.0, "copies": 5.0},
        "resumed": False, "goals": {"nothing_spilled": True}, "driver_mib": {"max": 300.0},
    }  # fmt: skip
    large = small | {
        "count": 500_000, "ms_per_image": 25.0, "ms_per_image_by_phase": {"intake": 15.0, "copies": 10.0},
        "resumed": True, "driver_mib": {"max": 900.0},
    }  # fmt: skip
    result = scale.compared(small, large)
    assert result["ratio"] == 1.25 and result["ratio_by_phase"] == {"intake": 1, "copies": 2}
    assert result["driver_max_mib"] == {50_000: 300, 500_000: 900}
    assert result["resumed"] == {50_000: False, 500_000: True}
    assert result["goals"] == {
        "ratio_at_most_1.2": False, "nothing_spilled_at_50000": True, "nothing_spilled_at_500000": True,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="must have a smaller and a larger run of one size"):
        scale.compared(large, small)


def test_a_run_that_would_fill_the_disk_is_refused(phases: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs 1048576.0 GiB .* free some, or give a larger disk with --work"):
        phases.require_disk(tmp_path, 2**50, "500000 images")
