"""The line: every step of the factory as a function of (run, recipe). What the commands and the jobs call.

    corpora --ingest--> corpus --caption--> captions --fit--> weights
    quotas  --plan--> plan --synthesize, gate--> samples --evaluate--> lab --release--> release, report

A step that is done is not done again; one that was stopped goes on. Everything heavy is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory import records
from factory.models.weights import check_classes, family_of, generator_digest, tree_digest
from factory.recipe import Recipe
from factory.run import Run

if TYPE_CHECKING:
    import pyarrow as pa

    from factory.quality.alarms import Alarm

STEPS = ("ingest", "caption", "fit", "plan", "synthesize", "encoders", "evaluate", "release")

Echo = Callable[[str], None]


@contextlib.contextmanager
def driving(uri: str, recipe: Recipe, step: str) -> Iterator[Run]:
    """A run that this process may write to: its lock is held, its header says the recipe, its events say the step.

    A request that is refused leaves the header as it was: later commands take their recipe from it.
    """
    run = Run(uri)
    with run.lock(), run.events() as events:
        before = run.header()
        run.write_header(recipe)
        events.write("started", step=step)
        try:
            yield run
        except BaseException as error:
            with contextlib.suppress(OSError):  # on a full disk too it is the reason that is told
                if isinstance(error, ValueError):
                    run.restore_header(before)
                events.write("stopped", step=step, error=f"{type(error).__name__}: {error}"[:500])
            raise
        events.write("finished", step=step)


# ------------------------------------------------------------------------------------------------------ tables


def ingest(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """Sources to the sealed corpus, and the report on it."""
    from factory.models.weights import tree_files
    from factory.runtime import cluster
    from factory.runtime import ingest as pipeline

    if recipe.corpus.embedding is not None:  # a path that is not there is said before a cluster is started
        tree_files(recipe.corpus.embedding, "corpus.embedding")
    pipeline.freeze_listing(run, recipe)
    with cluster.connect() as resources:
        pipeline.ingest(run, recipe, cluster.pools(resources, recipe), echo)
    report(run, recipe, echo)


def caption(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """The corpus's captions."""
    from factory.runtime import caption as pipeline
    from factory.runtime import cluster

    run.table("corpus").sealed()
    pipeline.fingerprint(run, recipe)  # weights, address and token that are not there are said before a cluster is up
    with cluster.connect() as resources:
        pipeline.caption(run, recipe, cluster.pools(resources, recipe), echo)


def plan(run: Run, recipe: Recipe, echo: Echo = print, table: bool = False, cluster: str | None = None) -> None:
    """The plan table, or its next round (`plan.max_rounds`). Its fingerprint names its samples, so the same recipe on
    the same captions plans the same ids, whatever the units that they are committed in.

    table: whether the cells are told, with their cost on the cluster of a YAML, `cluster`, or on the one at hand.
    """
    from factory.runtime import plan as pipeline
    from factory.runtime.plan_cost import estimate

    pipeline.plan(run, recipe, echo, estimate(run, recipe, cluster) if table else None)


def preview(run: Run, recipe: Recipe, cluster: str | None = None, echo: Echo = print) -> None:
    """What `plan` would plan, told and not written."""
    from factory.runtime import plan as pipeline
    from factory.runtime.plan_cost import estimate

    pipeline.preview(run, recipe, estimate(run, recipe, cluster), echo)


def synthesize(run: Run, recipe: Recipe, echo: Echo = print, retry: str | None = None) -> None:
    """The plan's samples, judged by the gate while they are made. retry: `failed` plans the failed ones again first."""
    from factory.runtime import cluster
    from factory.runtime import synthesize as pipeline
    from factory.runtime.weights import weights_of

    run.table("plan").sealed()
    generator, adapter, gate = weights_of(run, recipe)
    if retry is not None and not _planned_again(run, recipe, retry, echo):
        return echo("synthesize  no row has failed, or all were planned again: nothing to do")
    if recipe.plan.generator == "class_conditional" == family_of(generator):
        check_classes(generator, recipe.plan.diagnoses)
    digests = {"generator": generator_digest(generator, adapter), "gate": tree_digest(gate)}
    paths = {"generator": str(generator), "adapter": None if adapter is None else str(adapter)}
    with cluster.connect() as resources:
        pools = cluster.pools(resources, recipe)
        judging = _gate_deployed(run, recipe, pools)
        pipeline.synthesize(run, recipe, pools, digests, paths, judging, echo)


def _planned_again(run: Run, recipe: Recipe, retry: str, echo: Echo) -> bool:
    from factory import taxonomy
    from factory.runtime.retry import plan_failed

    taxonomy.check(retry, (records.FAILED,), "--retry")
    return plan_failed(run, recipe, echo)


