"""How full the sampler keeps its slots: the share of the rows it pays for that carry a sample.

A generator that costs nothing (`tests/models/costless.py`), a thousand samples of 20 calls, of which a share is
rejected at random, nine of ten after call 7 and the others at the end. Slots that refill at once stand empty only at
the very end; where a sampler drains between units, they stand empty at the end of each. Beside it `fixed_batch`, the
share of a fixed batch's rows that carry a sample which is still wanted, for no sample can leave it; and what the
sampler's own work costs, in microseconds a call of all slots.

    python benchmarks/slot_occupancy.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factory.models.sampler import SampleJob, Sampler

ROOT = Path(__file__).resolve().parent
RESULT = ROOT / "results" / "slot_occupancy.json"
CALLS, CHECKPOINT, EARLY = 20, 0.3, 0.9
GOAL = 0.97

sys.path.insert(0, str(ROOT.parent / "tests" / "models"))
from costless import Costless, GateByName  # type: ignore[import-not-found] # noqa: E402


def jobs_of(denoiser: Any, samples: int, unit_rows: int) -> Iterator[SampleJob]:
    condition = denoiser.condition([""])[0]
    for number in range(samples):
        yield SampleJob(f"{number}", number, condition, 1.0, CALLS, unit=number // unit_rows)


def measure(samples: int, slots: int, rejected: float, unit_rows: int, drain: bool) -> dict[str, Any]:
    denoiser = Costless()
    sampler = Sampler(
        denoiser, width=1, height=1, slots=slots, gate=GateByName(rejected, EARLY), checkpoints=(CHECKPOINT,),
        decode="none", drain=drain,
    )  # fmt: skip
    started = time.process_time()
    drawn = sum(1 for _ in sampler.run(jobs_of(denoiser, samples, unit_rows)))
    spent, counters = time.process_time() - started, sampler.counters
    assert drawn == samples
    return {
        "slots": slots, "rejected": rejected, "drain": drain, "unit_rows": unit_rows if drain else None,
        "occupancy": round(counters.occupancy, 4), "fixed_batch": round(counters.rows_run / (samples * CALLS), 4),
        "calls": counters.calls, "us_per_call": round(1e6 * spent / counters.calls),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--unit-rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    runs = [
        measure(asked.samples, slots, rejected, asked.unit_rows, drain)
        for slots in (8, 16, 32, 64)
        for rejected in (0.0, 0.35, 0.7)
        for drain in (False, True)
    ]
    result = {"samples": asked.samples, "calls_per_sample": CALLS, "goal": GOAL, "runs": runs}
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    for run in runs:
        print(run)


if __name__ == "__main__":
    main()
