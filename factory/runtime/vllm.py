"""Captions by vLLM through `ray.data.llm`: rows stream through its engines and are gathered into units again.

The engine keeps its batch full across units, so rows travel singly: units -> rows -> engine -> rows of one unit
together -> captions -> commit. A unit is committed only when all its rows have come back.

vLLM itself was never run with this module: it needs a GPU and pins its own torch. What is tested are the engine's
configuration, which Ray's own class checks, the functions before and after the engine, and the gathering, with a
stand-in for the engine. Current vLLM serves Qwen-VL and Gemma/MedGemma; it no longer serves Llama 3.2 Vision, for
which there is the transformers backend. An answer that is not valid is not asked for again here: decoding is
constrained by the schema, so what is left are answers cut at `max_new_tokens`.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from factory import records
from factory.models.captioners.answer import schema
from factory.models.captioners.protocol import Answer
from factory.recipe import CaptionSection, Recipe
from factory.run import Run
from factory.runtime.cluster import ACTOR_CPUS, Pools
from factory.runtime.units import CommitTable, stream_of


def require_vllm() -> None:
    """Raises ValueError, with the remedy, where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "caption.captioner vllm must have vLLM installed, got none; install dermafactory[vllm] in an environment "
            "with a GPU, or choose transformers."
        )


def engine_config(section: CaptionSection, num_engines: int) -> Any:
    """The `vLLMEngineProcessorConfig` of a recipe: a local model, one image per prompt, errors kept to their rows."""
    from ray.data.llm import vLLMEngineProcessorConfig

    return vLLMEngineProcessorConfig(
        model_source=section.model or "",
        engine_kwargs={"limit_mm_per_prompt": {"image": 1}, "trust_remote_code": False, "load_format": "safetensors"},
        batch_size=section.batch_size,
        concurrency=num_engines,
        prepare_multimodal_stage={"enabled": True},
        should_continue_on_error=True,
    )


