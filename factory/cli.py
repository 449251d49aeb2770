"""The `factory` command: one verb per step of the line. Nothing heavy is imported before it is needed.

Exit status: 0 done, 1 the work failed or a check did not hold, 2 the request was wrong.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from factory import cli_gate, taxonomy
from factory import recipe as recipes
from factory.evaluations import EVALUATIONS
from factory.progress import Stopped
from factory.recipe import Recipe

app = typer.Typer(
    help="A dataset factory for synthetic dermatology: corpora in, gated and released image-and-mask pairs out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cli_gate.app, name="gate")

# What an OSError says of the machine; all others speak of the request: a path that is not there or may not be used.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}

RunOption = Annotated[str, typer.Option("--run", help="The run's directory or URI (s3://, gs://).")]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="A named recipe or a YAML file; by default what the run was last worked on with."),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override one key of the recipe: a.b=c.")]


def _recipe(run: str | None, named: str | None, overrides: list[str] | None) -> Recipe:
    from factory.run import Run

    base = None if named is not None or run is None else Run(run).recipe()
    return recipes.load(named, overrides or [], base)


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="Where the run goes.")] = "runs/demo",
    until: Annotated[str | None, typer.Option("--until", help="Stop after this step.")] = None,
    recipe: RecipeOption = "demo",
    set_: SetOption = None,
) -> None:
    """The whole line on the embedded default: no download, no GPU."""
    from factory import line

    if until is not None:
        taxonomy.check(until, line.STEPS, "--until")
    line.demo(out, _recipe(None, recipe, set_), until, typer.echo)
    typer.echo(f"done        {out}")


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="A new folder, laid out as the reader `folder` takes it.")],
    count: Annotated[int, typer.Option("--count", min=1)] = 64,
    size: Annotated[int, typer.Option("--size", help="Pixels, 32 to 512.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Draw a phantom corpus with its masks and its truth."""
    from factory.corpora.phantom import write_phantoms

    write_phantoms(out, count, size, seed)
    typer.echo(f"phantoms    {count} in {out}, their truth in {out / 'truth.csv'}")


@app.command()
def ingest(
    run: Annotated[str | None, typer.Option("--run", help="The run's directory or URI (s3://, gs://).")] = None,
    corpus: Annotated[list[str] | None, typer.Option("--corpus", help="NAME=PATH; none means phantoms.")] = None,
    readers: Annotated[
        bool, typer.Option("--list", help="Print the readers and what each expects; nothing else.")
    ] = False,
    missing: Annotated[
        bool, typer.Option("--allow-missing-images", help="Read a published table even where it has no image.")
    ] = False,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Sources to one clean, split corpus. Every row that is lost has a reason."""
    if readers:
        from factory import corpora

        return typer.echo("\n".join(corpora.described()))
    if run is None:
        raise ValueError("--run must name where the corpus goes, got nothing; for example --run runs/corpus.")
    overrides = [*(set_ or []), *(f"corpus.sources.{name}={path}" for name, path in map(_source, corpus or []))]
    _step(run, recipe, [*overrides, *(["corpus.allow_missing_images=true"] if missing else [])], "ingest")


def _source(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if name == "phantom":  # drawn, not read: what follows may be how many
        return name, f'"{path}"'
    if not equals or not name or not path:
        raise ValueError(f"--corpus must be NAME=PATH, got {text!r}; for example --corpus isic2017=/data/isic2017.")
    return name, str(Path(path).expanduser().resolve()) if "://" not in path else path


@app.command()
def caption(
    run: RunOption,
    backend: Annotated[str | None, typer.Option("--backend", help="measured, transformers, vllm or http.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A directory, or for http an address up to /v1.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """ABC attributes and a sentence for every image of the corpus."""
    if model is not None and "://" not in model:
        model = str(Path(model).expanduser().resolve())
    given = {"caption.captioner": backend, "caption.model": model}
    _step(run, recipe, [*(set_ or []), *(f"{key}={value}" for key, value in given.items() if value)], "caption")


@app.command()
def fit(
    name: Annotated[str, typer.Argument(help="lora, gate, mae, finetune or distill; or list: what each trains.")],
    run: Annotated[str | None, typer.Option("--run", help="The run's directory or URI (s3://, gs://).")] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="lora: print what a preset trains and needs, as JSON; nothing else.")
    ] = False,
    family: Annotated[
        str | None, typer.Option("--family", help="lora: which generator; `fit list` names them.")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="lora: of the family; `fit list` names them.")] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="lora: a diffusers directory; by default the recipe's.")
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Fit weights on Ray Train; stopped fits go on where they were."""
    from factory.fits import presets

    if name == "list":
        return typer.echo("\n".join(presets.listed()))
    if describe:
        if name != "lora":
            raise ValueError(f"--describe must go with `fit lora`, got {name}; leave it out.")
        if family is None:
            choice = ", ".join(presets.FAMILIES)
            raise ValueError(f"--family must be given with --describe, got nothing; choose one of {choice}.")
        given = _recipe(run, recipe, [*presets.overrides(family, preset), *(set_ or [])])
        found = presets.describe(family, preset, base, given.fit.lora, given.plan.size)
        return typer.echo(json.dumps(found, indent=2))
    if name != "lora" and (family or preset or base):
        raise ValueError(f"--family, --preset and --base must go with `fit lora`, got {name}; leave them out.")
    if run is None:
        raise ValueError(
            "--run must name the run to fit in, got nothing; give --run, or --describe to count parameters alone."
        )
    named = [] if family is None else presets.overrides(family, preset)
    if family is None and preset is not None:
        raise ValueError("--preset must come with --family, got it alone; say whose preset it is.")
    named += [] if base is None else [f"synthesize.weights={base.expanduser().resolve()}"]
    _step(run, recipe, [*named, *(set_ or [])], "fit", name)


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="Weights of the run, or a fit that has one: distill or finetune.")],
    run: RunOption,
    out: Annotated[
        Path,
        typer.Option("--out", help="The file: .onnx, for pt2 .pt2, for int8 on GPUs .pt2. Its cards go beside it."),
    ],
    kind: Annotated[str, typer.Option("--format", help="onnx, pt2 or int8.")] = "onnx",
    pixels: Annotated[
        str, typer.Option("--input", help="uint8, as decoders give pixels, or float in [0, 1].")
    ] = "uint8",
) -> None:
    """A fitted classifier as one file for a phone, checked against its original on validation images."""
    from factory import line

    uint8 = taxonomy.check(pixels, ("uint8", "float"), "--input") == "uint8"
    typer.echo(f"done        {line.export(run, name, kind, out, uint8, typer.echo)}")


