"""Where a release came from: the facts of its run, the cards of its weights, and the parents whose licences bind it.

A run says of itself, in `run.json`:

    {"recipe": {...}, "fingerprint": "5b0c...", "versions": {"dermafactory": "0.1.0", "torch": "2.13.0", ...}}

and of its weights, in `weights/<name>/card.json`: `params, bytes, data, licence, digest` and, where there is one, a
`base` with a `name` and a `licence`. Nothing here fails on what is absent; it is left out and the reader says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from factory import records
from factory.release.licences import Parent
from factory.run import Run
from factory.storage import Store, open_store
from factory.tables import Table

TABLES = ("corpus", "captions", "plan", "samples")


@dataclass(frozen=True)
class Fit:
    """A folder of weights in a run: its card as written, its logged metrics, one mapping per line, and the last grid of
    samples that was drawn while it was fitted (its step, PNG), if any was."""

    name: str
    card: dict[str, Any]
    metrics: list[dict[str, Any]]
    grid: tuple[int, bytes] | None = None

    @property
    def digest(self) -> str:
        return str(self.card.get("digest") or "")


@dataclass(frozen=True)
class RunFacts:
    """What a card and a report say of a run; empty where the run does not say."""

    name: str
    uri: str
    fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)  # sealed table -> digest of its manifest


def as_store(run: Run | Store | str | Path) -> Store:
    """The store of a run, given as such, by its store or by its address."""
    if isinstance(run, Run):
        return run.store
    return open_store(run) if isinstance(run, (str, Path)) else run


def read_json(store: Store, path: str) -> Any:
    """A JSON file of the run, or None where there is none; a damaged one is a ValueError that names it."""
    if not store.exists(path):
        return None
    try:
        return json.loads(store.read(path))
    except ValueError as error:
        raise ValueError(
            f"{path} must be JSON, got {error}; remove it and run the step that writes it again."
        ) from error


def run_facts(run: Run | Store | str | Path) -> RunFacts:
    """The facts of a run, from run.json and the manifests."""
    store = as_store(run)
    said = read_json(store, "run.json") or {}
    sealed = {name: Table(store, name) for name in TABLES}
    return RunFacts(
        name=str(store.uri).rstrip("/").rsplit("/", 1)[-1],
        uri=str(store.uri),
        fingerprint=str(said.get("fingerprint") or ""),
        versions={str(k): str(v) for k, v in (said.get("versions") or {}).items()},
        recipe=dict(said.get("recipe") or {}),
        tables={name: table.digest() for name, table in sealed.items() if table.manifest() is not None},
    )


def fits_of(run: Run | Store | str | Path) -> list[Fit]:
    """Every folder under weights/ that has a card, by name."""
    store = as_store(run)
    paths = set(store.list("weights"))
    names = sorted({path.split("/")[1] for path in paths if path.endswith("/card.json") and path.count("/") == 2})
    return [
        Fit(
            name, read_json(store, f"weights/{name}/card.json"), _metrics(store, name, paths), _grid(store, name, paths)
        )
        for name in names
    ]


def _grid(store: Store, name: str, paths: set[str]) -> tuple[int, bytes] | None:
    drawn = sorted(path for path in paths if path.startswith(f"weights/{name}/previews/step-"))
    if not drawn:
        return None
    return int(drawn[-1].rsplit("-", 1)[1].removesuffix(".png")), store.read(drawn[-1])


def _metrics(store: Store, name: str, paths: set[str]) -> list[dict[str, Any]]:
    path = f"weights/{name}/metrics.jsonl"
    if path not in paths:
        return []
    return [json.loads(line) for line in store.read(path).decode().splitlines() if line.strip()]


def parents_of(run: Run | Store | str | Path, weights: Sequence[Parent] = ()) -> list[Parent]:
    """Everything whose licence binds the accepted samples.

    That is the corpus rows in training (or named as a sample's parent), one entry per source and licence; the weights
    under the run whose digest a sample names or that were fitted to a generator, with their bases; and `weights`,
    which the caller knows (the starter, a diffusers directory). If no weights are known at all, the digests that the
    samples name are parents of unknown licence.
    """
    store = as_store(run)
    used, named, digests = _of_samples(store)
    found = [*_of_corpus(store, named), *weights]
    cards = [parent for fit in fits_of(store) if _upstream(fit, digests) for parent in _of_card(fit)]
    if not cards and not weights and used:
        cards = [Parent("weights", f"weights {digest[:12]}", "") for digest in sorted(digests)]
    return sorted({*found, *cards})


def _of_samples(store: Store) -> tuple[int, set[str], set[str]]:
    """Accepted samples: how many, the ids they name as parents, and the digests of the weights that made them."""
    samples = Table(store, "samples")
    if samples.manifest() is None:
        return 0, set(), set()
    count, named, digests = 0, set[str](), set[str]()
    for batch in samples.batches(["outcome", "parents", "weights_digest"]):
        accepted = batch.filter(records.accepted())
        count += accepted.num_rows
        named |= set(pc.list_flatten(accepted["parents"]).unique().to_pylist())
        digests |= set(accepted["weights_digest"].drop_null().unique().to_pylist())
    return count, named, digests


def _of_corpus(store: Store, named: set[str]) -> Iterable[Parent]:
    corpus = Table(store, "corpus")
    if corpus.manifest() is None:
        return []
    found: set[Parent] = set()
    wanted = pa.array(sorted(named), pa.string())
    for batch in corpus.batches(["record_id", "source", "licence", "split", "outcome"]):
        trained = pc.or_(pc.equal(batch["split"], "train"), pc.is_null(batch["split"]))
        binds = pc.or_(pc.fill_null(trained, True), pc.is_in(batch["record_id"], value_set=wanted))
        rows = batch.filter(pc.and_(pc.equal(batch["outcome"], records.ACCEPTED), binds)).select(["source", "licence"])
        for row in rows.group_by(["source", "licence"]).aggregate([]).to_pylist():
            found.add(Parent("corpus", row["source"] or "unnamed source", row["licence"] or ""))
    return found


def _upstream(fit: Fit, digests: set[str]) -> bool:
    return fit.digest in digests or str(fit.card.get("objective", fit.name)).startswith("lora")


def _of_card(fit: Fit) -> Iterable[Parent]:
    yield Parent("weights", fit.name, str(fit.card.get("licence") or ""))
    base = fit.card.get("base")
    if isinstance(base, dict) and base.get("name"):
        yield Parent("weights", str(base["name"]), str(base.get("licence") or ""))