def preprocess(row: dict[str, Any], section: CaptionSection) -> dict[str, Any]:
    """A row (`unit`, `place`, `rows`, `prompt`, `image` as PNG) with what the engine is given."""
    image = "data:image/png;base64," + base64.b64encode(row["image"]).decode()
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": row["prompt"]}]
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": section.max_new_tokens}
    if section.answer == "json":
        sampling["structured_outputs"] = {"json": schema()}
    kept = {name: row[name] for name in ("unit", "place", "rows")}
    return {**kept, "messages": [{"role": "user", "content": content}], "sampling_params": sampling}


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row that comes from the engine: its place, and its text or the fact that there is none."""
    failed = bool(row.get("__inference_error__"))
    return {
        "unit": row["unit"],
        "place": row["place"],
        "rows": row["rows"],
        "text": None if failed else row.get("generated_text"),
        "problem": "generation_failed" if failed else "",
        "tokens_in": int(row.get("num_input_tokens") or 0),
        "tokens_out": int(row.get("num_generated_tokens") or 0),
    }


class RowsOfUnits:
    """A unit of the corpus as the rows that are asked about."""

    def __init__(self, run_uri: str, section: CaptionSection) -> None:
        self.describe, self.read = _described(run_uri, section)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        unit = int(batch["unit"])
        rows = [row for row in self.read(unit).to_pylist() if row["outcome"] == records.ACCEPTED]
        for place, row in enumerate(rows):
            prompt = self.describe.instruction.worded(self.describe.label_told(row))
            yield {"unit": unit, "place": place, "rows": len(rows), "prompt": prompt, "image": row["image"]["bytes"]}


class GatherUnits:
    """Answers in any order to whole units of captions: a unit goes on when its last row has come.

    There is one of these, which holds the answers of units that are not whole yet. If it dies, so do they: their
    units are missing at the end, and the same command makes them.
    """

    def __init__(self, run_uri: str, section: CaptionSection) -> None:
        self.describe, self.read = _described(run_uri, section)
        self.waiting: dict[int, dict[int, Answer]] = {}

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        whole: list[tuple[int, bytes, None]] = []
        for unit, place, total, text, problem, used_in, used_out in zip(
            *(batch[name] for name in ("unit", "place", "rows", "text", "problem", "tokens_in", "tokens_out")),
            strict=True,
        ):
            answer = Answer(text, problem or None, int(used_in), int(used_out))
            self.waiting.setdefault(int(unit), {})[int(place)] = answer
            if len(self.waiting[int(unit)]) == int(total):
                whole.append((int(unit), self._captions(int(unit)), None))
        units, streams, stopped = zip(*whole, strict=True) if whole else ((), (), ())
        columns = [pa.array(units, pa.int64()), pa.array(streams, pa.large_binary()), pa.array(stopped, pa.string())]
        return pa.table(columns, names=["unit", "rows", "stopped"])

    def _captions(self, unit: int) -> bytes:
        answers = self.waiting.pop(unit)
        rows = [row for row in self.read(unit).to_pylist() if row["outcome"] == records.ACCEPTED]
        made = [self.describe.row(row, answers[place], 1) for place, row in enumerate(rows)]
        return stream_of(records.rows_to_table("captions", made))


def pool(
    run: Run,
    recipe: Recipe,
    pools: Pools,
    units: Sequence[int],
    commit: CommitTable,
    processor: Callable[[Any], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Units of captions, committed; yields what was. `processor` stands in for the engine in tests."""
    if not units:
        return
    import ray
    from ray.data import ActorPoolStrategy

    if processor is None:
        require_vllm()
        processor = _engine(recipe.caption, pools.synthesize)
    arguments = (run.uri, recipe.caption)
    corpus = run.table("corpus").sealed()
    empty = [unit for unit in units if not corpus.parts[unit].outcomes.get(records.ACCEPTED)]
    for unit in empty:  # nothing to ask, so nothing comes back that could complete it
        nothing = pa.scalar(stream_of(records.rows_to_table("captions", [])), pa.large_binary())
        yield commit._commit(pa.scalar(unit), nothing, pa.scalar(None, pa.string()))
    asked = [{"unit": unit} for unit in units if unit not in set(empty)]
    if not asked:
        return
    one = ActorPoolStrategy(size=1)
    rows = ray.data.from_items(asked, override_num_blocks=len(asked)).flat_map(
        RowsOfUnits,  # type: ignore[arg-type]
        fn_constructor_args=arguments,
        compute=one,
        num_cpus=ACTOR_CPUS,
    )
    gathered = processor(rows).map_batches(
        GatherUnits, batch_size=64, fn_constructor_args=arguments, compute=one, num_cpus=ACTOR_CPUS
    )
    committed = gathered.map_batches(commit.__call__, batch_size=1, batch_format="pyarrow", num_cpus=ACTOR_CPUS)
    for batch in committed.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _engine(section: CaptionSection, num_engines: int) -> Callable[[Any], Any]:
    from ray.data.llm import build_processor

    asking = partial(preprocess, section=section)
    return build_processor(engine_config(section, num_engines), preprocess=asking, postprocess=postprocess)


def _described(run_uri: str, section: CaptionSection) -> tuple[Any, Callable[[int], pa.Table]]:
    """What asks and writes, with the digest of the model that answers elsewhere, and the corpus."""
    from factory.models.weights import tree_digest
    from factory.stages.caption import READS_BY_MODEL, DescribeImages

    describe = DescribeImages(section, _Elsewhere(tree_digest(section.model or "", "caption.model")))
    return describe, Run(run_uri).table("corpus").reader(list(READS_BY_MODEL))


class _Elsewhere:
    """The captioner of rows that an engine answers: a name and a digest."""

    name = "vllm"

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def ask(self, requests: Sequence[Any]) -> list[Answer]:
        raise RuntimeError("the engine is asked by the pipeline, not by a stage; use runtime/vllm.pool.")
