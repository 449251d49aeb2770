"""The pipelines on a real Ray: every planned row comes back once, with an outcome, and with the same bytes."""

from __future__ import annotations

import hashlib
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from factory import images, line, records
from factory.recipe import Recipe, load
from factory.run import Run
from factory.tables import StaleTable, UnsealedTable

pytestmark = pytest.mark.usefixtures("ray_cluster")

LENIENT = ["gate.min_iou=0", "gate.min_area=0", "gate.max_area=1", "gate.min_solidity=0", "gate.shift_tolerance=0"]


def drive(uri: Path, recipe: Recipe, step: str) -> list[str]:
    """One step of the line under the run's lock; what it said."""
    said: list[str] = []
    with line.driving(str(uri), recipe, step) as run:
        getattr(line, step)(run, recipe, said.append)
    return said


def part_bytes(uri: Path, table: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((uri / table).glob("part-*.parquet"))]


def stamps(uri: Path) -> dict[str, tuple[int, str]]:
    """Modification time and SHA-256 of every part of every table."""
    return {
        str(path.relative_to(uri)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(uri.rglob("part-*.parquet"))
    }


def rows_of(uri: Path, table: str) -> list[dict[str, Any]]:
    return Run(uri).table(table).read().to_pylist()


@pytest.fixture(scope="module")
def make_recipe(tiny_weights: Any) -> Callable[..., Recipe]:
    def make(*overrides: str) -> Recipe:
        return load("smoke", [*tiny_weights.overrides, "plan.unit_rows=6", "plan.audit_min=9", *LENIENT, *overrides])

    return make


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> Path:
    """A run that has come as far as its plan: 48 phantoms, 18 samples in 3 units. To be copied."""
    uri = tmp_path_factory.mktemp("runs") / "planned"
    for step in ("ingest", "caption", "plan"):
        drive(uri, make_recipe(), step)
    return uri


@pytest.fixture(scope="module")
def synthesized(
    planned: Path, make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`synthesized("name", *overrides)`: a copy of the planned run whose samples are made; kept for the module."""
    made: dict[str, Path] = {}

    def make(name: str, *overrides: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("made") / name
            shutil.copytree(planned, made[name])
            drive(made[name], make_recipe(*overrides), "synthesize")
        return made[name]

    return make


@pytest.fixture(scope="module")
def lenient(synthesized: Callable[..., Path]) -> Path:
    """Nothing is rejected."""
    return synthesized("lenient", "synthesize.num_actors=1")


@pytest.fixture(scope="module")
def strict(lenient: Path, synthesized: Callable[..., Path]) -> Path:
    """A gate that forbids the larger masks, at a checkpoint and at the end: at the end 4 of the 9 audits' masks.
    Rejected pixels are kept."""
    limit = statistics.median(row["score_area"] for row in rows_of(lenient, "samples") if row["audit"])
    return synthesized("strict", f"gate.max_area={limit!r}", "gate.checkpoints=[0.5]")


def test_every_table_counts_what_the_one_before_it_gave(lenient: Path) -> None:
    run = Run(lenient)
    assert run.tables()[:7] == ["listing", "intake", "copies", "corpus", "captions", "plan", "samples"]
    assert len(run.table("listing").read()) == len(run.table("intake").read()) == len(run.table("corpus").read()) == 48
    accepted = run.table("corpus").counts()[records.ACCEPTED]
    assert len(run.table("captions").read()) == accepted == 48
    assert len(run.table("plan").read()) == len(run.table("samples").read()) == 18
    for name in ("intake", "corpus", "captions", "samples"):
        assert sum(run.table(name).counts().values()) == len(run.table(name).read())
    assert run.verify() == []


def test_the_samples_are_the_planned_ones_once_each_and_a_part_is_a_unit(lenient: Path) -> None:
    planned, made = Run(lenient).table("plan").read().to_pylist(), rows_of(lenient, "samples")
    assert [row["sample_id"] for row in made] == [row["sample_id"] for row in planned]
    assert len({row["sample_id"] for row in made}) == 18
    for before, after in zip(planned, made, strict=True):
        assert after | before | {"mask": after["mask"]} == after  # nothing of what was planned has changed
    units = [set(Run(lenient).table("samples").read_part(part, ["unit"])["unit"].to_pylist()) for part in range(3)]
    assert units == [{0}, {1}, {2}]


def test_what_is_accepted_has_an_image_and_a_mask_of_one_size(lenient: Path, strict: Path) -> None:
    accepted = [row for uri in (lenient, strict) for row in rows_of(uri, "samples") if row["outcome"] == "accepted"]
    assert len(accepted) > 18  # all of one run, some of the other
    for row in accepted:
        image, mask = images.read_png(row["image"]["bytes"]), images.read_mask(row["mask"]["bytes"])
        assert image.shape == (row["height"], row["width"], 3) == (32, 32, 3)
        assert mask.shape == image.shape[:2] and mask.any()
        assert row["reason"] is None and row["mask_source"] == "joint"


def test_the_gate_rejects_early_and_late_with_a_reason_and_never_stops_an_audit(strict: Path) -> None:
    rows = rows_of(strict, "samples")
    rejected = [row for row in rows if row["outcome"] == "rejected"]
    assert 0 < len(rejected) < len(rows)
    assert {row["reason"] for row in rejected} == {"full_mask"}
    audits = [row for row in rows if row["audit"]]
    assert len(audits) == 9  # audit_min
    assert sum(row["outcome"] == "accepted" for row in audits) >= 5  # the median itself is allowed
    assert all(row["calls_run"] == row["num_inference_steps"] == 4 for row in audits)
    assert all(row["image"] is not None for row in audits)
    # The checkpoint is after call 2 of 4 and its verdict takes effect one call later.
    assert {row["calls_run"] for row in rejected} == {3, 4}
    assert all(row["image"] is None for row in rejected if row["calls_run"] == 3)
    assert all(row["image"] is not None for row in rows if row["calls_run"] == 4)  # keep_rejected: image
    assert all(row["calls_run"] == 4 for row in rows if row["outcome"] == "accepted")


def test_the_number_of_actors_changes_no_byte(lenient: Path, synthesized: Callable[..., Path]) -> None:
    assert part_bytes(synthesized("two", "synthesize.num_actors=2"), "samples") == part_bytes(lenient, "samples")


@pytest.mark.parametrize("unit", [6, 18])
def test_ray_serve_and_the_size_of_a_unit_change_no_byte(
    lenient: Path, make_recipe: Callable[..., Recipe], tiny_weights: Any, unit: int
) -> None:
    # The same stage in this process, with the gate beside it, on units of 6 and on all 18 at once.
    from factory.models.joint import JointDenoiser
    from factory.models.weights import tree_digest
    from factory.stages.score import LocalGate, ScoreSamples
    from factory.stages.synthesize import SynthesizeSamples

    recipe, planned = make_recipe(), Run(lenient).table("plan").read().to_pylist()
    digest = JointDenoiser.load(tiny_weights.generator).vae_digest
    gate = LocalGate(ScoreSamples(tiny_weights.gate, digest, recipe.gate))
    stage = SynthesizeSamples(
        tiny_weights.generator, None, recipe.synthesize, recipe.gate, gate, tree_digest(tiny_weights.gate)
    )
    made = [row for start in range(0, 18, unit) for row in stage(planned[start : start + unit])]
    found = records.rows_to_table("samples", made).to_pylist()
    assert found == rows_of(lenient, "samples")


def test_a_finished_step_does_nothing_when_it_is_run_again(lenient: Path, make_recipe: Callable[..., Recipe]) -> None:
    before, manifests = stamps(lenient), {path: path.read_bytes() for path in lenient.rglob("_MANIFEST.json")}
    for step in ("ingest", "caption", "plan", "synthesize"):
        said = drive(lenient, make_recipe("synthesize.num_actors=1"), step)
        assert step == "plan" or any("nothing to do" in text for text in said)
    assert stamps(lenient) == before
    assert {path: path.read_bytes() for path in lenient.rglob("_MANIFEST.json")} == manifests


def test_a_step_that_lost_some_parts_makes_those_and_no_others(
    synthesized: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    uri = synthesized("two", "synthesize.num_actors=2")
    whole, before = part_bytes(uri, "samples"), stamps(uri)
    (uri / "samples/part-000001.parquet").unlink()
    (uri / "samples/_MANIFEST.json").unlink()
    said = drive(uri, make_recipe("synthesize.num_actors=2"), "synthesize")
    assert "accepted 6" in said[-1]
    assert part_bytes(uri, "samples") == whole
    after = stamps(uri)
    assert [name for name in after if after[name] != before[name]] == ["samples/part-000001.parquet"]


# ---- what is refused


@pytest.mark.parametrize(
    ("step", "override", "field"),
    [
        ("ingest", "corpus.phantoms.seed=1", "corpus.phantoms.seed"),
        ("caption", "caption.label_in_prompt=false", "caption.label_in_prompt"),
        ("plan", "plan.guidance=3.5", "plan.guidance"),
        ("synthesize", "gate.max_area=0.25", "gate.max_area"),
    ],
)
def test_a_changed_setting_is_refused_by_its_name_and_forgotten(
    lenient: Path, make_recipe: Callable[..., Recipe], step: str, override: str, field: str
) -> None:
    before = stamps(lenient)
    with pytest.raises(StaleTable, match=f"was made from something else: {field} was .*; use another --run, or remove"):
        drive(lenient, make_recipe("synthesize.num_actors=1", override), step)
    assert stamps(lenient) == before
    # The next command takes its recipe from the run: it must not inherit what was refused.
    assert Run(str(lenient)).recipe() == make_recipe("synthesize.num_actors=1")


def test_a_setting_that_a_table_does_not_depend_on_may_change(
    lenient: Path, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe("synthesize.num_actors=1", "evaluate.worth.seeds=7", "release.name=other")
    assert "nothing to do" in drive(lenient, recipe, "synthesize")[-1]
    drive(lenient, make_recipe("synthesize.num_actors=1"), "plan")  # the header of the others' recipe


@pytest.mark.parametrize(("step", "parent"), [("caption", "ingest"), ("synthesize", "plan")])
def test_an_unsealed_parent_is_refused_with_the_command_that_makes_it(
    tmp_path: Path, make_recipe: Callable[..., Recipe], step: str, parent: str
) -> None:
    with pytest.raises(UnsealedTable, match=rf"is not sealed: .*; run `factory {parent} --run {tmp_path}`"):
        drive(tmp_path, make_recipe(), step)


def test_a_plan_is_not_made_of_half_of_the_captions(
    planned: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    shutil.copytree(planned, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/plan")
    (tmp_path / "run/captions/_MANIFEST.json").unlink()
    with pytest.raises(UnsealedTable, match=r"captions .* 3 parts are there but no manifest; run `factory caption"):
        drive(tmp_path / "run", make_recipe(), "plan")


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    with Run(tmp_path).lock(interval_s=0.2):
        yield tmp_path


def test_a_run_in_use_is_refused(held: Path, make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match=rf"{held} is in use by another driver \(process \d+ on .*\); wait for it"):
        drive(held, make_recipe(), "plan")
    assert not (held / "plan").exists() and not (held / "run.json").exists()


def test_weights_that_are_not_there_are_refused_before_anything_is_started(
    planned: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    shutil.copytree(planned, tmp_path / "run")
    with pytest.raises(ValueError, match=r"synthesize\.weights must be `starter` or a .* directory, got /nowhere"):
        drive(tmp_path / "run", make_recipe("synthesize.weights=/nowhere"), "synthesize")
    with pytest.raises(ValueError, match=r"weights must be among those of .* got 'lora-other'; make"):
        drive(tmp_path / "run", make_recipe("synthesize.adapter=lora-other"), "synthesize")


def test_a_prompt_is_one_of_its_diagnosis_looks(lenient: Path) -> None:
    seen = {row["caption"].partition(" on ")[2].partition(",")[2] for row in rows_of(lenient, "captions")}
    for row in rows_of(lenient, "plan"):
        assert row["prompt"].partition(" on ")[2].partition(",")[2] in seen
    cells = Counter((row["diagnosis"], row["skin_type"]) for row in rows_of(lenient, "plan"))
    assert len(cells) == 18 and set(cells.values()) == {1}
