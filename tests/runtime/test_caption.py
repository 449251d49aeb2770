"""Captions by a model on a real Ray: every image once, whatever the endpoint does, and a cap that loses nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stub_endpoint import good, serving
from tiny_vlm import save_qwen

from factory import line
from factory.progress import Stopped
from factory.recipe import CaptionSection, Recipe, load
from factory.run import Run
from factory.runtime import vllm
from factory.runtime.caption import fingerprint
from factory.runtime.cluster import Pools
from factory.runtime.units import CommitTable
from factory.tables import StaleTable

pytestmark = pytest.mark.usefixtures("ray_cluster")
UNITS, ROWS = 4, 6


def drive(uri: Path, recipe: Recipe, step: str) -> list[str]:
    said: list[str] = []
    with line.driving(str(uri), recipe, step) as run:
        getattr(line, step)(run, recipe, said.append)
    return said


def recipe_for(*overrides: str) -> Recipe:
    corpus = [f"corpus.phantoms.count={UNITS * ROWS}", f"corpus.unit_rows={ROWS}", "corpus.phantoms.size=64"]
    corpus += ["corpus.min_side=64", "corpus.scales=[64]"]
    return load("smoke", [*corpus, *overrides])


def by_http(address: str, *overrides: str) -> Recipe:
    http = ["name=tiny", "backoff_s=0.01", "max_wait_s=0.05", "tries=2", "timeout_s=10", *overrides]
    return recipe_for("caption.captioner=http", f"caption.model={address}", *(f"caption.http.{one}" for one in http))


def captions_of(uri: Path) -> list[dict[str, Any]]:
    return Run(uri).table("captions").read().to_pylist()


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("runs") / "ingested"
    drive(uri, recipe_for(), "ingest")
    return uri


@pytest.fixture
def run(ingested: Path, tmp_path: Path) -> Path:
    shutil.copytree(ingested, tmp_path / "run")
    return tmp_path / "run"


def test_no_row_is_lost_to_an_endpoint_that_misbehaves(run: Path) -> None:
    order: dict[str, int] = {}

    def answer(image: str, nth: int) -> Any:
        k = order.setdefault(image, len(order))
        return {0: (500, {}, b""), 1: (429, {}, b""), 2: (200, {}, b"<html>"), 3: good("qwertz")}.get(k % 6, good())

    with serving(answer) as endpoint:
        drive(run, by_http(endpoint.address), "caption")
    rows = captions_of(run)
    wanted = [row["record_id"] for row in Run(run).table("corpus").read(["record_id"]).to_pylist()]
    assert [row["record_id"] for row in rows] == wanted and len(set(wanted)) == UNITS * ROWS
    assert Counter(row["reason"] for row in rows) == {
        None: 8, "http_500": 4, "http_429": 4, "garbage": 4, "invalid_answer": 4,
    }  # fmt: skip
    assert {row["raw_text"] for row in rows if row["reason"] == "invalid_answer"} == {"qwertz"}
    assert all(row["asymmetry"] is not None for row in rows)  # measured whatever was answered
    assert Run(run).verify() == []
    assert "stated" not in drive(run, recipe_for(*_same(run)), "plan")[-1]  # planning goes on with what was measured


def _same(run: Path) -> list[str]:
    recipe = Run(str(run)).recipe()
    assert recipe is not None
    caption = recipe.caption
    return ["caption.captioner=http", f"caption.model={caption.model}", "caption.http.name=tiny"]


def test_the_cap_on_spend_ends_the_run_and_a_higher_one_finishes_it(run: Path) -> None:
    # An answer costs 0.2, a unit of six 1.2: two units fit under 2.9, a third does not.
    prices = ["price_in=1000", "price_out=5000", "concurrency=2"]
    with serving(lambda image, nth: good()) as endpoint:
        with pytest.raises(Stopped, match=r"max_spend 2\.9: 2\.4 is spent .* raise it and run the same command"):
            drive(run, by_http(endpoint.address, *prices, "max_spend=2.9"), "caption")
        before = _parts(run)
        assert len(before) == 2 and len(endpoint.asked) == 12 and Run(run).table("captions").manifest() is None
        with pytest.raises(Stopped, match=r"2\.4 is spent"):  # what was spent before counts
            drive(run, by_http(endpoint.address, *prices, "max_spend=2.9"), "caption")
        assert sum(endpoint.asked.values()) == 12
        drive(run, by_http(endpoint.address, *prices, "max_spend=20"), "caption")
        after = _parts(run)
        assert {name: after[name] for name in before} == before and len(after) == UNITS
        assert set(endpoint.asked.values()) == {1} and len(endpoint.asked) == UNITS * ROWS
        assert "nothing to do" in drive(run, by_http(endpoint.address, "max_spend=null"), "caption")[-1]
        with pytest.raises(StaleTable, match=r"weights\.captioner was .*, is "):
            drive(run, by_http(endpoint.address, "name=other"), "caption")
        with pytest.raises(StaleTable, match=r"weights\.prompt was .*, is "):
            drive(run, load(None, ["caption.prompt=dermaflux"], by_http(endpoint.address)), "caption")


def _parts(run: Path) -> dict[str, str]:
    files = sorted((run / "captions").glob("part-*.parquet"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_endpoint_that_is_down_fails_no_row(run: Path) -> None:
    with serving(lambda image, nth: good()) as endpoint:
        pass
    with pytest.raises(Stopped, match="came to nothing 3 times in a row, the last time unreachable"):
        drive(run, by_http(endpoint.address, "give_up_after=3"), "caption")
    assert _parts(run) == {}


def test_a_local_model_captions_every_image_and_its_weights_name_the_table(run: Path, tmp_path: Path) -> None:
    weights = save_qwen(tmp_path / "model")
    asked = ["caption.captioner=transformers", f"caption.model={weights}", "caption.max_new_tokens=4"]
    recipe = recipe_for(*asked, "synthesize.num_actors=1")
    drive(run, recipe, "caption")
    rows = captions_of(run)
    assert len(rows) == UNITS * ROWS and all(row["raw_text"] is not None for row in rows)
    assert {row["captioner"] for row in rows} == {"transformers"}
    assert {row["model_digest"] for row in rows} == {fingerprint(Run(run), recipe)["weights.captioner"]}
    save_qwen(weights, seed=1)
    with pytest.raises(StaleTable, match=r"weights\.captioner was .*, is "):
        drive(run, recipe, "caption")


# ---- vLLM, with a stand-in for its engine


def test_without_vllm_the_request_is_refused_with_the_remedy(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have vLLM installed, got none; install dermafactory\[vllm\]"):
        drive(run, recipe_for("caption.captioner=vllm", f"caption.model={tmp_path}"), "caption")


def test_rows_that_come_back_from_engines_are_gathered_into_units(run: Path, tmp_path: Path) -> None:
    weights = save_qwen(tmp_path / "model")
    recipe = recipe_for("caption.captioner=vllm", f"caption.model={weights}")
    opened, section = Run(run), recipe.caption

    def pretend(row: dict[str, Any]) -> dict[str, Any]:
        """What the engine would add to a row; the second of every unit failed."""
        if row["place"] == 1:
            return {**row, "__inference_error__": "too long", "generated_text": None}
        text = "The mole is symmetrical with smooth borders; it is black."
        return {**row, "generated_text": text, "num_input_tokens": 9, "num_generated_tokens": 3}

    def engine(rows: Any) -> Any:
        asked = rows.map(vllm.preprocess, fn_kwargs={"section": section}).map(pretend)
        return asked.map(vllm.postprocess).random_shuffle(seed=1)

    table = opened.table("captions")
    pools = Pools(1, 1, 1, 1, 0.0)
    committed = list(vllm.pool(opened, recipe, pools, range(UNITS), CommitTable(table), processor=engine))
    assert sorted(one["unit"] for one in committed) == list(range(UNITS)) and table.parts() == list(range(UNITS))
    assert all((one["accepted"], one["failed"]) == (ROWS - 1, 1) for one in committed)
    table.seal(UNITS, {"x": "y"}, {})
    rows = captions_of(run)
    wanted = [row["record_id"] for row in opened.table("corpus").read(["record_id"]).to_pylist()]
    assert [row["record_id"] for row in rows] == wanted
    assert {row["reason"] for row in rows} == {None, "generation_failed"}


def test_the_engines_configuration_is_one_that_ray_accepts(make_config: Callable[[], Any]) -> None:
    config = make_config()
    assert config.model_source == "models/qwen" and config.batch_size == 4 and config.concurrency == 2
    assert config.should_continue_on_error and config.prepare_multimodal_stage == {"enabled": True}
    section = CaptionSection(captioner="vllm", model="models/qwen", max_new_tokens=32)
    row = {"unit": 1, "place": 2, "rows": 3, "prompt": "describe", "image": np.zeros(4, np.uint8).tobytes()}
    made = vllm.preprocess(row, section)
    assert made["sampling_params"]["structured_outputs"]["json"]["required"][0] == "asymmetry"
    assert made["sampling_params"]["max_tokens"] == 32 and made["sampling_params"]["temperature"] == 0.0
    assert (
        "structured_outputs"
        not in vllm.preprocess(row, section.model_copy(update={"answer": "text"}))["sampling_params"]
    )
    assert made["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.fixture
def make_config() -> Callable[[], Any]:
    section = CaptionSection(captioner="vllm", model="models/qwen", batch_size=4)
    return lambda: vllm.engine_config(section, 2)