@app.command()
def plan(
    run: RunOption,
    count: Annotated[int | None, typer.Option("--count", help="Samples to plan.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and their cost; write nothing.")] = False,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", help="Estimate for a cluster's YAML (see `factory size`).")
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Decide every sample, its id and its seed, before any is made; again once they are made, for what is short."""
    overrides = [*(set_ or []), *([] if count is None else [f"plan.count={count}"])]
    on = None if cluster is None else str(cluster)
    if not dry_run:
        return _step(run, recipe, overrides, "plan", table=True, cluster=on)
    from factory import line
    from factory.run import Run

    line.preview(Run(run), _recipe(run, recipe, overrides), on, typer.echo)


@app.command()
def synthesize(
    run: RunOption,
    retry: Annotated[str | None, typer.Option("--retry", help="failed: plan failed samples again, make those.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Carry out the plan: generate, judge, commit, exactly once."""
    _step(run, recipe, set_, "synthesize", retry=retry)


@app.command()
def evaluate(
    name: Annotated[str, typer.Argument(help=f"{', '.join(EVALUATIONS)}.")],
    run: RunOption,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", help="captions: another run on the same corpus to compare with, RUN or NAME=RUN."),
    ] = None,
    reviews: Annotated[
        list[Path] | None,
        typer.Option("--reviews", help="captions: import a rater's file, or all of a folder.", exists=True),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="dermae-table: print its cost; fit nothing.")] = False,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", help="Cost on a cluster's YAML (see `factory size`).")
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Measure what the set is worth, or how good a part is; compare captioners and have raters review them."""
    if dry_run:
        from factory import line

        on = None if cluster is None else str(cluster)
        return line.preview_evaluation(_recipe(run, recipe, set_), name, on, typer.echo)
    if cluster is not None:
        raise ValueError("--cluster must come with --dry-run, got it alone; an evaluation runs on the cluster at hand.")
    _step(run, recipe, set_, "evaluate", name, others or (), reviews or ())


@app.command()
def report(run: RunOption) -> None:
    """One page on what the run holds by now: corpus, samples, worth. Reads only, so it can be made at any time."""
    from factory import line
    from factory.run import Run

    line.report(Run(run), Run(run).recipe() or Recipe(), typer.echo)


@app.command()
def release(
    run: RunOption,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the release; default RUN/release.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Sealed Parquet, a dataset card and the report."""
    _step(run, recipe, set_, "release", out)


def _step(
    uri: str, named: str | None, overrides: list[str] | None, verb: str, *arguments: object, **options: object
) -> None:
    """Runs one function of the line under the run's lock."""
    from factory import line

    recipe = _recipe(uri, named, overrides)
    with line.driving(uri, recipe, verb) as run:
        getattr(line, verb)(run, recipe, *arguments, echo=typer.echo, **options)
    typer.echo(f"done        {run.uri}")


