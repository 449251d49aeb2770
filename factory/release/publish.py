"""One release: the licence verdict first, then shards, card and manifest, put in place together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from factory.recipe import GateSection, ReleaseSection
from factory.release import counts, formats, licences
from factory.release.card import render_card
from factory.release.formats import Shards
from factory.release.provenance import as_store, fits_of, parents_of, read_json, run_facts
from factory.run import Run
from factory.storage import Store
from factory.tables import Table


@dataclass(frozen=True)
class Release:
    """A sealed release: where it is, what it holds, and what it may be used for."""

    out: Path
    shards: Shards
    verdict: licences.Verdict


def publish(
    run: Run | Store | str | Path,
    out: Path,
    section: ReleaseSection,
    *,
    weights: Sequence[licences.Parent] = (),
    gate: GateSection | None = None,
) -> Release:
    """Release the accepted samples of a run to the local folder `out`: data/*.parquet, README.md and _MANIFEST.json.

    weights: parents that the run does not name itself (the starter, a base model). gate: a policy to apply again,
    which can only be stricter. A folder that already is this very release is left as it is. Raises ValueError for a
    licence that `section.allow` does not permit, for nothing accepted, and for an `out` that holds something else.
    """
    store = as_store(run)
    verdict = licences.join(parents_of(store, weights))
    licences.require(verdict, section.allow)
    facts = formats.made_from(store, section, verdict, gate)
    done = formats.released(Path(out), facts)
    if done is not None:
        return Release(Path(out), done, verdict)
    with formats.staged(Path(out)) as directory:
        shards = formats.write_shards(store, directory, section, licence=verdict.licence, gate=gate)
        (directory / "README.md").write_text(_card(store, section, shards, verdict))
        formats.seal(directory, facts, shards)
    return Release(Path(out), shards, verdict)


def _card(store: Store, section: ReleaseSection, shards: Shards, verdict: licences.Verdict) -> str:
    plan = Table(store, "plan").manifest()
    samples = Table(store, "samples").read(["outcome", "reason"])
    return render_card(
        run_facts(store),
        section,
        shards,
        verdict,
        counts.funnel(samples, None if plan is None else plan.rows),
        fits=fits_of(store),
        near_copies=read_json(store, "lab/near_copies.json"),
    )
