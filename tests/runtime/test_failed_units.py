"""Units that kill, hang, exhaust or raise, on a real Ray: the run goes on, their rows say what became of them, and a
round of retries makes just those."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from factory import line, records
from factory.models.sampler import SampleJob
from factory.models.weights import generator_digest
from factory.progress import FailedRows
from factory.recipe import GateSection, load
from factory.run import Run, read_events
from factory.runtime import cluster
from factory.runtime import synthesize as pipeline
from factory.runtime.retry import plan_failed
from factory.stages.synthesize import SynthesizeSamples

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test
KILLS, HANGS, EXHAUSTS, RAISES = 1, 2, 3, 4


class Troubled(SynthesizeSamples):
    """The stage without a gate, whose first round has a unit of each trouble."""

    def __init__(self, weights: str, adapter: Any, section: Any, gate_section: Any, gate: Any, *more: Any) -> None:
        super().__init__(weights, adapter, section, gate_section, None, *more)

    def jobs(self, rows: Sequence[dict[str, Any]]) -> list[SampleJob]:
        trouble = rows[0]["unit"] if rows[0]["round"] == 0 else 0
        if trouble == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == HANGS:
            time.sleep(3600)
        if trouble == EXHAUSTS and self.slots > 2:
            raise MemoryError
        if trouble == RAISES:
            raise KeyError("a mistake")
        return super().jobs(rows)


class TroubledUnit(pipeline.SynthesizeUnit):
    def stage(self) -> type[SynthesizeSamples]:
        return Troubled


@pytest.mark.usefixtures("ray_cluster")
def test_bad_units_cost_their_own_rows_and_retries_make_just_those(tmp_path: Path, tiny_weights: Any) -> None:
    recipe = load("smoke", [
        *tiny_weights.overrides, "plan.diagnoses=[nevus, melanoma]", "plan.skin_types=[I, V]", "plan.count=24",
        "plan.unit_rows=4", "synthesize.num_actors=1", "synthesize.max_attempts=2", "synthesize.unit_timeout_s=15",
    ])  # fmt: skip
    run, said = Run(tmp_path), list[str]()
    line.plan(run, recipe, said.append)

    def synthesized() -> None:
        digests = {"generator": generator_digest(tiny_weights.generator), "gate": ""}
        paths = {"generator": str(tiny_weights.generator), "adapter": None}
        with cluster.connect() as resources:
            pools = cluster.pools(resources, recipe)
            pipeline.synthesize(run, recipe, pools, digests, paths, nullcontext(), said.append, TroubledUnit)

    with pytest.raises(FailedRows, match="4 rows failed by an error, the first: error: KeyError: 'a mistake'; events/"):
        synthesized()
    assert "failed      12 rows: actor_died 4, error 4, timed_out 4; `factory synthesize --retry" in said[-1]
    assert run.verify() == [] and not list((tmp_path / ".attempts/samples").iterdir())
    rows = run.table("samples").read().to_pylist()
    assert [row["sample_id"] for row in rows] == run.table("plan").read(["sample_id"])["sample_id"].to_pylist()
    assert {(row["unit"], row["outcome"], row["reason"]) for row in rows} == {
        (0, "accepted", None), (KILLS, "failed", "actor_died"), (HANGS, "failed", "timed_out"),
        (EXHAUSTS, "accepted", None), (RAISES, "failed", "error"), (5, "accepted", None),
    }  # fmt: skip
    assert {row["batch_shape"] for row in rows if row["unit"] == EXHAUSTS} <= {1, 2}  # smoke has 4
    ended = [event for event in read_events(run.store) if event["event"] == "attempt_ended"]
    assert (
        sorted((event["unit"], event["reason"]) for event in ended)
        == [(HANGS, "timed_out")] * 2 + [(RAISES, "error")] * 2
    )
    assert all("in jobs" in event["text"] for event in ended)

    before = [path.read_bytes() for path in sorted((tmp_path / "samples").glob("part-*.parquet"))]
    assert plan_failed(run, recipe, said.append)
    synthesized()
    after = [path.read_bytes() for path in sorted((tmp_path / "samples").glob("part-*.parquet"))]
    assert after[:6] == before and len(after) > 6 and run.verify() == []
    again = [row for row in run.table("samples").read().to_pylist() if row["round"] == 1]
    failed = {row["sample_id"] for row in rows if row["outcome"] == records.FAILED}
    assert {row["retry_of"] for row in again} == failed and len(again) == 12
    assert {row["outcome"] for row in again} == {"accepted"}

    planned = run.table("plan").read().to_pylist()
    for row in (*rows, *again):  # what was drawn is what the stage alone draws at the shape that the row says
        if row["outcome"] == "accepted" and row["index"] % 4 == 0:
            section = recipe.synthesize.model_copy(update={"slots": row["batch_shape"]})
            alone = SynthesizeSamples(tiny_weights.generator, None, section, GateSection(), None, gpu=False)
            assert alone([planned[row["index"]]])[0]["image"] == row["image"]
