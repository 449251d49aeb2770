"""The recipe: one complete, typed configuration of a run. YAML in, every mistake at once, by line.

A recipe is layered: the defaults below, then a named or given YAML file, then `--set a.b=c`. Each table and each
fit depends on some sections only, and its fingerprint is made of those (see `FINGERPRINTS`), so that a change
elsewhere does not refuse it. The models live on the ground floor so that a wrong recipe is refused before
anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from factory.sections.base import Count, Natural, Positive, Section, Share
from factory.sections.caption import CaptionSection, HttpSection
from factory.sections.corpus import CorpusSection, PhantomSection
from factory.sections.dermae import DermaeSection, NetworkSection
from factory.sections.fits import (
    ClassesSection,
    DistillSection,
    FinetuneSection,
    FitSection,
    FitsSection,
    FluxSection,
    GateFitSection,
    InpaintSection,
    JointSection,
    LoraSection,
    MaeSection,
)
from factory.sections.plan import BackgroundsSection, PlanSection

__all__ = [
    "FINGERPRINTS", "BackgroundsSection", "CaptionSection", "ClassesSection", "CorpusSection", "DermaeSection",
    "DistillSection", "EvaluateSection", "FinetuneSection", "FitSection", "FitsSection", "FluxSection",
    "GateFitSection", "GateSection", "HttpSection", "InpaintSection", "JointSection", "LoraSection", "MaeSection",
    "Mistake", "NetworkSection", "PhantomSection", "PlanSection", "Recipe", "RecipeError", "ReleaseSection",
    "Section", "SynthesizeSection", "WorthSection", "json_schema", "load", "resolved_yaml",
]  # fmt: skip


class GateSection(Section):
    """The gate's policy. Rules run in the order of the fields; the first that fails is the reason."""

    weights: str = "starter"
    min_area: Share = 0.004  # of the image; below it a mask is empty
    max_area: Share = 0.95
    min_iou: Share = 0.7  # DiffAug's theta
    calibrated: bool = True  # the IoU is that to be expected with the truth, where the weights have an estimator of it;
    # false, or without one: the overlap with what the segmenter finds, as DiffAug has it
    max_hausdorff_px: Positive | None = None  # of the mask's boundary from the found one's, 95th percentile; null: any
    min_solidity: Share = 0.6
    max_holes: Share = 1.0  # of what a mask encloses
    max_shape_distance: Positive | None = None  # Mahalanobis, from the phantoms' shapes; null: any
    min_background_psnr: Positive | None = None  # dB, outside the mask of what is drawn into an image; null: any
    min_edge_contrast: Positive | None = None  # gradient on the mask's contour over that beside it; null: any
    shift_tolerance: Share = (
        0.015  # of the side: a shift that is forgiven, so tiny lesions need less IoU; 0 forgives none
    )
    # theta by size where it was fitted (`quality/thresholds.py`): pairs of the largest area of a stratum, as a share of
    # the image, and its theta, by growing area; a larger lesion has the last one. Empty: min_iou and shift_tolerance.
    theta_by_area: list[Annotated[list[Share], Field(min_length=2, max_length=2)]] = []
    checkpoints: list[Share] = [0.7]  # shares of the calls after which the clean estimate is judged
    # How far below its threshold an early IoU may be; below zero, how far above it must be: early estimates are
    # smooth and agree more than what becomes of them (benchmarks/checkpoint_choice.py).
    checkpoint_slack: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0
    checkpoint_area_slack: Share = 0.1  # by which share of min_area an early lesion may be smaller than it

    @field_validator("theta_by_area")
    @classmethod
    def _by_growing_area(cls, value: list[list[float]]) -> list[list[float]]:
        areas = [area for area, _ in value]
        if areas != sorted(set(areas)):
            raise ValueError(f"must name strata by growing area, got areas {areas}; sort them and name each once")
        return value


class SynthesizeSection(Section):
    """How the plan is carried out."""

    weights: str = "starter"  # `starter`, or a diffusers directory
    adapter: str | None = None  # a name under RUN/weights, a LoRA directory or file, `none`; null: the family's own fit
    slots: Annotated[int, Field(ge=1, le=512)] = 16
    num_actors: Count | None = None  # None: from what the cluster has
    num_threads: Count = 1
    keep_rejected: Literal["none", "latents", "image"] = "none"
    solver: Literal["ddim", "dpm++2m"] = "ddim"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of network and text encoders; auto: bfloat16 on a GPU,
    # float32 on a CPU, where bfloat16 can be hundreds of times slower (a GPU older than Ampere wants float32 too)
    base_dtype: Literal["nf4", "fp8"] | None = None  # of FLUX.1's weights on a small card; null: dtype
    compile: bool = False  # the network, by torch's inductor: minutes once per machine, then faster calls
    prompt_cache_gib: Natural = 64  # of prompts that are embedded before, for FLUX.1; beyond it by who draws them
    max_attempts: Count = 3  # at a unit that raises, hangs or takes its process along; then all its rows have failed
    unit_timeout_s: Positive | None = None  # after which a unit hangs and its process is ended; null: never


