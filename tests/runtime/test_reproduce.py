"""Samples drawn again, of every generator, on runs that were made without Ray: equal to the last bit at the recorded
shape, and every way in which they cannot be compared is one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_classes import build_classes
from tiny_flux import save_pipeline as save_flux
from tiny_sdxl import save_pipeline as save_inpaint

from factory import records
from factory.images import encode_mask, encode_png, read_mask, read_png
from factory.models.joint import JointDenoiser
from factory.models.placement import fingerprint, placement
from factory.models.sampler import Verdict
from factory.models.weights import generator_digest
from factory.recipe import Recipe, load
from factory.run import Run
from factory.runtime.backgrounds import with_pixels
from factory.runtime.reproduce import TOLERANCE_LATENTS, TOLERANCE_LEVELS, reproduce
from factory.runtime.units import fingerprint_in
from factory.stages.synthesize import SynthesizeSamples

FAMILIES = ("joint", "flux", "inpaint", "class_conditional")
EARLY, LATE, FAILED = "0-1", "0-2", "0-3"  # what becomes of some samples of unit 0; the rest are accepted
Change = Callable[[dict[str, Any]], dict[str, Any]]


class ByName:
    """A gate that refuses EARLY at its checkpoint and LATE at the end."""

    def submit(self, ids: list[str], image_latents: Any, masks: Any, stage: str) -> list[Verdict]:
        refused = EARLY if stage == "checkpoint" else LATE
        return [Verdict("rejected", "low_iou") if name == refused else Verdict("accepted") for name in ids]

    def result(self, ticket: list[Verdict]) -> list[Verdict]:
        return ticket


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    build_classes().save(folder / "classes")
    return {
        "joint": tiny_weights.generator, "flux": save_flux(folder / "flux"),
        "inpaint": save_inpaint(folder / "inpaint", xl=False), "class_conditional": folder / "classes",
    }  # fmt: skip


def recipe_for(family: str, weights: Path, *overrides: str) -> Recipe:
    return load(None, [
        f"plan.generator={family}", f"synthesize.weights={weights}", "synthesize.adapter=none", "synthesize.slots=3",
        "synthesize.keep_rejected=latents", "gate.checkpoints=[0.5]", *overrides,
    ])  # fmt: skip


def planned(family: str, unit: int, count: int) -> list[dict[str, Any]]:
    """A unit's rows of the plan; each unit is a round of its own."""
    prompts = ["nevus", "melanoma"] if family == "class_conditional" else ["a nevus on fair skin", "a melanoma"]
    rows: list[dict[str, Any]] = []
    for k in range(count):
        row = {
            "sample_id": f"{unit}-{k}", "unit": unit, "index": 10 * unit + k, "round": unit, "generator": family,
            "prompt": prompts[k % 2], "seed": 100 * unit + k, "width": 32, "height": 32, "guidance": 2.0,
            "num_inference_steps": 4, "audit": False, "parents": [],
        }  # fmt: skip
        if family == "inpaint":
            mask = np.zeros((32, 32), bool)
            mask[8 : 20 + k, 6:24] = True
            row |= {"parents": [f"r{k % 2}"], "mask": records.image_struct(encode_mask(mask), "m.png")}
        rows.append(row)
    return rows


def sealed(run: Run, name: str, parts: list[list[dict[str, Any]]], made_of: dict[str, str], **parents: str) -> None:
    table = run.table(name)
    table.require(made_of)
    for number, rows in enumerate(parts):
        table.commit(number, records.rows_to_table(name, rows))
    table.seal(len(parts), made_of, parents)


def made_run(uri: Path, recipe: Recipe, change: Change = dict) -> Run:
    """A run of two rounds whose samples are drawn by the stage; `change` is made to every row before it is kept."""
    run, family = Run(uri), recipe.plan.generator
    run.write_header(recipe)
    pixels = np.random.default_rng(5).integers(0, 256, (2, 32, 32, 3), np.uint8)
    if family == "inpaint":
        found = [
            {"record_id": f"r{k}", "image": records.image_struct(encode_png(p), "b.png"), "outcome": "accepted"}
            for k, p in enumerate(pixels)
        ]
        sealed(run, "backgrounds", [found], {"of": "backgrounds"})
    units = [planned(family, 0, 4), planned(family, 1, 2)]
    sealed(run, "plan", units, {"of": "plan"})
    stage = SynthesizeSamples(
        recipe.synthesize.weights, None, recipe.synthesize, recipe.gate, ByName(), "", family, gpu=False
    )
    made = []
    for rows in units:
        full = with_pixels(rows, run.table("backgrounds")) if family == "inpaint" else rows
        made.append([change(row) if row["sample_id"] != FAILED else failed(row) for row in stage(full)])
    digests = {"generator": generator_digest(recipe.synthesize.weights), "gate": ""}
    made_of = fingerprint_in(run, recipe, "samples", ["plan"], digests)
    made_of |= fingerprint(placement(recipe.synthesize.dtype, gpu=False), None, recipe.synthesize.compile)
    sealed(run, "samples", made, made_of)
    return run


