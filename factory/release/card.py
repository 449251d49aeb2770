"""The dataset card: README.md with the Hugging Face header, what the set is for, its limits, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from factory import taxonomy
from factory.recipe import ReleaseSection
from factory.release.counts import Funnel
from factory.release.formats import Shards, release_schema
from factory.release.licences import HUB_IDS, Verdict
from factory.release.measured import near_copies_of
from factory.release.provenance import Fit, RunFacts

TEMPLATES = Path(__file__).parent / "templates"
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))


@dataclass(frozen=True)
class Made:
    """How samples of a generator came to be, as the card says it. with_it: what lies beside each image; asked: what a
    sample was asked to show beside its diagnosis."""

    has_mask: bool
    with_it: str
    asked: str
    sentence: str


_MASKED, _BARE = "its lesion mask, the prompt", "no mask, the prompt"
_CHECKED = "a gate compared the mask with an independent segmenter of the same latents and checked its area and shape."
_FOUND = "a gate looked for the lesion with a segmenter and checked the area and shape of what it found."
MADE: dict[str, Made] = {
    "joint": Made(
        True, _MASKED, " and skin type",
        f"A text-conditioned diffusion model drew image and mask of each planned sample; {_CHECKED}",
    ),
    "inpaint": Made(
        True, _MASKED, " and skin type",
        "A text-conditioned diffusion model drew a lesion inside each planned mask, into normal skin of a training "
        f"image, whose pixels are unchanged outside it; {_CHECKED}",
    ),
    "flux": Made(
        False, _BARE, " and skin type",
        f"A text-conditioned rectified flow drew the image of each planned sample, without a mask; {_FOUND}",
    ),
    "class_conditional": Made(
        False, "no mask", "",
        "A diffusion model conditioned on the diagnosis alone, and on no words, drew the image of each planned sample, "
        f"without a mask; {_FOUND}",
    ),
}  # fmt: skip


def render_card(
    facts: RunFacts,
    section: ReleaseSection,
    shards: Shards,
    verdict: Verdict,
    funnel: Funnel,
    *,
    fits: list[Fit] | None = None,
    near_copies: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md for a release of these shards.

    near_copies: what `factory.lab.lineage.nearest_real` returned; None where it was not measured, and the card says so.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=False, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    header = yaml.safe_dump(card_header(section, shards, verdict), sort_keys=False, allow_unicode=True, width=1000)
    body = environment.get_template("card.md.j2").render(
        facts=facts, section=section, shards=shards, verdict=verdict, funnel=funnel, fits=fits or [],
        near_copies=near_copies_of(near_copies), names=taxonomy.diagnosis_name, malignant=taxonomy.is_malignant,
        gate=facts.recipe.get("gate") or {}, plan=facts.recipe.get("plan") or {}, bounds=gate_bounds,
        made=MADE[(facts.recipe.get("plan") or {}).get("generator", "joint")],
    )  # fmt: skip
    return f"---\n{header}---\n\n{body}"


def gate_bounds(gate: Mapping[str, Any], has_mask: bool) -> str:
    """What a recipe's gate asked of a sample, in words: every bound that was set."""
    by_area = gate.get("theta_by_area") or []
    iou = "expected IoU" if gate.get("calibrated", True) else "overlap"
    least = ", ".join(f"{theta:g} up to {area:g} of the image" for area, theta in by_area) or gate.get("min_iou", "?")
    told = [f"{iou} at least {least}"] if has_mask else []
    told.append(f"area {gate.get('min_area', '?')} to {gate.get('max_area', '?')} of the image")
    told.append(f"solidity at least {gate.get('min_solidity', '?')}")
    told += [f"{words} {gate[name]:g}" for name, words in _BOUNDS.items() if gate.get(name) is not None]
    return ", ".join(told)


_BOUNDS = {
    "max_holes": "holes of what a mask encloses at most", "max_hausdorff_px": "boundary distance (px) at most",
    "max_shape_distance": "distance from the phantoms' shapes at most",
    "min_background_psnr": "background unchanged to at least (dB)", "min_edge_contrast": "edge contrast at least",
}  # fmt: skip


def _cell(value: object) -> str:
    """Foreign words made safe for a Markdown line or table cell."""
    text = " ".join(str(value).split())
    for mark in "\\`|<>[]*_#":
        text = text.replace(mark, "\\" + mark)
    return text


def card_header(section: ReleaseSection, shards: Shards, verdict: Verdict) -> dict[str, Any]:
    """The YAML header that the hub and `datasets` read: licence, tasks, size, features, splits and data files."""
    hub_id = HUB_IDS.get(verdict.licence, "other")
    licence: dict[str, Any] = {"license": hub_id}
    if hub_id == "other":
        licence["license_name"] = verdict.licence
    return {
        **licence,
        "pretty_name": section.name,
        "task_categories": ["image-classification", "image-segmentation", "text-to-image"],
        "tags": ["synthetic", "dermatology", "medical", "skin-lesion"],
        "size_categories": [size_category(shards.rows)],
        "dataset_info": {
            "features": _features(),
            "splits": [{"name": "train", "num_bytes": shards.bytes, "num_examples": shards.rows}],
            "download_size": shards.bytes,
            "dataset_size": shards.bytes,
        },
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }


def size_category(rows: int) -> str:
    """The hub's word for a number of rows: 2,500 -> `1K<n<10K`."""
    return next((word for bound, word in _SIZES if rows < bound), "n>10M")


def _features() -> list[dict[str, Any]]:
    """The release's columns in the card's notation."""
    metadata = release_schema().metadata[b"huggingface"]
    return [{"name": name} | _notation(spec) for name, spec in json.loads(metadata)["info"]["features"].items()]


def _notation(spec: Mapping[str, Any]) -> dict[str, Any]:
    if spec["_type"] == "ClassLabel":
        return {"dtype": {"class_label": {"names": {str(i): name for i, name in enumerate(spec["names"])}}}}
    if spec["_type"] == "List":
        return {"list": _notation(spec["feature"])["dtype"]}
    return {"dtype": "image" if spec["_type"] == "Image" else spec["dtype"]}
