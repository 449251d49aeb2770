"""Several nodes of one machine: a lost node, a cluster of another size, one that grows and shrinks; the numbers told.

Nodes are Ray's own (`runtime/nodes.py`), the pipeline is the real one, and only the network sleeps.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factory.run import Run
from factory.runtime import cluster, scaling
from factory.runtime.nodes import LocalNodes
from factory.runtime.scaling import Point, Setting, Span

sys.path.insert(0, str(Path(__file__).parent))
from autoscaling import growing_head, until

SETTING = Setting(count=48, unit_rows=4, call_s=0.3, calls=6, slots=4, nodes=(2,))


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """These tests have Rays of their own, so the session's is ended; what comes after them needs none."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate") / "gate"
    scaling.save_gate(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(gate: Path) -> Any:
    return scaling.recipe_of(SETTING, gate)


# ------------------------------------------------------------------------------------------------------ growing


def test_nodes_come_for_the_work_and_go_when_it_is_done(
    gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without a GPU: the pool asks for as many actors as the cluster may grow to, and nothing else asks."""
    import ray

    wanted = scaling.recipe_of(SETTING, gate)
    with growing_head(most=2, idle_minutes=0.1) as (address, config):
        cluster.quiet()
        ray.init(address, log_to_driver=False)
        try:
            cluster.settle()
            assert (grown(), cluster.resources().gpus) == (0, 0)  # Ray does not say that it may grow
            monkeypatch.setenv(cluster.CLUSTER, str(config))
            assert cluster.resources().gpus == 2
            run, seen, over = scaling.planned(tmp_path / "grown", wanted), set(), threading.Event()
            watch = threading.Thread(target=lambda: watched(seen, over), daemon=True)
            watch.start()
            scaling.carried_out(run, wanted, SETTING.call_s, gate)
            over.set()
            watch.join()
            assert max(seen) == 2
            assert sum(run.table("samples").counts().values()) == SETTING.count
            until(lambda: grown() == 0, "idle nodes must be given back")
        finally:
            ray.shutdown()


def grown() -> int:
    """Nodes beside the head."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) - 1


def watched(seen: set[int], over: threading.Event) -> None:
    while not over.wait(0.2):
        seen.add(grown())


# ------------------------------------------------------------------------------------------------------ two nodes


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[LocalNodes]:
    with LocalNodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def calm(two_nodes: LocalNodes, wanted: Any, gate: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The plan on two nodes, undisturbed."""
    run = scaling.planned(tmp_path_factory.mktemp("runs") / "calm", wanted)
    started, over = scaling.carried_out(run, wanted, SETTING.call_s, gate)
    point = scaling.point_of(run, 2, started, over, SETTING.unit_rows)
    assert point.samples == SETTING.count and 0 < point.all_busy_s < point.seconds
    return run


def test_two_nodes_of_one_gpu_each_get_an_actor_each(calm: Run) -> None:
    assert len(scaling.spans_of(calm)) == 2
    counts = calm.table("samples").counts()
    assert counts["accepted"] > 0 and counts["rejected"] > 0 and sum(counts.values()) == SETTING.count


def test_a_cluster_of_another_size_goes_on_to_the_same_bytes(
    two_nodes: LocalNodes, calm: Run, wanted: Any, gate: Path, tmp_path: Path
) -> None:
    """Two thirds of the parts are taken away, as if the first cluster had been stopped; one node makes the rest."""
    shutil.copytree(calm.uri, tmp_path / "resumed")
    run = Run(str(tmp_path / "resumed"))
    table = run.table("samples")
    parts = [Path(run.uri) / table.part_path(info.part) for info in table.sealed().parts]
    (Path(run.uri) / "samples/_MANIFEST.json").unlink()
    shutil.rmtree(Path(run.uri) / "events")
    for part in parts[::3] + parts[1::3]:
        part.unlink()
    kept = {part: part.stat().st_mtime_ns for part in parts[2::3]}
    smaller = cluster.Pools(synthesize=1, gate_replicas=1, tasks=1, num_threads=1, gpus_per_actor=1.0)
    paths, digests = {"generator": "0.05", "adapter": None}, dict.fromkeys(("generator", "gate"), scaling.DIGEST)
    with scaling.gate_up(run, wanted, gate, smaller):
        scaling.synthesize(
            run, wanted, smaller, digests, paths, scaling.nullcontext(), lambda text: None, scaling.SleepingUnit
        )
    (actor,) = scaling.spans_of(run).values()
    assert len(actor) == len(parts) - len(kept)
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert scaling.digests_of(run) == scaling.digests_of(calm)


def test_a_node_that_is_lost_without_a_word_costs_what_it_held_and_nothing_else(
    two_nodes: LocalNodes, calm: Run, wanted: Any, gate: Path, tmp_path: Path
) -> None:
    """No node comes in its place: what it held must be made by the one that is left."""
    lost = scaling.with_a_loss(two_nodes, scaling.planned(tmp_path / "lost", wanted), calm, wanted, SETTING, gate)
    assert lost["killed_s"] > 0 and len(two_nodes) == 1
    assert lost["counts_add_up"] and lost["once_each"] and lost["same_bytes"]
    assert lost["accepted"] + lost["rejected"] + lost["failed"] == lost["planned"] == SETTING.count
    # What the lost actor held, and what the other held when it was told to begin again.
    assert 0 < lost["units_redone"] <= 2 * 2
    assert Run(str(tmp_path / "lost")).verify() == []


# ------------------------------------------------------------------------------------------------------ the numbers


def test_a_rate_is_counted_from_the_first_unit_of_each_to_the_last_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two actors, units of 10 samples. Each has ended one at 4, and a begins its last at 6: half of its second unit is
    made in that time and all of its third, and two thirds of b's second."""
    spans = {
        "a": [Span(0, 1, 3), Span(1, 3, 5), Span(4, 5, 6), Span(6, 6, 7)],
        "b": [Span(2, 2.5, 4), Span(3, 4, 7), Span(5, 7, 8)],
    }
    monkeypatch.setattr(scaling, "spans_of", lambda run: spans)
    rows = type("Run", (), {"table": lambda self, name: type("Table", (), {"read": lambda self, names: range(70)})()})()
    point = scaling.point_of(rows, nodes=2, started=0.0, over=10.0, rows=10)
    assert (point.all_busy_s, point.seconds, point.rate) == (2.5, 10.0, 7.0)
    assert point.steady_rate == pytest.approx(10 * (0.5 + 1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="every node must get a unit, got 2 busy of 3"):
        scaling.point_of(rows, nodes=3, started=0.0, over=10.0, rows=10)


def test_efficiency_is_a_nodes_rate_against_the_smallest_runs() -> None:
    one = Point(1, 40, 2.0, 20.0, 2.0, 2.5)
    found = scaling.compared([one, Point(4, 40, 3.0, 8.0, 5.0, 9.0)])
    assert (found[0].efficiency, found[0].steady_efficiency) == (1.0, 1.0)
    assert found[1].efficiency == pytest.approx(5.0 / 4 / 2.0)
    assert found[1].steady_efficiency == pytest.approx(9.0 / 4 / 2.5)


def test_what_was_begun_and_never_ended_was_made_again(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    with run.events() as events:
        for unit, kind, at in [(0, scaling.BEGUN, 1.0), (0, scaling.ENDED, 2.0), (1, scaling.BEGUN, 2.0)]:
            events.write(kind, unit=unit, actor="a", node="n", at=at)
    assert scaling.spans_of(run) == {"a": [Span(0, 1.0, 2.0, "n"), Span(1, 2.0, None, "n")]}


def test_a_network_cannot_sleep_less_than_nothing() -> None:
    with pytest.raises(ValueError, match="call_s must be 0 or more seconds, got -1"):
        scaling.SleepingDenoiser(-1)


def test_nodes_are_not_started_beside_a_ray_that_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="must be started where no Ray is connected"), LocalNodes(1):
        time.sleep(0)
