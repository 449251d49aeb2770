"""What the report is built from: plain data, and how a run gives it.

What the lab measured lies in RUN/lab as JSON, as its functions return it: `worth.json` (`lab.worth.run_worth`),
`near_copies.json` (`lab.lineage.nearest_real`), `gate_accuracy.json` (`lab.planted`), `caption_accuracy.json`
(`lab.truth`), `caption_comparison.json` (`lab.captions.compare`), `caption_review.json` (`lab.reviews.summarize`),
`scaling.json` (`runtime.scaling.measure`), `dermae_table.json` (`lab.dermae.run_table`), `theta_sweep.json` and
`prompt_banks.json` (`lab.sweeps`), `validation_noise.json` (`lab.validation_noise`) and `gated/*.json`, what clients of
the gate over HTTP found (`examples/gate_client.py --out RUN/lab/gated/NAME.json`).
What is absent is None, and the report says which command makes it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from factory.records import ACCEPTED, MADE_BY, REJECTED, accepted
from factory.release import licences
from factory.release.corpus.facts import COLUMNS, CorpusFacts, of_run
from factory.release.pictures import stratified
from factory.release.provenance import Fit, RunFacts, as_store, fits_of, parents_of, read_json, run_facts
from factory.run import Run
from factory.storage import Store
from factory.tables import Table

# What makes each input, after `factory` and before `--run RUN`.
COMMANDS: dict[str, str] = {
    **MADE_BY, "fits": "fit lora", "worth": "evaluate worth", "gate": "evaluate gate",
    "caption_accuracy": "evaluate captions", "near_copies": "evaluate near_copies",
    "caption_review": "evaluate captions --reviews FILE_OR_FOLDER",
}  # fmt: skip

SWEEPS = ("lab/theta_sweep.json", "lab/prompt_banks.json")
NUM_ACCEPTED, NUM_REJECTED, NUM_REAL_EACH = 48, 16, 5
_MAX_PARTS = 16  # pictures come from so many parts at most, so that a report on a million samples reads 1 GB, not 100

_CORPUS = [*COLUMNS, "true_asymmetry"]
_PLAN = ["diagnosis", "skin_type"]
_SAMPLES = [
    "sample_id", "generator", "diagnosis", "skin_type", "outcome", "reason", "calls_run", "num_inference_steps", "iou",
]  # fmt: skip
_SHOWN = ["sample_id", "diagnosis", "skin_type", "prompt", "iou", "seed", "outcome", "reason", "image", "mask"]
_SHOWN_REAL = ["row_id", "source", "source_id", "diagnosis", "skin_type", "image", "mask"]


@dataclass(frozen=True)
class Gated:
    """What a client of the gate was answered about a folder of images: overlaps, outcomes by name, and theta where all
    images were held to one."""

    name: str
    overlaps: list[float]
    accepted: int
    reasons: dict[str, int]
    theta: float | None

    @property
    def median(self) -> float | None:
        return statistics.median(self.overlaps) if self.overlaps else None


def gated(store: Store) -> list[Gated]:
    """Of every file below lab/gated, by name."""
    paths = sorted(path for path in store.list("lab/gated") if path.endswith(".json"))
    return [_gated(Path(path).stem, list(read_json(store, path)["rows"].values())) for path in paths]


def _gated(name: str, rows: list[dict[str, Any]]) -> Gated:
    thetas = {row["theta"] for row in rows}
    return Gated(
        name.replace("_", " "), [row["iou"] for row in rows if row["iou"] is not None],
        sum(row["verdict"] == ACCEPTED for row in rows), Counter(row["reason"] for row in rows if row["reason"]),
        thetas.pop() if len(thetas) == 1 else None,
    )  # fmt: skip


@dataclass(frozen=True)
class ReportInputs:
    """Everything on the page. Tables carry the columns above and need no images; `shown` and `real` do.

    corpus, captions, plan, samples: rows without pictures, or None where the table is not sealed. corpus_facts: what
    is counted on the corpus.
    shown: accepted and rejected samples to draw. real: corpus rows to draw beside them.
    worth, gate, caption_accuracy, near_copies, caption_attributes, caption_comparison, caption_review, scaling,
    dermae, validation_noise: what the lab returned, or None; sweeps: of theta and of prompt banks, those that were run.
    """

    facts: RunFacts
    corpus: pa.Table | None = None
    captions: pa.Table | None = None
    plan: pa.Table | None = None
    samples: pa.Table | None = None
    shown: pa.Table | None = None
    real: pa.Table | None = None
    corpus_facts: CorpusFacts | None = None
    verdict: licences.Verdict | None = None
    fits: list[Fit] = field(default_factory=list)
    worth: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    caption_accuracy: dict[str, Any] | None = None
    near_copies: dict[str, Any] | None = None
    caption_attributes: dict[str, Any] | None = None
    caption_comparison: dict[str, Any] | None = None
    caption_review: dict[str, Any] | None = None
    scaling: dict[str, Any] | None = None
    dermae: dict[str, Any] | None = None
    gated: list[Gated] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    validation_noise: dict[str, Any] | None = None

    @property
    def phantom(self) -> bool:
        """Whether the corpus is phantoms alone, whose truth is known."""
        if self.corpus is None or self.corpus["true_asymmetry"].null_count == self.corpus.num_rows:
            return False
        return bool(pc.all(_is_phantom(self.corpus)).as_py())


def collect(run: Run | Store | str | Path, weights: Sequence[licences.Parent] = ()) -> ReportInputs:
    """Read a run for its report. `weights` are parents that the run does not name itself, as in `parents_of`."""
    store = as_store(run)
    corpus, samples = Table(store, "corpus"), Table(store, "samples")
    light_corpus, light_samples = _light(corpus, _CORPUS), _light(samples, _SAMPLES)
    parents = parents_of(store, weights)
    return ReportInputs(
        facts=run_facts(store),
        corpus=light_corpus,
        captions=_light(Table(store, "captions"), ["captioner", "outcome", "reason"]),
        plan=_light(Table(store, "plan"), _PLAN),
        samples=light_samples,
        shown=_shown(samples, light_samples),
        real=_real(corpus, light_corpus),
        corpus_facts=of_run(store, light_corpus),
        verdict=licences.join(parents) if parents else None,
        fits=fits_of(store),
        worth=read_json(store, "lab/worth.json"),
        gate=read_json(store, "lab/gate_accuracy.json"),
        caption_accuracy=read_json(store, "lab/caption_accuracy.json"),
        near_copies=read_json(store, "lab/near_copies.json"),
        caption_attributes=read_json(store, "lab/caption_attributes.json"),
        caption_comparison=read_json(store, "lab/caption_comparison.json"),
        caption_review=read_json(store, "lab/caption_review.json"),
        scaling=read_json(store, "lab/scaling.json"),
        dermae=read_json(store, "lab/dermae_table.json"),
        gated=gated(store),
        validation_noise=read_json(store, "lab/validation_noise.json"),
        sweeps=[found for path in SWEEPS if (found := read_json(store, path))],
    )


def _light(table: Table, columns: list[str]) -> pa.Table | None:
    return None if table.manifest() is None else table.read(columns)


def _is_phantom(corpus: pa.Table) -> pa.ChunkedArray:
    """True where a corpus row is a phantom; unreadable rows do not make a corpus real."""
    return pc.or_(pc.is_valid(corpus["true_asymmetry"]), pc.not_equal(corpus["outcome"], ACCEPTED))


def _shown(table: Table, light: pa.Table | None) -> pa.Table | None:
    """Accepted samples, even over diagnoses, then rejected ones, even over reasons."""
    if light is None:
        return None
    near = within_parts(table, light)
    accepted = _pick(near, ACCEPTED, "diagnosis", "sample_id", NUM_ACCEPTED)
    rejected = _pick(near, REJECTED, "reason", "sample_id", NUM_REJECTED)
    return fetch(table, _SHOWN, "sample_id", accepted + rejected)


def _real(table: Table, light: pa.Table | None) -> pa.Table | None:
    """Corpus images, even over diagnoses; real ones where there are any, else phantoms."""
    if light is None:
        return None
    near = within_parts(table, light)
    photographs = near.filter(pc.is_null(near["true_asymmetry"]))
    chosen = photographs if photographs.filter(accepted()).num_rows else near
    count = NUM_REAL_EACH * max(1, len(chosen["diagnosis"].unique()))
    return fetch(table, _SHOWN_REAL, "row_id", _pick(chosen, ACCEPTED, "diagnosis", "row_id", count))


def _pick(table: pa.Table, outcome: str, group: str, identity: str, count: int) -> list[str]:
    rows = table.filter(pc.equal(table["outcome"], outcome))
    ids = rows[identity].to_pylist()
    return [ids[i] for i in stratified(rows[group].to_pylist(), ids, count)]


def _parts(table: Table) -> list[int]:
    """Positions in the manifest of at most _MAX_PARTS parts, evenly spread."""
    total = len(table.sealed().parts)
    return sorted({round(i) for i in np.linspace(0, total - 1, min(total, _MAX_PARTS))})


def within_parts(table: Table, light: pa.Table) -> pa.Table:
    """The rows of a whole-table read that lie in the parts pictures are taken from."""
    starts = np.cumsum([0] + [info.rows for info in table.sealed().parts])
    return pa.concat_tables([light.slice(starts[i], starts[i + 1] - starts[i]) for i in _parts(table)])


def fetch(table: Table, columns: list[str], identity: str, ids: list[str]) -> pa.Table:
    """The rows with these ids, in this order, with their pictures."""
    wanted = pc.field(identity).isin(pa.array(ids, pa.string()))  # typed: there may be none
    found = [
        pq.read_table(table.store.open(table.part_path(table.sealed().parts[i].part)), columns=columns, filters=wanted)
        for i in _parts(table)
    ]
    rows = pa.concat_tables([t.replace_schema_metadata(None) for t in found])
    place = {identifier: i for i, identifier in enumerate(rows[identity].to_pylist())}
    return rows.take(pa.array([place[identifier] for identifier in ids], pa.int64()))
