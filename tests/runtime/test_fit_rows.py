"""What a fit reads of a run: the same rows and the same fit, whether its images were encoded before or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from factory import images, phantom, records
from factory import recipe as recipes
from factory.fits.encoded import CachedImages, EncodedCache
from factory.fits.loop import train
from factory.run import Run
from factory.runtime import encode, fit_rows
from factory.tables import Table

SIDE, COUNT = 32, 12
FAMILIES = {
    "joint": [],
    "inpaint": ["fit.lora.inpaint.preset=null"],
    "class_conditional": ["fit.lora.train_mode=full", "fit.lora.class_conditional.classes=[nevus, melanoma]"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve phantoms in two parts, every third for validation, one of them without a caption."""
    run = Run(str(tmp_path_factory.mktemp("run")))
    rows, captions = [], []
    for number in range(COUNT):
        drawn, name = phantom.draw(5, number, SIDE), f"r{number:02}"
        rows.append({
            "row_id": name, "record_id": name, "group_id": name, "source": "phantom" if number % 4 else "other",
            "split": "val" if number % 3 == 2 else "train", "diagnosis": "nevus" if number % 2 else "melanoma",
            "image": records.image_struct(images.encode_png(drawn.image), name),
            "mask": records.image_struct(images.encode_mask(drawn.mask), name), "outcome": records.ACCEPTED,
        })  # fmt: skip
        if number != 4:
            captions.append({"record_id": name, "caption": f"lesion {number}", "outcome": records.ACCEPTED})
    for part in range(2):
        run.table("corpus").commit(part, records.rows_to_table("corpus", rows[part::2]))  # type: ignore[arg-type]
    run.table("corpus").seal(2, {"of": "test"}, {})
    run.table("captions").commit(0, records.rows_to_table("captions", captions))  # type: ignore[arg-type]
    run.table("captions").seal(1, {"of": "test"}, {"corpus": run.table("corpus").digest()})
    return run


def asked(family: str) -> recipes.Recipe:
    fields = [
        f"fit.lora.family={family}", f"plan.size={SIDE}", "fit.lora.steps=2", "fit.lora.batch_size=4",
        "fit.lora.rank=2", "fit.lora.validate_every=1", "fit.lora.balance=[diagnosis, source]",
    ]  # fmt: skip
    return recipes.load(None, [*fields, *FAMILIES[family]])


def encode_here(run: Run, recipe: recipes.Recipe, units: int = 2) -> None:
    """What the actors do, in this process."""
    encoder, masks = fit_rows.encoder_of(recipe), fit_rows.reads_masks(recipe)
    assert encoder is not None
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    stage = encode.EncodePart(run.uri, encoder, encoder.digest, masks)
    found, sink = stage(pa.table({"unit": list(range(units))})), io.BytesIO()
    pq.write_table(found, sink)
    run.store.replace(encode._index_path(run, encoder.digest, masks), sink.getvalue())


def not_again(*arguments: object) -> None:
    raise AssertionError("encoded again")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_fit_is_the_same_whether_its_images_were_encoded_before(
    run: Run, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 7 of the trainers people use: a cache that one rank fills while the others wait trips their watchdog. Here
    workers encode nothing that was encoded before."""
    torch.set_num_threads(1)
    recipe = asked(family)
    curves, sizes = [], []
    for name in ("here", "before"):
        if name == "before":
            encode_here(run, recipe)
            monkeypatch.setattr(type(fit_rows.encoder_of(recipe)), "__call__", not_again)
        objective = fit_rows.objective(run, recipe)
        rows, *_ = fit_rows._rows(run, recipe, "train")
        assert isinstance(rows.images, CachedImages) == (name == "before")
        train(objective, recipe.fit.lora, tmp_path / name)
        sizes.append((len(objective.examples), len(objective.held_out)))
        assert objective.dropped == ({} if family == "class_conditional" else {fit_rows.NO_CAPTION: 1})
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([(line["loss"], line["validation_loss"]) for line in lines])
    # Eight are for training, of which one has no caption; classes need none.
    assert sizes[0] == sizes[1] == ((8, 4) if family == "class_conditional" else (7, 4))
    assert [len(curve) for curve in curves] == [2, 2]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)


def test_what_is_encoded_is_the_corpus_s_and_is_not_encoded_again(run: Run) -> None:
    recipe = asked("joint")
    encode_here(run, recipe)
    encoder = fit_rows.encoder_of(recipe)
    assert encoder is not None
    keys = encode.keys_in(run, encoder.digest, masks=True)
    assert keys is not None and sorted(keys) == [f"r{number:02}" for number in range(COUNT)]
    assert set(keys.values()) <= EncodedCache(run.store, encoder.digest).known()
    assert encode.keys_in(run, encoder.digest, masks=False) is None


def test_diagnoses_and_sources_are_shown_equally_often(run: Run) -> None:
    objective = fit_rows.objective(run, asked("class_conditional"))
    groups = objective.examples.groups
    assert groups is not None
    shown = np.concatenate([groups.rows_of_step(0, step, 4) for step in range(10)])
    labels = objective.examples.labels[shown]
    assert (labels == 0).sum() == (labels == 1).sum() == 20


def test_trap_9_no_worker_scans_the_images_to_know_its_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 9 of the trainers people use: one node opens every image for its metadata before the first step. Here the
    scan is Ray Data's (`encode`), and what a worker reads of the corpus has no pixels in it."""
    recipe = asked("joint")
    encode_here(run, recipe)
    read: list[str] = []
    whole = Table.read

    def noted(self: Table, columns: list[str] | None = None, **rest: object) -> object:
        read.extend(columns or ["everything"])
        return whole(self, columns, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Table, "read", noted)
    objective = fit_rows.objective(run, recipe)
    assert len(objective.examples) == 7 and set(read) == {*fit_rows.LIGHT, "caption"}


def test_rows_without_a_mask_are_counted_where_masks_are_needed(run: Run, tmp_path: Path) -> None:
    other = Run(str(tmp_path / "run"))
    rows = run.table("corpus").read().to_pylist()
    rows[0] |= {"mask": None, "split": "train"}
    other.table("corpus").commit(0, records.rows_to_table("corpus", rows))
    other.table("corpus").seal(1, {"of": "test"}, {})
    other.table("captions").commit(0, run.table("captions").read())
    other.table("captions").seal(1, {"of": "test"}, {"corpus": other.table("corpus").digest()})
    for before in (False, True):
        if before:
            encode_here(other, asked("joint"), units=1)
        assert fit_rows.objective(other, asked("joint")).dropped == {fit_rows.NO_MASK: 1, fit_rows.NO_CAPTION: 1}
