"""The card beside fitted weights: on which data, from which base, under which licences, how many parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import captioned_run, corpus_rows
from tiny_sd import save_pipeline

from factory import recipe
from factory.fits.checkpoint import FREE
from factory.fits.joint import FitLora
from factory.fits.joint_arms import FitCascaded, FitPixel4
from factory.fits.loop import train
from factory.models.weights import FAMILIES, generator_digest, tree_digest
from factory.recipe import MaeSection, Recipe
from factory.run import Run
from factory.runtime import fit, licences


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight phantoms, four of them for training, of two licences and one without; the others are under a third."""
    rows = corpus_rows(8, 32)
    of_training = iter(["Apache-2.0", "CC-BY-4.0", "Apache-2.0", None])
    for row in rows:
        row["licence"] = next(of_training) if row["split"] == "train" else "CC-BY-NC-4.0"
    return captioned_run(tmp_path_factory.mktemp("run"), rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_pipeline(tmp_path_factory.mktemp("sd"))
    (folder / "README.md").write_text("---\nlicense: openrail++\ntags: [a]\n---\n# A base\n")
    return folder


def asked(base: Path, *overrides: str) -> Recipe:
    small = ["fit.lora.steps=1", "fit.lora.batch_size=2", "fit.lora.rank=2", "plan.size=32"]
    return recipe.load(None, [f"synthesize.weights={base}", *small, *overrides])


@pytest.mark.parametrize(
    ("overrides", "kind", "told"),
    [
        ([], FitLora, {"mode": "lora", "encoding": "latent8", "pipeline": "joint"}),
        (["fit.lora.train_mode=full"], FitLora, {"mode": "full", "encoding": "latent8", "pipeline": "joint"}),
        (["fit.lora.joint.encoding=pixel4"], FitPixel4, {"mode": "lora", "encoding": "pixel4", "pipeline": "joint"}),
        (["fit.lora.joint.pipeline=cascaded"], FitCascaded, {"mode": "lora", "pipeline": "cascaded"}),
    ],
)
def test_a_card_says_all_that_binds_weights_and_all_that_they_cost(
    run: Run, base: Path, tmp_path: Path, overrides: list[str], kind: type, told: dict[str, Any]
) -> None:
    wanted = asked(base, *overrides)
    objective = fit._objective(run.uri, wanted, "lora")
    assert type(objective) is kind
    (tmp_path / "weights").mkdir()
    objective.save(train(objective, wanted.fit.lora, tmp_path / "fit"), tmp_path / "weights")
    inputs = fit._inputs(run, wanted, "lora")
    fit._complete_card(run, wanted, "lora", tmp_path / "weights", inputs)
    card = json.loads((tmp_path / "weights" / "card.json").read_text())
    files = list((tmp_path / "weights").rglob("*.safetensors"))
    assert card["params"] == sum(value.numel() for file in files for value in load_file(file).values())
    assert card["bytes"] == sum(file.stat().st_size for file in files)
    assert card["digest"] == tree_digest(tmp_path / "weights")
    assert card["inputs"]["tables"] == {name: run.table(name).digest() for name in ("corpus", "captions")}
    assert card["inputs"]["section"] == wanted.fit.lora.model_dump(
        mode="json", exclude=FREE | set(FAMILIES) - {"joint"}
    )
    assert card["base"] == {"name": str(base), "licence": "openrail++", "digest": generator_digest(base)}
    assert card["licence"] == "Apache-2.0 AND CC-BY-4.0 AND openrail++ AND unknown"  # what is tested on binds nothing
    assert card["objective"] == "lora" and told.items() <= card.items() and card["dropped"] == {}


def test_the_gates_card_is_of_its_phantoms_and_its_base(run: Run, base: Path, tmp_path: Path) -> None:
    for weights, licence in ((base, "Apache-2.0 AND openrail++"), ("starter", "Apache-2.0")):
        wanted = asked(base, f"synthesize.weights={weights}")
        inputs = fit._inputs(run, wanted, "gate")
        fit._complete_card(run, wanted, "gate", _weights(tmp_path / str(len(licence))), inputs)
        card = json.loads((tmp_path / str(len(licence)) / "card.json").read_text())
        assert card["licence"] == licence and card["base"]["name"] == str(weights)


def _weights(folder: Path) -> Path:
    from factory.models.segmenter import LatentSegmenter, save_segmenter

    save_segmenter(LatentSegmenter(factor=2, width=8), folder, "of a vae")
    return folder


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, "unknown"),
        ({"README.md": "no front matter"}, "unknown"),
        ({"README.md": "---\nlicense: [mit\n---\n"}, "unknown"),
        ({"README.md": "---\n- a list\n---\n"}, "unknown"),
        ({"README.md": "---\nlicense: mit\n---\nwords", "LICENSE.md": "the text"}, "mit"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n"},
            "flux-1-dev-non-commercial-license",
        ),
        ({"README.md": "---\nlicense: other\n---\n"}, "other"),
        ({"README.md": "---\nlicense: [cc0-1.0, mit]\n---\n"}, "cc0-1.0 AND mit"),
        ({"README.md": "# words", "LICENSE.md": "the text"}, "LICENSE.md"),
        ({"COPYING": "the text"}, "COPYING"),
        ({"card.json": '{"licence": "CC-BY-4.0"}', "README.md": "---\nlicense: mit\n---\n"}, "CC-BY-4.0"),
        ({"card.json": "not JSON"}, "unknown"),
    ],
)
def test_a_bases_licence_is_what_its_directory_states(tmp_path: Path, files: dict[str, str], licence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licences.of_base(tmp_path) == licence


def test_licences_are_joined_each_once_in_order() -> None:
    assert licences.joined(["B AND A", "A", "C"]) == "A AND B AND C"
    assert licences.joined([]) == "unknown"


def test_weights_of_a_version_that_lacked_a_field_are_those_of_its_default(run: Run, base: Path) -> None:
    wanted = asked(base)
    inputs = fit._inputs(run, wanted, "lora")
    older = json.loads(json.dumps(inputs))
    del older["section"]["precision"], older["section"]["joint"]["edge_weight"]
    assert fit._same(older, inputs, wanted.fit.lora)
    assert not fit._same(older, fit._inputs(run, asked(base, "fit.lora.precision=bfloat16"), "lora"), wanted.fit.lora)
    assert not fit._same(older | {"base": "another"}, inputs, wanted.fit.lora)
    assert not fit._same({"section": None}, inputs, wanted.fit.lora)
    masked = {"section": MaeSection().model_dump(mode="json")}
    older_mae = {"section": {name: value for name, value in masked["section"].items() if name != "beta2"}}
    assert fit._same(masked, masked, MaeSection()) and not fit._same(older_mae, masked, MaeSection())  # it was 0.999
    older["section"]["gone"] = 1  # a field that this version does not know may have meant anything
    assert not fit._same(older, inputs, wanted.fit.lora)


def test_what_an_encoder_begins_from_binds_it(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    public, weights = tmp_path / "public", tmp_path / "weights"
    for folder in (public, weights):
        folder.mkdir()
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (public / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    for named, licence in ((None, ""), (public / "model.safetensors", " AND cc-by-nc-4.0")):
        wanted = recipe.load(None, [] if named is None else [f"fit.mae.weights={named}"])
        fit._complete_card(run, wanted, "mae", weights, {})
        card = json.loads((weights / "card.json").read_text())
        assert card["licence"] == "Apache-2.0 AND CC-BY-4.0" + licence + " AND unknown"
