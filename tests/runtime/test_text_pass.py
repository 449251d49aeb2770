"""The text pass: each prompt embedded once, before; who draws has no text encoder, and draws the same."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from tiny_flux import LENGTH, save_pipeline

from factory import line
from factory.models.flux import FluxDenoiser, embedding_shape
from factory.models.kept_prompts import KeptPrompts
from factory.models.weights import generator_digest
from factory.recipe import GateSection, Recipe, load
from factory.run import Run
from factory.runtime import cluster, text_pass
from factory.runtime import synthesize as pipeline
from factory.stages.synthesize import SynthesizeSamples
from factory.storage import LocalStore

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test


class Unjudged(SynthesizeSamples):
    """The stage without a gate."""

    def __init__(self, weights: str, adapter: Any, section: Any, gate_section: Any, gate: Any, *more: Any) -> None:
        super().__init__(weights, adapter, section, gate_section, None, *more)
        assert self.prompts is not None and self.denoiser.text_encoder_2 is None  # type: ignore[attr-defined]


class UnjudgedUnit(pipeline.SynthesizeUnit):
    def stage(self) -> type[SynthesizeSamples]:
        return Unjudged


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def recipe(base: Path) -> Recipe:
    return load(
        "smoke",
        [
            f"synthesize.weights={base}", "plan.generator=flux", "plan.size=32", "plan.diagnoses=[nevus, melanoma]",
            "plan.skin_types=[I, V]", "plan.count=12", "plan.unit_rows=4", "plan.num_inference_steps=2",
            "synthesize.num_actors=1", "synthesize.slots=2",
        ],
    )  # fmt: skip


@pytest.mark.usefixtures("ray_cluster")
def test_prompts_are_embedded_once_before_and_who_draws_reads_them(base: Path, recipe: Recipe, tmp_path: Path) -> None:
    run, said = Run(tmp_path), list[str]()
    line.plan(run, recipe, said.append)
    paths: dict[str, str | None] = {"generator": str(base), "adapter": None}
    with cluster.connect() as resources:
        pools = cluster.pools(resources, recipe)
        digests = {"generator": generator_digest(base), "gate": ""}
        pipeline.synthesize(run, recipe, pools, digests, paths, nullcontext(), said.append, UnjudgedUnit)
        kept = text_pass.kept_prompts(run.uri, recipe, str(base), None, False)
        planned = run.table("plan").read().to_pylist()
        wanted = {row["prompt"] for row in planned} | {""}
        assert len(run.store.list(kept.folder)) == len(wanted) and kept.missing(wanted) == []
        (told,) = [text for text in said if text.startswith("prompts")]
        assert f"{len(wanted)}/{len(wanted)} rows" in told
        run.store.delete(run.store.list(kept.folder)[0])
        assert text_pass.embed(run, recipe, paths, pools, [0, 1, 2], said.append)
        assert "1/1 rows" in said[-1] and kept.missing(wanted) == []
    alone = SynthesizeSamples(base, None, recipe.synthesize, GateSection(), None, family="flux", gpu=False)
    rows = {row["sample_id"]: row for row in run.table("samples").read().to_pylist()}
    for row in alone([row for row in planned if row["unit"] == 1]):
        assert rows[row["sample_id"]]["image"] == row["image"]
    assert len(rows) == 12 and run.verify() == []


def test_more_than_the_cache_takes_is_embedded_by_who_draws(base: Path, recipe: Recipe, tmp_path: Path) -> None:
    run, said = Run(tmp_path), list[str]()
    line.plan(run, recipe, lambda text: None)
    small = recipe.model_copy(update={"synthesize": recipe.synthesize.model_copy(update={"prompt_cache_gib": 0})})
    pools = cluster.Pools(synthesize=1, gate_replicas=1, tasks=1, num_threads=1, gpus_per_actor=0)
    paths: dict[str, str | None] = {"generator": str(base), "adapter": None}
    assert not text_pass.embed(run, small, paths, pools, [0], said.append)
    (told,) = said
    assert "GiB when embedded are above synthesize.prompt_cache_gib=0: they are embedded by who draws them" in told
    assert not text_pass.embed(run, recipe, paths, pools, [], said.append) and len(said) == 1


def test_a_prompt_is_read_as_it_was_kept_and_one_that_is_not_there_is_named(base: Path, tmp_path: Path) -> None:
    whole = FluxDenoiser.load(base, max_sequence_length=LENGTH)
    wanted = ["a nevus", "", "a melanoma"]
    embedded = whole.condition(wanted)
    for dtype in (torch.float32, torch.bfloat16):
        kept = KeptPrompts(LocalStore(tmp_path), f"encoder {dtype}", dtype)
        kept.put(wanted, embedded)
        assert torch.equal(kept.read(wanted), embedded.to(dtype).float()) and kept.missing(["b", *wanted]) == ["b"]
    reads = FluxDenoiser.load(base, max_sequence_length=LENGTH, prompts=kept)
    assert torch.equal(reads.condition(wanted), embedded.bfloat16().float()) and reads.digest == whole.digest
    assert embedding_shape(base, None) == (513, embedded.shape[2])
    with pytest.raises(FileNotFoundError, match="prompt 'a scar' must be embedded before it is drawn, got none"):
        reads.condition(["a scar"])
