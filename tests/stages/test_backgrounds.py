"""Backgrounds: what the corpus has of normal skin, what is planned into it, and the line as far as a drawn sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import corpus_rows

from factory import line, recipe, records
from factory.images import read_mask, read_png, resized
from factory.quality.shape_prior import ShapePrior
from factory.recipe import BackgroundsSection
from factory.run import Run
from factory.stages.backgrounds import FindBackgrounds, attached, placed, prior_of
from factory.stages.plan import sample_rows

SECTION = BackgroundsSection(min_side=8)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def corpus() -> list[Row]:
    rows = corpus_rows(48, 64)
    for row in rows:
        row |= {"split": "train", "skin_type_scale": "fst", "ita": None}
    return rows


@pytest.fixture(scope="module")
def found(corpus: list[Row]) -> list[Row]:
    return FindBackgrounds(SECTION)(corpus)


def test_every_training_row_has_a_background_or_a_reason(corpus: list[Row]) -> None:
    rows = [dict(row) for row in corpus[:6]]
    rows[0]["mask"] = None
    rows[1]["split"], rows[2]["outcome"], rows[2]["reason"] = "test", "rejected", "near_duplicate"
    made = FindBackgrounds(SECTION)(rows)
    assert [row["record_id"] for row in made] == [rows[k]["record_id"] for k in (0, 3, 4, 5)]
    assert (made[0]["outcome"], made[0]["reason"]) == ("rejected", "no_mask")
    records.rows_to_table("backgrounds", made)
    none = FindBackgrounds(BackgroundsSection(min_side=64))(rows[3:])
    assert {(row["outcome"], row["reason"]) for row in none} == {("rejected", "no_normal_skin")}
    assert all(row["shape"] is not None for row in none)  # a lesion without a background still has a shape


def test_a_background_is_its_box_of_its_record_and_clear_of_the_lesion(corpus: list[Row], found: list[Row]) -> None:
    of = {row["record_id"]: row for row in corpus}
    accepted = [row for row in found if row["outcome"] == "accepted"]
    assert len(accepted) > 20
    for row in accepted:
        left, top, side = row["box"]
        parent = of[row["record_id"]]
        square = np.s_[top : top + side, left : left + side]
        assert np.array_equal(read_png(row["image"]["bytes"]), read_png(parent["image"]["bytes"])[square])
        assert not read_mask(parent["mask"]["bytes"])[square].any() and side >= 8


def test_a_skin_type_of_another_scale_is_measured(corpus: list[Row]) -> None:
    rows = [corpus[0] | {"skin_type": "34", "skin_type_scale": "ddi", "ita": angle} for angle in (60.0, -60.0, None)]
    assert [row["skin_type"] for row in FindBackgrounds(SECTION)(rows)] == ["I", "VI", None]


def planned(count: int, skin_type: str | None) -> list[Row]:
    return [
        {
            "sample_id": records.sample_id("p", k),
            "diagnosis": "nevus",
            "skin_type": skin_type,
            "width": 32,
            "height": 32,
        }
        for k in range(count)
    ]


def test_a_sample_takes_a_background_of_its_skin_type_and_a_mask_by_its_id(found: list[Row]) -> None:
    prior = prior_of(found)
    type_of = {row["record_id"]: row["skin_type"] for row in found}
    there = sorted({row["skin_type"] for row in found if row["outcome"] == "accepted" and row["skin_type"]})
    rows = [row for name in there for row in planned(8, name)]
    made = list(placed(rows, found, prior))
    assert [type_of[row["parents"][0]] for row in made] == [row["skin_type"] for row in rows]
    assert made[:8] == list(placed(rows[:8], found[::-1], prior))  # nothing depends on the order or the company
    masks = [read_mask(row["mask"]["bytes"]) for row in made[:8]]
    assert all(mask.shape == (32, 32) and 0 < mask.mean() < 0.9 for mask in masks)
    assert len({mask.tobytes() for mask in masks}) == 8
    free = list(placed(planned(40, None), found, prior))
    assert len({type_of[row["parents"][0]] for row in free}) > 1
    with_pixels = attached(made, found)
    assert all(row["background"] == next(f["image"] for f in found if f["record_id"] == row["parents"][0])
               for row in with_pixels)  # fmt: skip


def test_a_skin_type_without_a_background_is_refused_by_name(found: list[Row]) -> None:
    only = [row | {"skin_type": "II"} for row in found]
    with pytest.raises(ValueError, match=r"of which the corpus has normal skin \(II\), got VI; leave them out"):
        list(placed(planned(1, "II") + planned(1, "VI"), only, prior_of(found)))
    nothing = [row | {"outcome": "rejected", "reason": "no_normal_skin"} for row in found]
    with pytest.raises(ValueError, match=r"has normal skin \(none\), got any"):
        list(placed(planned(1, None), nothing, prior_of(found)))


def test_the_prior_knows_lesions_that_gave_no_background(found: list[Row]) -> None:
    prior = prior_of(found)
    assert isinstance(prior, ShapePrior) and prior.pool.count == len(found) == 48


# ---- the line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: list[Row]) -> Run:
    """A corpus in two parts, all of one skin type, and one part that has no training row."""
    made = Run(str(tmp_path_factory.mktemp("run")))
    rows = [row | {"skin_type": "II", "skin_type_scale": "ita"} for row in corpus]
    others = [row | {"split": "test"} for row in rows[40:]]
    for part, some in enumerate((rows[:20], rows[20:40], others)):
        made.table("corpus").commit(part, records.rows_to_table("corpus", some))
    made.table("corpus").seal(3, {"of": "test"}, {})
    return made


def wanted(weights: Any, *overrides: str) -> recipe.Recipe:
    return recipe.load(None, [
        "plan.generator=inpaint", "plan.skin_types=[II]", "plan.size=32", "plan.count=6", "plan.num_inference_steps=2",
        "backgrounds.min_side=8", "gate.min_area=0", "gate.max_area=1", "gate.min_iou=0", "gate.min_solidity=0",
        "synthesize.slots=2", *weights.overrides, *overrides,
    ])  # fmt: skip


def test_the_plan_holds_masks_and_says_where_its_backgrounds_are(run: Run, tiny_weights: Any) -> None:
    said: list[str] = []
    asked = wanted(tiny_weights)
    assert asked.plan.guidance == 7.5 and recipe.load(None).plan.guidance == 2.0
    line.plan(run, asked, said.append)
    assert run.tables() == ["corpus", "backgrounds", "plan"] and not run.verify()
    assert "of 40 training images have normal skin" in said[0]
    rows = run.table("plan").read().to_pylist()
    boxes = {row["record_id"]: row["box"] for row in run.table("backgrounds").read().to_pylist()}
    assert len(rows) == 6
    for row in rows:
        assert row["box"] == boxes[row["parents"][0]] and row["generator"] == "inpaint" and row["guidance"] == 7.5
        assert read_mask(row["mask"]["bytes"]).any()
    before = run.table("plan").digest()
    line.plan(run, asked, said.append)  # nothing is made again
    assert run.table("plan").digest() == before


def test_a_unit_of_the_plan_is_drawn_into_its_backgrounds(run: Run, tiny_weights: Any) -> None:
    from factory.runtime.backgrounds import with_pixels
    from factory.stages.synthesize import SynthesizeSamples

    asked = wanted(tiny_weights)
    line.plan(run, asked, lambda line: None)
    torch.set_num_threads(1)
    stage = SynthesizeSamples(tiny_weights.generator, None, asked.synthesize, asked.gate, None, "", "inpaint")
    rows = with_pixels(run.table("plan").read().to_pylist(), run.table("backgrounds"))
    made = records.rows_to_table("samples", stage(rows)).to_pylist()
    for row, done in zip(rows, made, strict=True):
        mask = read_mask(row["mask"]["bytes"])
        background = resized(read_png(row["background"]["bytes"]), 32, 32)
        assert np.array_equal(read_png(done["image"]["bytes"])[~mask], background[~mask])
        assert done["parents"] == row["parents"] and done["box"] == row["box"] and done["mask_source"] == "planned"


def test_a_few_samples_are_drawn_without_a_cluster(run: Run, tiny_weights: Any, tmp_path: Path) -> None:
    asked = wanted(tiny_weights)
    line.plan(run, asked, lambda line: None)
    rows = sample_rows(
        count=2, diagnosis="nevus", skin_type=None, asymmetry=None, border=None, colors=None, section=asked.plan, seed=0
    )
    made = line.sample(run.uri, asked, rows, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file() and all(row["iou"] is not None for row in made)
    with pytest.raises(ValueError, match="--run must name a run with backgrounds to draw into, got nothing"):
        line.sample(None, asked, rows, tmp_path / "none.png")
