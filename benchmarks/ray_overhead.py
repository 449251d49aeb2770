"""What Ray costs: samples per second of the real pipeline when a sample itself costs next to nothing.

Counted from the first committed unit on; what comes before it is the start of the actors, told as `first_unit_s`.
The generator is free (see `free.py`), so what is left is the factory's own work: reading the plan, the sampler's loop,
the gate, encoding pixels, and on Ray the actors, the handle to the gate, moving units and committing parts. The
ceiling is the same stage, the same gate and the same commits in one process and one loop without Ray, in the same run.

    python benchmarks/ray_overhead.py --count 2048 --unit-rows 256
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import free
import torch
from free import DIGEST, FreeUnit, SynthesizeFree

from factory import line, records
from factory.models.sleeping import save_gate
from factory.recipe import Recipe, load
from factory.run import Run
from factory.runtime import cluster, serve
from factory.runtime.synthesize import synthesize
from factory.stages.score import LocalGate, ScoreSamples

SIZE, CALLS = 64, 2
RESULT = Path(__file__).parent / "results" / "ray_overhead.json"


def recipe_of(count: int, unit_rows: int, actors: int, gate: Path) -> Recipe:
    """Everything is accepted, so every sample is encoded and written: the most that a sample can cost."""
    return load(
        "smoke",
        [
            f"plan.count={count}", f"plan.unit_rows={unit_rows}", f"plan.size={SIZE}",
            f"plan.num_inference_steps={CALLS}", f"synthesize.num_actors={actors}", "synthesize.slots=64",
            f"gate.weights={gate}", "gate.checkpoints=[]",
            "gate.min_iou=0", "gate.min_area=0", "gate.max_area=1", "gate.min_solidity=0",
        ],
    )  # fmt: skip


def planned(uri: Path, recipe: Recipe) -> Run:
    run = Run(uri)
    line.plan(run, recipe, lambda text: None)
    return run


def on_ray(run: Run, recipe: Recipe, gate: Path) -> tuple[float, float]:
    """Seconds from asking for the first unit to the sealed table, and to the first part: actors start in these.
    Cluster and gate are up before."""
    pools = cluster.pools(cluster.Resources(os.cpu_count() or 1), recipe)
    serve.start_gate(run.uri, str(gate), DIGEST, recipe.gate, pools)
    started, clock = time.perf_counter(), time.time()
    digests, paths = dict.fromkeys(("generator", "gate"), DIGEST), {"generator": "", "adapter": None}
    synthesize(run, recipe, pools, digests, paths, nullcontext(), lambda text: None, FreeUnit)
    spent = time.perf_counter() - started
    serve.stop_gate(run.uri)
    return spent, min(part.stat().st_mtime for part in (Path(run.uri) / "samples").glob("part-*")) - clock


def in_one_process(run: Run, recipe: Recipe, gate: Path) -> float:
    """The same units through the same stage, gate and commit, one after the other."""
    judge = LocalGate(ScoreSamples(gate, DIGEST, recipe.gate))
    stage = SynthesizeFree("", None, recipe.synthesize, recipe.gate, judge, DIGEST)
    plan, table = run.table("plan"), run.table("samples")
    started = time.perf_counter()
    rows = plan.read().to_pylist()
    size = recipe.plan.unit_rows or len(rows)
    units = [rows[start : start + size] for start in range(0, len(rows), size)]
    for number, unit in enumerate(units):
        table.commit(number, records.rows_to_table("samples", stage(unit)))
    table.seal(len(units), {"stage": "free"}, {})
    return time.perf_counter() - started


def measure(count: int, unit_rows: int, actors: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    gate = folder / "gate"
    save_gate(gate)
    recipe = recipe_of(count, unit_rows, actors, gate)
    small = recipe_of(2 * unit_rows, unit_rows, actors, gate)
    in_one_process(planned(folder / "warm", small), small, gate)
    alone = in_one_process(planned(folder / "alone", recipe), recipe, gate)
    with cluster.connect():
        on_ray(planned(folder / "warm-ray", small), small, gate)
        spread, first = on_ray(planned(folder / "ray", recipe), recipe, gate)
    same = Run(folder / "ray").table("samples").read() == Run(folder / "alone").table("samples").read()
    steady, ceiling = (count - unit_rows) / (spread - first), count / alone
    return {
        "samples_per_s": round(steady, 1), "ceiling": round(ceiling, 1), "ratio": round(steady / ceiling, 4),
        "first_unit_s": round(first, 2), "samples": count, "unit_rows": unit_rows, "size": SIZE,
        "calls_per_sample": CALLS, "actors": actors, "cpus": os.cpu_count(), "results_equal": same,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--unit-rows", type=int, default=256)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    wanted = parser.parse_args()
    free.for_workers()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(wanted.count, wanted.unit_rows, wanted.actors, Path(folder))
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['samples_per_s']} samples/s on Ray at {SIZE} px in units of {wanted.unit_rows}; "
        f"{result['ceiling']} in one loop without it ({100 * result['ratio']:.0f}%); "
        f"the first unit took {result['first_unit_s']} s"
    )


if __name__ == "__main__":
    main()
