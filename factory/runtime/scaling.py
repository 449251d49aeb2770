"""How synthesis scales: the same plan on one, two and four nodes of this machine, and once more with a node killed.

The pipeline is the real one: plan, actors, sampler, the gate on Ray Serve, commits. Only the network sleeps instead of
computing, so that what several actors lose is the factory's doing and not the two cores' that they share. Each actor
writes when it began and ended a unit into the run's events; all that is told here is counted from those.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from factory import recipe, records
from factory.models.sleeping import DIGEST, SleepingDenoiser, save_gate
from factory.recipe import Recipe
from factory.run import Run, read_events
from factory.runtime import cluster, plan, serve
from factory.runtime.attempts import Attempt
from factory.runtime.nodes import LocalNodes
from factory.runtime.synthesize import SynthesizeUnit, synthesize
from factory.stages.synthesize import SynthesizeSamples

Echo = Callable[[str], None]
BEGUN, ENDED = "unit_begun", "unit_ended"
GOAL = 0.95  # efficiency of N actors against one
LOOK_S = 0.05
NOTICE_S = 5.0  # between the word that a machine will be taken away and its end


@dataclass(frozen=True)
class Setting:
    """What is run. count: samples; unit_rows of them make a unit; call_s: seconds a call of the network takes; calls:
    of a sample; slots: samples in a batch; nodes: on how many, in turn, the last of which is also where one is lost."""

    count: int = 576
    unit_rows: int = 12
    call_s: float = 0.2
    calls: int = 10
    slots: int = 8
    nodes: tuple[int, ...] = (1, 2, 4)

    @property
    def units(self) -> int:
        return -(-self.count // self.unit_rows)


class SleepingSamples(SynthesizeSamples):
    """The stage with a network that sleeps; its weights are how long, in seconds."""

    def load_denoiser(self, weights: str | Path, adapter: str | Path | None) -> SleepingDenoiser:  # type: ignore[override]
        return SleepingDenoiser(float(str(weights)))


class SleepingUnit(SynthesizeUnit):
    """The actor of a node whose GPU is one by name. It writes down when it works on what."""

    def __init__(self, run_uri: str, *arguments: Any) -> None:
        import ray

        recipe, weights, adapter, gate_digest, _gpu, drive, prompts = arguments
        super().__init__(run_uri, recipe, weights, adapter, gate_digest, False, drive, prompts)  # it draws on no GPU
        self.events, self.node = Run(run_uri).events(), ray.get_runtime_context().get_node_id()

    def stage(self) -> type[SynthesizeSamples]:
        return SleepingSamples

    def begin(self, unit: int) -> Attempt:
        self.events.write(BEGUN, unit=unit, actor=self.events.path, node=self.node, at=time.time())
        return super().begin(unit)

    def made(self, unit: int) -> tuple[pa.Table, str]:
        found = super().made(unit)
        self.events.write(ENDED, unit=unit, actor=self.events.path, at=time.time())
        return found


def recipe_of(setting: Setting, gate: Path) -> Recipe:
    """A gate that refuses masks of more than 0.6 of the image, a quarter of them, after half of the calls."""
    return recipe.load(
        "smoke",
        [
            f"plan.count={setting.count}", f"plan.unit_rows={setting.unit_rows}", "plan.audit_min=8",
            f"plan.num_inference_steps={setting.calls}", f"synthesize.slots={setting.slots}",
            "synthesize.dtype=float32", "synthesize.keep_rejected=none", f"gate.weights={gate}",
            "gate.checkpoints=[0.5]", "gate.min_iou=0", "gate.min_area=0", "gate.max_area=0.6", "gate.min_solidity=0",
        ],
    )  # fmt: skip


def planned(uri: Path, wanted: Recipe) -> Run:
    """A run with its plan and nothing else."""
    run = Run(str(uri))
    run.write_header(wanted)
    plan.plan(run, wanted, lambda text: None)
    return run


def carried_out(run: Run, wanted: Recipe, call_s: float, gate: Path) -> tuple[float, float]:
    """The plan of a run on the nodes that are there; from when to when, in seconds of the clock. The gate is up
    before."""
    pools = cluster.pools(cluster.resources(), wanted)
    digests = dict.fromkeys(("generator", "gate"), DIGEST)
    with gate_up(run, wanted, gate, pools):
        started = time.time()
        paths = {"generator": str(call_s), "adapter": None}
        synthesize(run, wanted, pools, digests, paths, nullcontext(), lambda text: None, SleepingUnit)
        return started, time.time()


@contextmanager
def gate_up(run: Run, wanted: Recipe, gate: Path, pools: cluster.Pools) -> Iterator[None]:
    """The run's gate answers."""
    serve.start_gate(run.uri, str(gate), DIGEST, wanted.gate, pools)
    try:
        yield
    finally:
        serve.stop_gate(run.uri)