def failed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"outcome": "failed", "reason": "out_of_memory", "image": None, "mask": None, "calls_run": None}


@pytest.fixture(scope="module")
def runs(weights: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: made_run(folder / name, recipe_for(name, weights[name])) for name in FAMILIES}


@pytest.fixture
def joint(runs: dict[str, Run]) -> Run:
    return runs["joint"]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it would fail


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sample_of_every_round_is_drawn_again_to_the_last_bit(
    runs: dict[str, Run], weights: dict[str, Path], family: str
) -> None:
    recipe = recipe_for(family, weights[family])
    kept = {
        "0-0": "image and mask", EARLY: "latents", LATE: "latents", "1-0": "image and mask", "1-1": "image and mask",
    }  # fmt: skip
    for name, what in kept.items():
        if family in ("flux", "class_conditional"):
            what = what.replace("image and mask", "its image")
        calls = 3 if name == EARLY else 4  # the checkpoint is after call 2, its verdict takes effect one call later
        said = reproduce(runs[family], recipe, name)
        assert said.holds
        assert said.text == (
            f"reproduce   {name} is equal bit for bit in {what}: {calls} calls at batch shape 3 and 1 thread(s)"
        )


def test_what_was_compiled_is_compiled_again_whatever_the_recipe_says_by_now(
    weights: dict[str, Path], tmp_path: Path
) -> None:
    run = made_run(tmp_path, recipe_for("joint", weights["joint"], "synthesize.compile=true"))
    said = reproduce(run, recipe_for("joint", weights["joint"]), LATE)
    assert said.holds and "is equal bit for bit in latents" in said.text
    plain = made_run(tmp_path / "plain", recipe_for("joint", weights["joint"]))
    one, other = (made.table("samples").sealed().fingerprint for made in (run, plain))
    assert one.pop("synthesize.compile") == "true" and one == other


