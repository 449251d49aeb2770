"""The dataset card: README.md with the Hugging Face header, what the set is for, its limits, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        gate=facts.recipe.get("gate") or {}, plan=facts.recipe.get("plan") or {},
    )  # fmt: skip
    return f"---\n{header}---\n\n{body}"


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