# ------------------------------------------------------------------------------------------------------ what was seen


@dataclass
class Span:
    """One unit on one actor, which is on `node`; `ended` is None where the actor did not live to see it."""

    unit: int
    begun: float
    ended: float | None = None
    node: str = ""


def spans_of(run: Run) -> dict[str, list[Span]]:
    """What each actor of a run worked on, in the order of the beginnings; it begins a unit while another ends."""
    found: dict[str, list[Span]] = {}
    for event in read_events(run.store):
        if event["event"] == BEGUN:
            found.setdefault(event["actor"], []).append(Span(event["unit"], event["at"], node=event["node"]))
        elif event["event"] == ENDED:
            next(span for span in reversed(found[event["actor"]]) if span.unit == event["unit"]).ended = event["at"]
    return found


@dataclass(frozen=True)
class Point:
    """One run on so many nodes. Rates are samples per second; all_busy_s is from the start to when every actor has
    begun its first unit; steady is counted from when each has ended one, by when all processes have started, to when
    one begins its last, after which it has nothing to fill its slots with."""

    nodes: int
    samples: int
    all_busy_s: float
    seconds: float
    rate: float
    steady_rate: float
    efficiency: float = field(default=1.0)
    steady_efficiency: float = field(default=1.0)


def point_of(run: Run, nodes: int, started: float, over: float, rows: int) -> Point:
    """Counts an undisturbed run. rows: of a unit. A run on which an actor stayed without a unit is a ValueError."""
    actors = list(spans_of(run).values())
    if len(actors) != nodes:
        raise ValueError(f"every node must get a unit, got {len(actors)} busy of {nodes}; plan more units.")
    busy = max(spans[0].begun for spans in actors)
    warm = max(min(span.ended or over for span in spans) for spans in actors)
    idle = min(max(span.begun for span in spans) for spans in actors)
    share = sum(_within(span, warm, idle) for spans in actors for span in spans)
    samples = len(run.table("samples").read(["sample_id"]))
    steady = share * rows / max(1e-9, idle - warm)
    return Point(nodes, samples, busy - started, over - started, samples / (over - started), steady)


def _within(span: Span, begin: float, end: float) -> float:
    """The share of a unit that was made in a window."""
    ended = span.ended if span.ended is not None else end
    return max(0.0, min(ended, end) - max(span.begun, begin)) / max(1e-9, ended - span.begun)


def compared(points: Sequence[Point]) -> list[Point]:
    """The points with their efficiency against the first, per node."""
    first = points[0]
    return [
        Point(
            **asdict(point)
            | {
                "efficiency": point.rate / point.nodes / (first.rate / first.nodes),
                "steady_efficiency": point.steady_rate / point.nodes / (first.steady_rate / first.nodes),
            }
        )
        for point in points
    ]


def digests_of(run: Run) -> list[str]:
    """SHA-256 of every committed part of the samples."""
    table = run.table("samples")
    paths = [table.part_path(info.part) for info in table.sealed().parts]
    return [hashlib.sha256(run.store.read(path)).hexdigest() for path in paths]


