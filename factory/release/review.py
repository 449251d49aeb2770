"""The caption review: one HTML page on which a rater judges captions blind, offline, by keyboard.

    items = [Item("6d1f...", png, {"measured": "This photo ...", "other": "A brown ..."}), ...]
    key = key_of(items, "Captions of run demo", seed=7)
    page = build_review(items, "Captions of run demo", seed=7)

The page shows each image's captions as A, B, C in an order of its own, asks for a plausibility from 1 to 5, defects and
a remark, and saves a JSON file. It names no captioner: the key does, which stays with whoever runs the study, and
`factory.lab.reviews` joins both. Its policy allows its own script and styles by their hashes and nothing else, so it
can ask nothing of any network.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from factory.records import digest, seed_of

FORMAT, VERSION = "dermafactory-caption-review", 1
TEMPLATES = Path(__file__).parent / "templates"
LETTERS = "ABCDEFGH"
MAX_REMARK = 500  # characters
PLAUSIBILITY = ("implausible", "rather implausible", "undecided", "rather plausible", "plausible")


@dataclass(frozen=True)
class Defect:
    """A tag that a rater can give to a caption: the key that sets it, its name in files, and its name on the page."""

    key: str
    tag: str
    name: str


DEFECTS: tuple[Defect, ...] = (
    Defect("s", "hallucinated_size", "hallucinated size"),
    Defect("c", "wrong_color", "wrong colour"),
    Defect("y", "wrong_symmetry", "wrong symmetry"),
    Defect("b", "wrong_border", "wrong border"),
    Defect("d", "names_diagnosis", "names a diagnosis"),
    Defect("n", "not_about_image", "not about the image"),
    Defect("o", "other", "other"),
)


@dataclass(frozen=True)
class Item:
    """An image to review, as PNG, and its captions by backend; a backend that said nothing of it is left out."""

    item_id: str
    png: bytes
    captions: Mapping[str, str]


def key_of(items: Sequence[Item], title: str, seed: int) -> dict[str, Any]:
    """What the importer needs and a rater must not see: the backend behind each item's letters.

    `study` is a digest of the title, the seed, and every item with its captions, so that a file of another study is
    known by it. Raises ValueError if there is no item, two share an id, or an item has no caption or too many.
    """
    _check(items)
    ordered = {item.item_id: _order(item, seed) for item in items}
    texts = [part for item in items for part in (item.item_id, *sorted(item.captions.items()))]
    return {
        "format": FORMAT, "version": VERSION, "title": title, "seed": seed,
        "study": digest(FORMAT, title, seed, *texts),
        "backends": sorted({name for item in items for name in item.captions}),
        "defects": [defect.tag for defect in DEFECTS], "max_remark": MAX_REMARK,
        "items": {item_id: dict(zip(LETTERS, names, strict=False)) for item_id, names in ordered.items()},
    }  # fmt: skip


def build_review(items: Sequence[Item], title: str, seed: int) -> str:
    """The page as HTML text. Images are embedded as they are given. Errors as in `key_of`."""
    study = {
        "format": FORMAT, "version": VERSION, "study": key_of(items, title, seed)["study"], "title": title,
        "maxRemark": MAX_REMARK, "plausibility": PLAUSIBILITY,
        "defects": [{"key": defect.key, "tag": defect.tag, "name": defect.name} for defect in DEFECTS],
        "items": [
            {
                "id": item.item_id, "image": base64.b64encode(item.png).decode(),
                "captions": [[LETTERS[i], item.captions[name]] for i, name in enumerate(_order(item, seed))],
            }
            for item in items
        ],
    }  # fmt: skip
    script, style = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("review.js", "review.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("review.html.j2").render(
        title=title, policy=_policy(script, style), study=_inert(study), script=script, style=style,
        defects=DEFECTS, num_items=len(items), num_captions=sum(len(item.captions) for item in items),
    )  # fmt: skip


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise ValueError("items must hold at least one image with captions, got none; caption the corpus first.")
    twice = {item.item_id for item in items if sum(item.item_id == other.item_id for other in items) > 1}
    if twice:
        raise ValueError(f"items must have ids of their own, got {min(twice)!r} twice; give each image once.")
    for item in items:
        if not 1 <= len(item.captions) <= len(LETTERS):
            raise ValueError(
                f"item {item.item_id} must have 1 to {len(LETTERS)} captions, got {len(item.captions)}; "
                "compare fewer captioners at once, and leave out an image that has none."
            )


def _order(item: Item, seed: int) -> list[str]:
    """The backends of an item in the order of its letters: its own, whatever the other items are."""
    names = sorted(item.captions)
    return [names[i] for i in np.random.default_rng([seed, seed_of(item.item_id)]).permutation(len(names))]


def _policy(script: str, style: str) -> str:
    sources = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{sources[0]}'; style-src 'sha256-{sources[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _inert(value: Any) -> str:
    """JSON that ends no script element and starts no comment in it, whatever the texts are."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