@contextlib.contextmanager
def _gate_deployed(run: Run, recipe: Recipe, pools: Any) -> Iterator[None]:
    """The run's gate is up and answers."""
    from factory.models.families import vae_digest_of
    from factory.runtime import serve
    from factory.runtime.weights import fitted_generator, gate_here

    vae = vae_digest_of(*fitted_generator(run, recipe), recipe.plan.generator)
    serve.start_gate(run.uri, partial(gate_here, run.uri, recipe), vae, recipe.gate, pools)
    try:
        yield
    finally:
        serve.stop_gate(run.uri)


def sample(uri: str | None, recipe: Recipe, rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Draws a few samples here, without a cluster, judged by the same gate, as one contact sheet at `out` (PNG)."""
    from factory.models.families import vae_digest_of
    from factory.release.sheet import contact_sheet
    from factory.runtime.weights import weights_of
    from factory.stages.score import LocalGate, ScoreSamples
    from factory.stages.synthesize import SynthesizeSamples

    generator, adapter, gate = weights_of(None if uri is None else Run(uri), recipe)
    if recipe.plan.generator == "inpaint":
        from factory.runtime import backgrounds

        rows = backgrounds.for_samples(uri, rows)
    section = recipe.synthesize.model_copy(
        update={"keep_rejected": "image", "slots": min(len(rows), recipe.synthesize.slots)}
    )
    family = recipe.plan.generator
    judge = LocalGate(ScoreSamples(gate, vae_digest_of(generator, adapter, family), recipe.gate))
    made = SynthesizeSamples(generator, adapter, section, recipe.gate, judge, tree_digest(gate), family)(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(made, title=rows[0]["prompt"]).save(out)
    return made


def reproduce(run: Run, recipe: Recipe, sample_id: str, out: Path | None = None) -> Any:
    """One sample drawn again and compared with what is kept of it: a `runtime.reproduce.Redrawn`. Reads only, and
    starts no cluster."""
    from factory.runtime import reproduce as replay

    return replay.reproduce(run, recipe, sample_id, out)


# ------------------------------------------------------------------------------------------------------ weights


def fit(run: Run, recipe: Recipe, name: str, echo: Echo = print) -> None:
    """Fits `lora`, `gate`, `mae`, `finetune` or `distill`, and publishes the weights."""
    from factory.runtime import fit as fits

    fits.fit(run, recipe, name, echo)


def export(uri: str, name: str, kind: str, out: Path, uint8: bool = True, echo: Echo = print) -> Path:
    """A fitted classifier as a file for a phone; reads only, so it needs no lock."""
    from factory.release import phone

    return phone.export_weights(Run(uri), name, kind, out, uint8=uint8, echo=echo)


# ------------------------------------------------------------------------------------------- worth and release


def evaluate(
    run: Run, recipe: Recipe, name: str, others: Sequence[str] = (), reviews: Sequence[Path] = (), echo: Echo = print
) -> None:
    """One of `evaluations.EVALUATIONS`: the result goes to lab/ and into the report."""
    from factory import evaluations

    evaluations.evaluate(run, recipe, name, others, reviews, echo)


def preview_evaluation(recipe: Recipe, name: str, cluster: str | None = None, echo: Echo = print) -> None:
    """What an evaluation would cost, of those that are long; `cluster` is a YAML, None what is here."""
    from factory import evaluations

    evaluations.preview(recipe, name, cluster, echo)


def report(run: Run, recipe: Recipe, echo: Echo = print) -> str:
    """The report on what the run holds by now: RUN/report/index.html and corpus.json. Returns the page's address.

    It only reads the tables, so it can be made while another step works. A run that holds nothing is a ValueError.
    """
    from factory.release.report import write_report

    if run.header() is None and not run.tables():
        raise ValueError(f"--run must name a run that holds something, got {run.uri}; begin with `factory ingest`.")
    page = f"{run.uri}/{write_report(run, base_parents(recipe))}"
    echo(f"report      {page}")
    return page


def release(run: Run, recipe: Recipe, out: Path | None, echo: Echo = print) -> Path:
    """The report, then sealed shards with their dataset card. Returns where the shards are.

    Without an accepted sample there is a report, which says why, and a ValueError instead of a release.
    """
    from factory.release.publish import publish

    parents = base_parents(recipe)
    page = report(run, recipe, echo)
    if not run.table("samples").counts().get(records.ACCEPTED, 0):
        raise ValueError(
            f"a release must hold at least one accepted sample, got none; {page} says why they were refused."
        )
    target = out or run.local_dir("release", remedy="give --out") / "release"
    made = publish(run, target, recipe.release, weights=parents, gate=recipe.gate)
    echo(f"release     {made.shards.rows} pairs, licence {made.verdict.licence}, in {made.out}")
    return made.out


def verify_release(run: Run) -> list[str]:
    """What is wrong with the release inside a run's own folder, if there is one; a sentence each."""
    from factory.release.formats import verify

    if not run.store.exists("release/_MANIFEST.json"):
        return []
    return verify(run.local_dir("release") / "release")


def base_parents(recipe: Recipe) -> list[Any]:
    """The base weights, as parents whose licence binds what they made."""
    from factory.release.licences import Parent
    from factory.runtime.licences import UNKNOWN, of_base
    from factory.runtime.weights import STARTER_LICENCE

    base = recipe.synthesize.weights
    stated = STARTER_LICENCE if base == "starter" else of_base(base)
    return [Parent("weights", base, "" if stated == UNKNOWN else stated)]


def alarms_of(run: Run) -> list[Alarm]:
    """Those of the samples that are there, a running step's too."""
    return _alarms(run, _made(run))


def _made(run: Run) -> pa.Table | None:
    """What alarms look at, of the samples that are there."""
    import pyarrow as pa

    from factory.quality.alarms import COLUMNS

    parts = list(run.table("samples").committed(list(COLUMNS)))
    return pa.concat_tables(parts) if parts else None


def _alarms(run: Run, made: pa.Table | None) -> list[Alarm]:
    from factory.quality.alarms import alarms

    worth = json.loads(run.store.read("lab/worth.json")) if run.store.exists("lab/worth.json") else None
    return [] if made is None else alarms(made, worth=worth)


def metrics_of(run: Run) -> str:
    """Samples by outcome and alarms by kind as Prometheus text, for a textfile collector or a push gateway."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    from factory.quality.alarms import KINDS

    registry, made = CollectorRegistry(), _made(run)
    counted = Counter([] if made is None else made["outcome"].to_pylist())
    outcomes = Gauge("factory_run_samples", "Samples by outcome.", ["run", "outcome"], registry=registry)
    for outcome in records.OUTCOMES:
        outcomes.labels(run.uri, outcome).set(counted[outcome])
    found = [alarm.kind for alarm in _alarms(run, made)]
    raised = Gauge("factory_run_alarms", "Alarms by kind; above 0 a person should look.", ["run", "kind"],
                   registry=registry)  # fmt: skip
    for kind in KINDS:
        raised.labels(run.uri, kind).set(found.count(kind))
    return generate_latest(registry).decode()


def status(run: Run) -> list[str]:
    """What a run holds: one line per table and per weights, and one per alarm of the samples that are there."""
    lines = [
        f"{name:<10} sealed, {run.table(name).sealed().rows} rows"
        + _outcomes(run.table(name).counts())
        + _rounds(run, name)
        for name in run.tables()
    ]
    begun = sorted({path.split("/")[0] for path in run.store.list("") if "/part-" in path} - set(run.tables()))
    lines += [
        f"{name:<10} not sealed, {len(run.table(name).parts())} parts; run its step again to go on" for name in begun
    ]
    lines += [f"weights/{name}" for name in run.weights()]
    lines += [f"ALARM      {alarm.kind}, {alarm.where}: {alarm.text}" for alarm in alarms_of(run)]
    return lines or ["nothing yet; begin with `factory ingest`"]


def _rounds(run: Run, name: str) -> str:
    """How many rounds a plan has, where it has more than one."""
    if name != "plan":
        return ""
    part = run.table(name).read_part(len(run.table(name).sealed().parts) - 1, ["round"])
    last = max(part["round"].to_pylist(), default=0)
    return f", in {last + 1} rounds" if last else ""


def _outcomes(counts: dict[str, int]) -> str:
    return "".join(f", {name} {counts[name]}" for name in records.OUTCOMES if counts.get(name))


def demo(uri: str, recipe: Recipe, until: str | None = None, echo: Echo = print) -> None:
    """The whole line on the embedded default, step after step, on one cluster. `until` is the last step of STEPS."""
    from factory.runtime import cluster

    with driving(uri, recipe, "demo") as run, cluster.connect():
        for step in STEPS[: STEPS.index(until) + 1 if until else None]:
            _demo_step(run, recipe, step, echo)


def _demo_step(run: Run, recipe: Recipe, step: str, echo: Echo) -> None:
    if step == "fit":
        fit(run, recipe, "lora", echo)
    elif step == "encoders":
        for name in ("mae", "distill"):
            fit(run, recipe, name, echo)
    elif step == "evaluate":
        for name in ("gate", "captions", "worth"):
            evaluate(run, recipe, name, echo=echo)
    elif step == "release":
        release(run, recipe, None, echo)
    else:
        {"ingest": ingest, "caption": caption, "plan": plan, "synthesize": synthesize}[step](run, recipe, echo)