@app.command()
def sample(
    diagnosis: Annotated[str, typer.Option("--diagnosis", help=", ".join(taxonomy.DIAGNOSES))],
    skin_type: Annotated[str | None, typer.Option("--skin-type", help="I to VI.")] = None,
    asymmetry: Annotated[str | None, typer.Option("--asymmetry", help="low, medium or high.")] = None,
    border: Annotated[str | None, typer.Option("--border", help="low, medium or high.")] = None,
    colors: Annotated[str | None, typer.Option("--colors", help="Comma-separated, e.g. brown,black,blue-gray.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=64)] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    out: Annotated[Path, typer.Option("--out", help="The contact sheet.")] = Path("sample.png"),
    run: Annotated[str | None, typer.Option("--run", help="Use this run's adapter and recipe.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """A few pairs of one look, with their verdicts, as one contact sheet."""
    from factory.stages import plan as planning

    wanted = _recipe(run, recipe, set_)
    rows = planning.sample_rows(
        count=count,
        diagnosis=diagnosis,
        skin_type=skin_type,
        asymmetry=asymmetry,
        border=border,
        colors=taxonomy.colors_from_words(colors) if colors else None,
        section=wanted.plan,
        seed=seed,
    )
    from factory import line

    typer.echo(f"asked       {rows[0]['prompt']}")
    made = line.sample(run, wanted, rows, out)
    typer.echo(f"sample      {sum(row['outcome'] == 'accepted' for row in made)} of {count} accepted, sheet in {out}")


@app.command()
def status(
    run: RunOption,
    metrics: Annotated[bool, typer.Option("--metrics", help="Samples and alarms as Prometheus text instead.")] = False,
) -> None:
    """What a run holds, and what of its samples should alarm."""
    from factory import line
    from factory.run import Run

    if metrics:
        return typer.echo(line.metrics_of(Run(run)), nl=False)
    for text in line.status(Run(run)):
        typer.echo(text)


@app.command()
def verify(run: RunOption) -> None:
    """Recount every sealed table from its parts; exit 1 and name the part if one is not what was sealed."""
    from factory import line
    from factory.run import Run

    opened = Run(run)
    problems = opened.verify() + line.verify_release(opened)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"verified    {', '.join(opened.tables()) or 'nothing is sealed yet'}")


@app.command()
def reproduce(
    sample_id: Annotated[str, typer.Argument(help="A `sample_id` of the run's samples, accepted or rejected.")],
    run: RunOption,
    out: Annotated[Path | None, typer.Option("--out", help="Write what is drawn, as PNG.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Draw one sample again and compare; exit 1 if it differs by more than other hardware makes."""
    from factory import line
    from factory.run import Run

    redrawn = line.reproduce(Run(run), _recipe(run, recipe, set_), sample_id, out)
    typer.echo(redrawn.text)
    if not redrawn.holds:
        raise typer.Exit(1)


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="A pickled file of weights, or a directory with some.", exists=True)],
    out: Annotated[Path, typer.Option("--out", help="The new directory.")],
) -> None:
    """Pickled weights (.bin, .pt, .ckpt, .pth) as safetensors, the only form that is loaded; runs nothing they hold."""
    from factory.models.convert import convert as run

    for file in run(path, out):
        typer.echo(f"converted   {file}")


@app.command()
def size(
    cluster: Annotated[Path, typer.Option("--cluster", help="A `ray up` YAML, or a KubeRay RayJob or RayCluster.")],
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """How large each pool is for a recipe on a cluster, from the cluster's YAML alone."""
    from factory.runtime import cluster as clusters

    resources = clusters.resources_of_yaml(cluster)
    for text in clusters.described(resources, clusters.pools(resources, _recipe(None, recipe, set_))):
        typer.echo(text)


@app.command("recipe")
def show_recipe(
    name: Annotated[str | None, typer.Argument(help="A named recipe or a YAML file; none shows the defaults.")] = None,
    set_: SetOption = None,
) -> None:
    """Print a recipe with every default filled in."""
    typer.echo(recipes.resolved_yaml(_recipe(None, name, set_)), nl=False)


def main(*verb: str) -> None:
    """The console script, and with a verb the job of that name: what follows it is read from the command line."""
    from factory.recipe import RecipeError

    try:  # the status of a typer.Exit is returned, not raised
        sys.exit(app([*verb, *sys.argv[1:]], prog_name="factory", standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except RecipeError as error:
        _refuse(str(error))
    except Exception as error:
        _report(error)


def _report(error: Exception) -> None:
    """One sentence for what the user can mend (2) or the machine lacks (1), a traceback for what only we can (1)."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # what the command line itself refuses
        error.show()
        sys.exit(error.exit_code)
    if isinstance(error, (ConnectionError, TimeoutError, Stopped)) or getattr(error, "errno", None) in MACHINE_ERRORS:
        _refuse(str(error), status=1)
    if isinstance(error, (ValueError, OSError)):
        _refuse(str(error))
    raise error


def _refuse(sentence: str, status: int = 2) -> None:
    typer.echo(f"factory: {sentence}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
