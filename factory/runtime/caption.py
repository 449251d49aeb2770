"""Captions on Ray Data: which pool each captioner gets, and what its captions depend on.

measured      actors on CPUs          transformers  one actor per GPU, as for synthesis
http          one actor with threads, so that the cap on spend is kept in one place
vllm          engines of ray.data.llm (see `vllm.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from factory import records
from factory.fingerprint import fingerprint_of
from factory.instructions import prompt_file
from factory.recipe import CaptionSection, Recipe
from factory.run import Run
from factory.runtime.cluster import Pools
from factory.runtime.units import LIGHT_UNITS, Echo, UnitStage, fill, pool


def caption(run: Run, recipe: Recipe, pools: Pools, echo: Echo = print) -> None:
    """The sealed corpus to the sealed `captions`, one part for each of its parts."""
    corpus = run.table("corpus")
    sealed = corpus.sealed()
    table, made_with = run.table("captions"), fingerprint(run, recipe)
    total = corpus.counts().get(records.ACCEPTED, 0)
    fill(table, len(sealed.parts), made_with, total, "caption", echo, pool_of(run, recipe, pools))
    table.seal(len(sealed.parts), made_with, {"corpus": corpus.digest()})


def fingerprint(run: Run, recipe: Recipe) -> dict[str, str]:
    """What the captions depend on: for a model its weights, its prompts and how it is asked, but not what it costs."""
    from factory.models.weights import STARTER, tree_digest

    section, parents = recipe.caption, {"corpus": run.table("corpus").origin()}
    masks = {"masks": tree_digest(STARTER, "caption.masks")} if section.masks == "segmenter" else {}
    found = fingerprint_of(recipe, "captions", parents, masks)
    if section.captioner == "measured":
        return found
    instruction, prefix = prompt_file(section.prompt, "instruction"), prompt_file(section.prefix, "prefix")
    digests = {"captioner": model_digest(section), "prompt": instruction.digest, "prefix": prefix.digest}
    return found | fingerprint_of(recipe, "captions by a model", {}, digests)


def model_digest(section: CaptionSection) -> str:
    """Of the weights in a directory, or of an endpoint's address and name. A ValueError where they cannot be used."""
    from factory.models.captioners.http import authorization, endpoint_digest
    from factory.models.weights import tree_digest

    if section.captioner == "vllm":
        from factory.runtime.vllm import require_vllm

        require_vllm()
    if section.captioner == "http":
        authorization(section.http)
        return endpoint_digest(section)
    return tree_digest(section.model or "", "caption.model")


def pool_of(run: Run, recipe: Recipe, pools: Pools) -> Callable[..., Any]:
    """The pool that makes units of captions: `pool(missing, commit)` yields what was committed."""
    arguments = (run.uri, recipe)
    if recipe.caption.captioner == "measured":
        return partial(pool, CaptionUnit, arguments, pools.tasks, units_per_actor=LIGHT_UNITS)
    if recipe.caption.captioner == "transformers":
        return partial(pool, DescribeUnit, arguments, pools.synthesize, num_gpus=pools.gpus_per_actor)
    if recipe.caption.captioner == "http":
        return partial(pool, AskUnit, arguments, 1)
    from factory.runtime.vllm import pool as vllm_pool

    return partial(vllm_pool, run, recipe, pools)


class CaptionUnit(UnitStage):
    """A part of the corpus to its captions, measured."""

    def __init__(self, run_uri: str, recipe: Recipe) -> None:
        from factory.stages.caption import READS, CaptionImages

        self.read = Run(run_uri).table("corpus").reader(list(READS))
        self.caption = CaptionImages(recipe.caption)

    def rows(self, unit: int) -> pa.Table:
        return records.rows_to_table("captions", self.caption(self.read(unit).to_pylist()))


class DescribeUnit(UnitStage):
    """A part of the corpus to its captions by a local model."""

    def __init__(self, run_uri: str, recipe: Recipe) -> None:
        from factory.stages.caption import READS_BY_MODEL, DescribeImages

        self.run, self.section = Run(run_uri), recipe.caption
        self.read = self.run.table("corpus").reader(list(READS_BY_MODEL))
        self.captioner = self.captioner_of(self.section)
        self.describe = DescribeImages(self.section, self.captioner)

    def captioner_of(self, section: CaptionSection) -> Any:
        """The captioner of this actor."""
        import torch

        from factory.models.captioners.transformers_vlm import TransformersCaptioner

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return TransformersCaptioner(section.model or "", section.max_new_tokens, section.batch_size, device)

    def rows(self, unit: int) -> pa.Table:
        return records.rows_to_table("captions", self.describe(self.read(unit).to_pylist()))


class AskUnit(DescribeUnit):
    """A part of the corpus to its captions by an endpoint. What committed parts have cost counts against the cap."""

    def captioner_of(self, section: CaptionSection) -> Any:
        from factory.models.captioners.http import Budget, HttpCaptioner

        return HttpCaptioner(section, Budget(section.http, self._paid()))

    def rows(self, unit: int) -> pa.Table:
        part = self.read(unit).to_pylist()
        self.captioner.begin(sum(row["outcome"] == records.ACCEPTED for row in part))
        made = records.rows_to_table("captions", self.describe(part))
        # In place at once, since it is paid for: the commit that follows finds it there, and one that never follows,
        # because the driver was killed, is not missed.
        self.run.table("captions").commit(unit, made)
        return made

    def _paid(self) -> Iterator[tuple[int, int]]:
        """Tokens in and out of each row of the parts that are there, sealed or not."""
        table = self.run.table("captions")
        for part in table.parts():
            with table.store.open(table.part_path(part)) as file:
                found = pq.read_table(file, columns=["tokens_in", "tokens_out"]).to_pylist()
            yield from ((row["tokens_in"] or 0, row["tokens_out"] or 0) for row in found)
