"""The text pass: the prompts of what is still to be drawn, embedded on Ray Data before, each once.

FLUX.1's text encoders are 9.8 GB, which a GPU that denoises has better use for. So actors of their own embed the
prompts first and are gone before the others start, which then load no encoder and read embeddings by content. The
encoders of the other families are small and stay with them. More prompts than `synthesize.prompt_cache_gib` holds (a
million of T5 would be terabytes) are embedded by who draws them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from factory import records
from factory.models.placement import gpu_at_hand, placement
from factory.progress import ProgressLine
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime.cluster import ACTOR_CPUS, Pools
from factory.runtime.units import Echo

if TYPE_CHECKING:
    from factory.models.kept_prompts import KeptPrompts

PROMPTS_AT_ONCE = 64


def embed(
    run: Run, recipe: Recipe, paths: dict[str, str | None], pools: Pools, units: Sequence[int], echo: Echo = print
) -> KeptPrompts | None:
    """Embeds what the prompts of these units of the plan lack, and returns where all are. None where who draws embeds
    them: what they would take is told, or there is nothing to gain."""
    if recipe.plan.generator != "flux" or not units:
        return None
    from factory.models.flux import embedding_shape

    generator, adapter = str(paths["generator"]), paths["adapter"]
    gpu = pools.gpus_per_actor > 0
    kept, prompts = kept_prompts(run.uri, recipe, generator, adapter, gpu), _prompts(run, units)
    length, width = embedding_shape(generator, adapter)
    needed = length * width * kept.dtype.itemsize * len(prompts)
    if needed > recipe.synthesize.prompt_cache_gib * 2**30:
        echo(
            f"prompts     {len(prompts)} of {needed / 2**30:.0f} GiB when embedded are above "
            f"synthesize.prompt_cache_gib={recipe.synthesize.prompt_cache_gib}: they are embedded by who draws them"
        )
        return None
    missing = kept.missing(["", *prompts])
    if missing:
        import ray
        from ray.data import ActorPoolStrategy

        line = ProgressLine("prompts", len(missing), echo=echo)
        parts = [missing[start : start + PROMPTS_AT_ONCE] for start in range(0, len(missing), PROMPTS_AT_ONCE)]
        made = ray.data.from_items([{"prompts": part} for part in parts], override_num_blocks=len(parts)).map_batches(
            EmbedPrompts,  # type: ignore[arg-type]
            batch_size=1,
            compute=ActorPoolStrategy(size=min(pools.synthesize, len(parts))),
            fn_constructor_args=(kept, generator, length - 1, gpu),
            num_cpus=ACTOR_CPUS,
            num_gpus=pools.gpus_per_actor or None,
            batch_format="pyarrow",
        )
        for batch in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            line.add({records.ACCEPTED: pc.sum(batch["embedded"]).as_py(), records.REJECTED: 0, records.FAILED: 0})
        line.end()
    return kept


def kept_prompts(uri: str, recipe: Recipe, generator: str, adapter: str | None, gpu: bool) -> KeptPrompts:
    """Where the prompts of a run are kept for who draws with this generator, at this place. The encoders' weights are
    read for their digest: once, by the driver."""
    import torch

    from factory.models.flux import embedding_shape
    from factory.models.kept_prompts import KeptPrompts
    from factory.models.weights import text_encoder_digest

    where = placement(recipe.synthesize.dtype, gpu)
    length = embedding_shape(generator, adapter)[0]
    digest = records.digest(text_encoder_digest(generator), str(length), where.dtype, where.device)
    return KeptPrompts(Run(uri).store, digest, getattr(torch, where.dtype))


def _prompts(run: Run, units: Sequence[int]) -> list[str]:
    """The different prompts of some units of the plan."""
    planned = run.table("plan").read(["unit", "prompt"])
    wanted = pc.is_in(planned["unit"], pa.array(units, planned["unit"].type))
    return sorted(pc.unique(planned["prompt"].filter(wanted)).to_pylist())


class EmbedPrompts:
    """Prompts to their embeddings in the run's store. Returns how many."""

    def __init__(self, kept: KeptPrompts, generator: str, max_sequence_length: int, gpu: bool) -> None:
        from factory.models.flux import FluxDenoiser

        self.kept, device = kept, "cuda" if gpu_at_hand(gpu) else "cpu"
        self.encoder = FluxDenoiser.load(
            generator, dtype=kept.dtype, max_sequence_length=max_sequence_length, encoders_only=True
        ).to(device, kept.dtype)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for prompts in batch["prompts"].to_pylist():
            self.kept.put(prompts, self.encoder.condition(prompts))
            yield pa.table({"embedded": [len(prompts)]})