class WorthSection(Section):
    """The worth experiment: classifier and U-Net on real, real repeated, real + synthetic."""

    seeds: Count = 3
    folds: Annotated[int, Field(ge=2)] = 3
    steps: Count = 120
    batch_size: Count = 32
    image_size: Annotated[int, Field(ge=32, multiple_of=8)] = 64  # the U-Net halves it three times
    classifier: str = "mobilenetv3_small_050"
    max_real: Count = 1000


class EvaluateSection(Section):
    gate_pairs: Count = 400  # pairs with planted faults that the gate is tried on
    caption_images: Count = 100  # images that captioners are compared on and raters review
    caption_seed: Natural = 0  # which images, and in which order a rater sees them and their captions
    thetas: Annotated[list[Share], Field(min_length=1)] = [
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
    ]  # that the samples are filtered at (DiffAug's experiment 2)
    # That the gate is tried at; 1.12 is DiffAug's.
    log_snrs: Annotated[list[float], Field(min_length=1)] = [6.0, 4.0, 2.0, 1.12, 0.0, -1.0, -2.0, -4.0]
    worth: WorthSection = WorthSection()
    dermae: DermaeSection = DermaeSection()


class ReleaseSection(Section):
    """What leaves the house."""

    name: str = "dermafactory-set"
    shard_bytes: Count = 536_870_912
    allow: Literal["any", "commercial"] = "any"


class Recipe(Section):
    """A whole run."""

    corpus: CorpusSection = CorpusSection()
    caption: CaptionSection = CaptionSection()
    fit: FitsSection = FitsSection()
    backgrounds: BackgroundsSection = BackgroundsSection()
    plan: PlanSection = PlanSection()
    synthesize: SynthesizeSection = SynthesizeSection()
    gate: GateSection = GateSection()
    evaluate: EvaluateSection = EvaluateSection()
    release: ReleaseSection = ReleaseSection()


# The sections (dotted) that each table's content depends on, beside its parents and weights.
FINGERPRINTS: dict[str, tuple[str, ...]] = {
    "listing": (
        "corpus.sources",
        "corpus.phantoms",
        "corpus.labels",
        "corpus.allow_missing_images",
        "corpus.unit_rows",
    ),
    "intake": ("corpus.min_side", "corpus.scales", "corpus.frame", "corpus.max_pixels", "corpus.max_bytes"),
    "embeddings": (),
    "copies": ("corpus.min_likeness", "corpus.min_cosine"),
    "corpus": ("corpus.near_duplicates", "corpus.val_share", "corpus.test_share"),
    "captions": ("caption.captioner", "caption.masks", "caption.aspect", "caption.bank", "caption.label_in_prompt"),
    # Those of captions that a model wrote, beside the digests of its weights and prompts.
    "captions by a model": ("caption.answer", "caption.max_new_tokens", "caption.batch_size", "caption.reject"),
    "backgrounds": ("backgrounds",),
    "plan": ("plan",),
    "samples": ("synthesize.slots", "synthesize.num_threads", "synthesize.keep_rejected", "synthesize.solver", "gate"),
}


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a recipe: where it was written, the dotted field, and the rule with what was got."""

    where: str
    field: str
    rule: str


class RecipeError(ValueError):
    """Every mistake of a recipe in one message; `mistakes` holds them apart."""

    def __init__(self, name: str, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        width = max(len(mistake.where) for mistake in mistakes)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        lines = [f"  {m.where:<{width}}  {m.field}: {m.rule}".replace("  : ", "  ") for m in mistakes]
        super().__init__("\n".join([f"{name} has {count}:", *lines]))


def load(source: str | Path | None = None, overrides: Iterable[str] = (), base: Recipe | None = None) -> Recipe:
    """The recipe of a name (`smoke`), a YAML file or, for None, `base` or the defaults, with `a.b=c` overrides on top.

    Raises RecipeError with every mistake at once.
    """
    from factory import recipe_yaml

    return recipe_yaml.load(source, overrides, base)


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe with every default filled in, as YAML that loads to the same recipe."""
    from factory import recipe_yaml

    return recipe_yaml.resolved_yaml(recipe)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors and for other programs."""
    return Recipe.model_json_schema()