def loss_of(run: Run, calm: Run, rows: int) -> dict[str, Any]:
    """What a run with a lost node came to, beside the undisturbed run of the same plan."""
    begun = Counter(span.unit for spans in spans_of(run).values() for span in spans)
    counts, made = run.table("samples").counts(), run.table("samples").read(["sample_id"])["sample_id"].to_pylist()
    wanted = run.table("plan").read(["sample_id"])["sample_id"].to_pylist()
    redone = sum(begun.values()) - len(begun)
    return {
        "planned": len(wanted), **{outcome: counts.get(outcome, 0) for outcome in records.OUTCOMES},
        "units_redone": redone, "samples_redone": redone * rows, "units": len(begun),
        "counts_add_up": sum(counts.values()) == len(wanted),
        "once_each": len(set(made)) == len(made) and sorted(made) == sorted(wanted),
        "same_bytes": digests_of(run) == digests_of(calm),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the runs


class LossOfANode(threading.Thread):
    """Kills a node in the first half of a unit of its own, once `after` units are there, so that there is one to lose.
    unit_s: how long a unit takes at least; notice_s: how long before that Ray is told, as a cloud tells of a spot
    machine, or 0: not at all."""

    def __init__(self, nodes: LocalNodes, run: Run, after: int, unit_s: float, notice_s: float = 0.0) -> None:
        super().__init__(name="loss", daemon=True)
        self.nodes, self.run_, self.after, self.unit_s, self.notice_s = nodes, run, after, unit_s, notice_s
        self.over, self.killed_at = threading.Event(), 0.0

    def run(self) -> None:
        while not self.over.wait(LOOK_S):
            if len(self.run_.table("samples").parts()) >= self.after and self._at_work():
                if self.notice_s:
                    self.nodes.announce()
                    self.over.wait(self.notice_s)
                self.killed_at = time.time()
                self.nodes.lose()
                return

    def _at_work(self) -> bool:
        """Whether the last node has lately begun a unit and not ended it."""
        node, lately = self.nodes.node_id(), time.time() - self.unit_s / 2
        spans = [span for spans in spans_of(self.run_).values() for span in spans if span.node == node]
        return any(span.ended is None and span.begun > lately for span in spans)


def measure(folder: Path, setting: Setting, echo: Echo = print) -> dict[str, Any]:
    """The curve and the loss. Runs are made below `folder`, on nodes of this machine that are gone afterwards."""
    gate = folder / "gate"
    save_gate(gate)
    wanted = recipe_of(setting, gate)
    points: list[Point] = []
    for count in setting.nodes:
        with LocalNodes(count) as nodes:
            run = planned(folder / f"on-{count}", wanted)
            started, over = carried_out(run, wanted, setting.call_s, gate)
            points.append(point_of(run, count, started, over, setting.unit_rows))
            echo(told(compared(points)[-1]))
            if count == setting.nodes[-1]:
                loss = with_a_loss(nodes, planned(folder / "lost", wanted), run, wanted, setting, gate)
                echo(told_loss(loss))
                nodes.grow_to(count)
                warned = with_a_loss(nodes, planned(folder / "warned", wanted), run, wanted, setting, gate, NOTICE_S)
                echo(told_loss(warned))
    found = {"points": [asdict(point) for point in compared(points)], "loss": loss, "announced_loss": warned}
    return {"setting": asdict(setting), **found}


def with_a_loss(
    nodes: LocalNodes, run: Run, calm: Run, wanted: Recipe, setting: Setting, gate: Path, notice_s: float = 0.0
) -> dict[str, Any]:
    """The plan of `run` on nodes of which one is killed in the middle. calm: the same plan, undisturbed."""
    count, after = len(nodes), max(1, setting.units // 3)
    loss = LossOfANode(nodes, run, after, setting.call_s * setting.calls, notice_s)
    loss.start()
    try:
        started, over = carried_out(run, wanted, setting.call_s, gate)
    finally:
        loss.over.set()
        loss.join()
    found = {"nodes": count, "notice_s": notice_s, "killed_s": loss.killed_at - started, "seconds": over - started}
    return found | loss_of(run, calm, setting.unit_rows)


def told(point: Point) -> str:
    """A point of the curve in one line."""
    return (
        f"{point.nodes} node(s)   {point.samples} samples in {point.seconds:.1f} s, all busy after "
        f"{point.all_busy_s:.1f} s; {point.steady_rate:.1f} samples/s then, efficiency {point.steady_efficiency:.3f} "
        f"(end to end {point.rate:.1f} samples/s, {point.efficiency:.3f})"
    )


def told_loss(loss: dict[str, Any]) -> str:
    """The run with a node killed, in one line."""
    outcomes = " + ".join(f"{loss[outcome]} {outcome}" for outcome in records.OUTCOMES)
    return (
        f"1 of {loss['nodes']} lost  {'announced, ' if loss['notice_s'] else ''}"
        f"after {loss['killed_s']:.1f} s: {loss['units_redone']} of {loss['units']} units redone "
        f"({loss['samples_redone']} samples), {loss['planned']} planned = {outcomes}; "
        f"{'no id twice and none missing' if loss['once_each'] else 'ARE NOT ONCE EACH'}, bytes "
        f"{'equal to' if loss['same_bytes'] else 'DIFFERENT FROM'} the undisturbed run's; {loss['seconds']:.1f} s"
    )
