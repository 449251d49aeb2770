"""Which weights a recipe means in a run: the generator, what is fitted over it, and its gate."""

from __future__ import annotations

from pathlib import Path

from factory.models.weights import STARTER, is_whole_generator
from factory.recipe import Recipe
from factory.run import Run
from factory.storage import LocalStore

STARTER_LICENCE = "Apache-2.0"


def generator_of(recipe: Recipe) -> Path:
    """The generator's diffusers directory."""
    path = STARTER if recipe.synthesize.weights == "starter" else Path(recipe.synthesize.weights)
    if not path.is_dir():
        raise ValueError(f"synthesize.weights must be `starter` or a diffusers directory, got {path}; check the path.")
    return path


def weights_of(run: Run | None, recipe: Recipe) -> tuple[Path, Path | None, Path]:
    """Generator, adapter (or None) and gate that a recipe means in a run."""
    generator, adapter = fitted_generator(run, recipe)
    gate = STARTER / "gate" if recipe.gate.weights == "starter" else _named_weights(run, recipe.gate.weights)
    return generator, adapter, gate


def fitted_generator(run: Run | None, recipe: Recipe) -> tuple[Path, Path | None]:
    """Generator and adapter (or None) that a recipe means in a run. What was fitted whole stands for its base."""
    wanted, own = recipe.synthesize.adapter, f"lora-{recipe.fit.lora.family}"
    if wanted is None:
        adapter = run.weights_dir(own) if run is not None and own in run.weights() else None
    else:
        adapter = None if wanted == "none" else _named_weights(run, wanted)
    if adapter is not None and is_whole_generator(adapter):
        return adapter, None
    return generator_of(recipe), adapter


def generator_here(
    run: Run, recipe: Recipe, generator: str | Path, adapter: str | Path | None
) -> tuple[Path, Path | None]:
    """Generator and adapter on the machine that asks: where the driver found them, or, where what it found is its own
    copy of a run in a bucket, this machine's copy."""
    named = Path(generator), None if adapter is None else Path(adapter)
    if isinstance(run.store, LocalStore) or all(path is None or path.exists() for path in named):
        return named
    return fitted_generator(run, recipe)


def gate_here(uri: str, recipe: Recipe) -> Path:
    """The gate's directory on the machine that asks."""
    return weights_of(Run(uri), recipe)[2]


def _named_weights(run: Run | None, name: str) -> Path:
    if Path(name).is_dir() or Path(name).is_file():  # a LoRA may be one file
        return Path(name)
    if run is None:
        raise ValueError(f"weights must be a directory when no --run is given, got {name!r}; check the path.")
    return run.weights_dir(name)