def test_what_nothing_is_kept_of_is_drawn_and_written(weights: dict[str, Path], tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", recipe_for("joint", weights["joint"], "synthesize.keep_rejected=none"))
    recipe, out = recipe_for("joint", weights["joint"]), tmp_path / "new" / "again.png"
    said = reproduce(run, recipe, EARLY)
    assert said.holds
    assert said.text == (
        f"reproduce   {EARLY} was drawn again, 3 calls at batch shape 3 and 1 thread(s); nothing is kept to compare "
        "with; --out writes it"
    )
    assert reproduce(run, recipe, LATE, out).text.endswith(f"with; drawn again in {out}")
    assert read_png(out.read_bytes()).shape == (32, 32, 3)


def moved(levels: int = 0, latents: float = 0.0, flipped: int = 0) -> Change:
    """A row whose pixels, latents and mask are a little other than drawn."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        row = dict(row)
        if row.get("latents"):
            values = np.frombuffer(row["latents"], np.float16).copy()
            values[3] += np.float16(latents)
            row["latents"] = values.tobytes()
        if row.get("image"):
            image, mask = read_png(row["image"]["bytes"]).astype(int), read_mask(row["mask"]["bytes"]).copy()
            image[5, 6, 1] += levels if image[5, 6, 1] < 128 else -levels
            mask.reshape(-1)[:flipped] ^= True
            row["image"] = records.image_struct(encode_png(image.astype(np.uint8)), "i.png")
            row["mask"] = records.image_struct(encode_mask(mask), "m.png")
        return row

    return change


@pytest.mark.parametrize(
    ("change", "name", "amount", "holds"),
    [
        (moved(levels=TOLERANCE_LEVELS), "0-0", "by 4 of 255 levels at most and 0.00% of the mask's pixels", True),
        (moved(levels=TOLERANCE_LEVELS + 1), "0-0", "by 5 of 255 levels at most and 0.00%", False),
        (moved(flipped=10), "1-1", "by 0 of 255 levels at most and 0.98% of the mask's pixels", True),
        (moved(flipped=11), "1-1", "by 0 of 255 levels at most and 1.07% of the mask's pixels", False),
        (moved(latents=0.5 * TOLERANCE_LATENTS), EARLY, "differs in latents by 0.025 at most, within", True),
        (moved(latents=4 * TOLERANCE_LATENTS), LATE, "differs in latents by 0.2 at most, beyond", False),
        (moved(latents=float("nan")), EARLY, "differs in latents by nan at most, beyond", False),
        (lambda row: row | {"calls_run": 5}, "0-0", "must be from 1 to num_inference_steps (4), got 5", None),
        (lambda row: row | ({"latents": b"1234"} if row.get("latents") else {}), EARLY, "values of them", False),
    ],
)
def test_a_difference_is_told_and_beyond_the_tolerance_it_is_a_failed_check(
    weights: dict[str, Path], tmp_path: Path, factory_command: Any, change: Change, name: str, amount: str, holds: Any
) -> None:
    made_run(tmp_path, recipe_for("joint", weights["joint"]), change)
    said = factory_command("reproduce", name, "--run", tmp_path)
    assert said.status == {True: 0, False: 1, None: 2}[holds]
    assert amount in said.out + said.err
    if holds is not None:
        verdict = "within" if holds else "beyond"
        assert f"{verdict} the tolerance" in said.out and "another batch shape, thread count or" in said.out


def test_a_sample_that_broke_is_equal_and_one_that_breaks_too_soon_differs(
    weights: dict[str, Path], tmp_path: Path, factory_command: Any
) -> None:
    broken = JointDenoiser.load(weights["joint"])
    broken.unet.conv_out.bias.data.fill_(float("inf"))
    broken.save(tmp_path / "broken")
    recipe = recipe_for("joint", tmp_path / "broken")
    later = made_run(tmp_path / "run", recipe, lambda r: r | {"calls_run": 3 if r["sample_id"] == "0-0" else 1})
    said = reproduce(later, recipe, "1-0", tmp_path / "none.png")
    assert said.holds and "is equal bit for bit in latents: 1 calls" in said.text
    assert said.text.endswith("; nothing to write, for its latents are not finite")
    found = factory_command("reproduce", "0-0", "--run", later.uri)
    assert found.status == 1 and "broke after 1 calls at batch shape 3 and 1 thread(s), recorded are 3" in found.out


def test_another_recipe_of_the_run_changes_nothing_of_how_its_samples_were_drawn(
    joint: Run, weights: dict[str, Path]
) -> None:
    recipe = recipe_for("joint", weights["joint"], "synthesize.solver=dpm++2m", "synthesize.slots=9")
    assert "is equal bit for bit" in reproduce(joint, recipe, "0-0").text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nobody", "SAMPLE_ID must be planned in {run}, got 'nobody'; copy it from the samples table."),
        (
            FAILED,
            "SAMPLE_ID must be of a sample that was drawn, got 0-3, which failed (out_of_memory); run `factory "
            "synthesize --retry failed --run {run}` to plan it again.",
        ),
    ],
)
def test_what_cannot_be_drawn_again_is_refused_in_a_sentence(
    joint: Run, factory_command: Any, name: str, sentence: str
) -> None:
    said = factory_command("reproduce", name, "--run", joint.uri)
    assert (said.status, said.out) == (2, "")
    assert said.err == f"factory: {sentence.format(run=joint.uri)}\n"


def test_unsealed_samples_and_a_round_that_is_not_made_are_refused(tmp_path: Path, factory_command: Any) -> None:
    run, units = Run(tmp_path), [planned("joint", 0, 4), planned("joint", 1, 2)]
    sealed(run, "plan", units, {"of": "plan"})
    said = factory_command("reproduce", "0-0", "--run", tmp_path)
    assert said.status == 2 and "samples in" in said.err and "is not sealed: nothing was made yet" in said.err
    sealed(run, "samples", [[failed({k: v for k, v in row.items() if k != "mask"}) for row in units[0]]], {"of": "it"})
    said = factory_command("reproduce", "1-1", "--run", tmp_path)
    assert said.status == 2 and "got 1-1, which is planned in a further round; run `factory synthesize" in said.err


def test_other_weights_are_refused_by_both_digests(
    joint: Run, weights: dict[str, Path], tmp_path: Path, factory_command: Any
) -> None:
    other = JointDenoiser.load(weights["joint"])
    other.unet.conv_out.bias.data += 1
    other.save(tmp_path / "other")
    said = factory_command("reproduce", "0-0", "--run", joint.uri, "--set", f"synthesize.weights={tmp_path / 'other'}")
    recorded, got = (generator_digest(path) for path in (weights["joint"], tmp_path / "other"))
    assert said.status == 2 and said.err.count("\n") == 1
    assert f"of digest {recorded}, got {got} in {tmp_path / 'other'}; name them with --set" in said.err


def test_the_image_that_is_written_is_the_kept_one(joint: Run, factory_command: Any, tmp_path: Path) -> None:
    out = tmp_path / "again.png"
    said = factory_command("reproduce", "1-0", "--run", joint.uri, "--out", out)
    assert said.status == 0 and said.out.endswith(f"; drawn again in {out}\n") and said.out.count("\n") == 1
    (row,) = (r for r in joint.table("samples").read().to_pylist() if r["sample_id"] == "1-0")
    assert np.array_equal(read_png(out.read_bytes()), read_png(row["image"]["bytes"])) and row["calls_run"] == 4
