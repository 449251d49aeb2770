"""`factory evaluate captions` on a run: images drawn, captioners compared, the review made, imported and reported."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from factory import caption_study, line, records
from factory.prompts import Attributes, caption_for
from factory.recipe import load
from factory.run import Run
from factory.storage import open_store
from factory.tables import Table

LOOKS = [
    Attributes(0.01, 0.02, ("light-brown",)), Attributes(0.3, 0.3, ("black", "red")), Attributes(0.1, 0.1, ("white",)),
]  # fmt: skip


def write_captions(path: Path, corpus: list[dict[str, Any]], captioner: str, shift: int) -> None:
    """A captions table; the first image's caption failed."""
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(corpus):
        known = {"record_id": row["record_id"], "captioner": captioner, "label_in_prompt": True}
        look = LOOKS[(i + shift) % 3]
        made = {
            "caption": caption_for(look, row["diagnosis"], row["skin_type"]), "asymmetry": look.asymmetry,
            "border_irregularity": look.border_irregularity, "colors": list(look.colors),
            "color_count": look.color_count, "outcome": "accepted",
        }  # fmt: skip
        rows.append(known | (made if i else {"outcome": "failed", "reason": "no_lesion"}))
    table = Table(open_store(path), "captions")
    table.commit(0, records.rows_to_table("captions", rows))
    table.seal(1, {"of": captioner}, {})


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A run with its captions, and another one on the same photographs."""
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_run.build(first, count=10, photographs=True)
    (first / "run.json").unlink()
    corpus = tiny_run.corpus_rows(24, 64, photographs=True)
    write_captions(first, corpus, "measured", 0)
    write_captions(second, corpus, "vision", 1)
    return first, second


def key_in(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / caption_study.KEY).read_text()))


def reviewed(run: Path, rater: str, scores: dict[str, int], file: Path) -> None:
    """A file as the page saves it: a score per backend."""
    key = key_in(run)
    ratings = [
        {"item": item, "caption": letter, "plausibility": scores[name], "defects": [], "remark": ""}
        for item, letters in key["items"].items()
        for letter, name in letters.items()
    ]
    file.write_text(
        json.dumps({"format": key["format"], "version": 1, "study": key["study"], "rater": rater, "ratings": ratings})
    )


def test_the_command_compares_writes_the_page_imports_reviews_and_the_report_shows_both(
    runs: tuple[Path, Path], tmp_path: Path, factory_command: Callable[..., Any]
) -> None:
    first, second = runs
    asked = ["evaluate", "captions", "--run", first, "--set", "evaluate.caption_images=12"]
    said = factory_command(*asked, "--with", f"vlm={second}")
    assert said.status == 0, said.err
    assert "captions    no truth to compare with" in said.out
    assert "compared    measured, vlm on 12 images" in said.out
    compared = json.loads((first / caption_study.COMPARISON).read_text())
    assert compared["num_images"] == 12 and set(compared["backends"]) == {"measured", "vlm"}
    assert compared["agreement"]["colors"]["mean_jaccard"]["value"] == 0.0  # looks that share no colour
    html, key = (first / caption_study.PAGE).read_text(), key_in(first)
    assert not any(name in html for name in ("vlm", "measured", str(first))) and key["study"] in html
    files = tmp_path / "files"
    files.mkdir()
    reviewed(first, "anna", {"measured": 4, "vlm": 2}, files / "anna.json")
    reviewed(first, "ben", {"measured": 5, "vlm": 2}, files / "ben.json")
    done = factory_command("evaluate", "captions", "--run", first, "--reviews", files)
    assert done.status == 0, done.err
    assert f"reviews     2 raters on {2 * len(key['items'])} captions, alpha 0." in done.out
    result = json.loads((first / caption_study.RESULT).read_text())
    assert result["backends"]["measured"]["plausibility"]["value"] == 4.5
    assert factory_command("report", "--run", first).status == 0
    page = (first / "report/index.html").read_text()
    assert "The captions, compared and reviewed" in page and 'id="review-table"' in page
    assert "anna and ben gave the same score in 50.0%" in page


def test_a_model_is_compared_by_its_own_words_its_tokens_prices_and_its_steps_seconds(
    runs: tuple[Path, Path], factory_command: Callable[..., Any]
) -> None:
    """The model's rows hold the measured ABC too, which must not be taken for the model's."""
    first, second = runs
    rows = Table(open_store(first), "captions").read().to_pylist()
    by_model = [
        row | ({} if row["outcome"] != "accepted" else {
            "captioner": "http", "model_digest": "d", "stated_asymmetry": "medium", "stated_colors": ["red"],
            "findings": ["attribute_missing"], "tokens_in": 1000, "tokens_out": 500,
        })
        for row in rows
    ]  # fmt: skip
    shutil.rmtree(second / "captions")
    table = Table(open_store(second), "captions")
    table.commit(0, records.rows_to_table("captions", by_model))
    table.seal(1, {"of": "http"}, {})
    prices = load("smoke", ["caption.http.price_in=2", "caption.http.price_out=4"])
    with line.driving(str(second), prices, "caption"):
        time.sleep(1.1)  # events tell whole seconds
    assert factory_command("evaluate", "captions", "--run", first, "--with", str(second)).status == 0
    found = json.loads((first / caption_study.COMPARISON).read_text())
    assert found["agreement"]["border_irregularity"]["alpha"]["value"] is None  # the model said nothing of it
    assert found["agreement"]["asymmetry"]["equal"][0]["value"] == 0.0
    http = found["backends"]["http"]
    assert http["cost"]["median"] == pytest.approx(1000 * 2e-6 + 500 * 4e-6)
    assert http["findings"]["each"]["attribute_missing"]["value"] == 1.0
    assert 0 < http["seconds"]["median"] < 1 and found["backends"]["measured"]["seconds"] is None


def test_a_run_of_phantoms_is_still_held_to_their_truth(tmp_path: Path, factory_command: Callable[..., Any]) -> None:
    corpus = tiny_run.corpus_rows(6, 64)
    for row in corpus:
        row |= {"true_border_irregularity": 0.02, "true_color_count": 1, "true_colors": ["light-brown"]}
    table = Table(open_store(tmp_path), "corpus")
    table.commit(0, records.rows_to_table("corpus", corpus))
    table.seal(1, {"of": "test"}, {})
    write_captions(tmp_path, corpus, "measured", 0)
    said = factory_command("evaluate", "captions", "--run", tmp_path)
    assert said.status == 0, said.err
    assert (
        "captions    compared with the phantoms' truth" in said.out and "compared    measured on 6 images" in said.out
    )
    accuracy = json.loads((tmp_path / "lab/caption_accuracy.json").read_text())
    assert accuracy["num_records"] == 5 and accuracy["color_count"]["exact"]["successes"] == 3
    assert json.loads((tmp_path / caption_study.COMPARISON).read_text())["agreement"] is None


def test_the_same_captions_make_the_same_study_and_changed_ones_keep_the_former_key(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = runs
    run, lines = Run(str(first)), list[str]()
    caption_study.prepare(run, [], 6, 0, lines.append)
    key, page = (first / caption_study.KEY).read_bytes(), (first / caption_study.PAGE).read_bytes()
    caption_study.prepare(run, [], 6, 0, lines.append)
    assert (first / caption_study.KEY).read_bytes() == key and (first / caption_study.PAGE).read_bytes() == page
    former = json.loads(key)["study"]
    reviewed(first, "anna", {"measured": 3}, tmp_path / "anna.json")
    caption_study.import_reviews(run, [tmp_path / "anna.json"], lines.append)
    caption_study.prepare(run, [str(second)], 6, 0, lines.append)
    assert (first / f"lab/caption_review/key-{former}.json").read_bytes() == key
    assert not (first / caption_study.RESULT).exists()  # it was about another study
    assert any(f"key-{former}.json" in line for line in lines)
    with pytest.raises(ValueError, match="anna.json: study must be"):
        caption_study.import_reviews(run, [tmp_path / "anna.json"], lines.append)


def test_images_are_drawn_evenly_over_diagnosis_and_skin_type_and_by_the_seed_alone(runs: tuple[Path, Path]) -> None:
    run = Run(str(runs[0]))
    captions = caption_study.captions_of(run, [])
    strata = {
        row["record_id"]: (row["diagnosis"], row["skin_type"])
        for row in run.table("corpus").read(["record_id", "diagnosis", "skin_type"]).to_pylist()
    }
    drawn = caption_study.draw(run, captions, 8, 3)["record_id"].to_pylist()
    sizes = Counter(strata.values())
    got = Counter(strata[i] for i in drawn)
    assert len(set(drawn)) == 8
    assert all(got[stratum] <= -(-8 // len(sizes)) + 1 for stratum in got) and len(got) == min(8, len(sizes))
    assert drawn == caption_study.draw(run, captions, 8, 3)["record_id"].to_pylist()
    assert drawn != caption_study.draw(run, captions, 8, 4)["record_id"].to_pylist()
    assert len(caption_study.draw(run, captions, 100, 3)) == 24


def test_what_cannot_be_studied_is_refused_in_one_sentence(
    runs: tuple[Path, Path], tmp_path: Path, factory_command: Callable[..., Any]
) -> None:
    first, second = runs
    file = tmp_path / "a.json"
    file.write_text("{}")

    def refusal(*arguments: object) -> str:
        said = factory_command("evaluate", *arguments, "--run", first)
        assert said.status == 2 and not said.err.strip().count("\n")
        return str(said.err)

    assert "--with and --reviews must go with `evaluate captions`" in refusal("gate", "--with", second)
    assert "--reviews must belong to a study" in refusal("captions", "--reviews", file)
    assert "--reviews must come without --with" in refusal("captions", "--reviews", file, "--with", second)
    assert "--with must be RUN or NAME=RUN, got '=x'" in refusal("captions", "--with", "=x")
    assert "a name of its own, got vision twice" in refusal("captions", "--with", second, "--with", second)
    other = tmp_path / "other"
    write_captions(other, [{"record_id": "f" * 32, "diagnosis": "nevus", "skin_type": "II"}] * 1, "far", 0)
    assert "got none that measured, far share; caption one corpus" in refusal("captions", "--with", other)
    assert "captions" in refusal("captions", "--with", tmp_path / "nowhere")
