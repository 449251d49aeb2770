"""What raters said of captions: their files read strictly against the study's key, and their agreement.

A file is what the review page saved (`factory.release.review`): a rater's id, and per item and letter a plausibility
from 1 to 5, defects and a remark. The key says which backend stands behind a letter. Files come from elsewhere, so
nothing in them is believed: what is not of this study is refused in one sentence that names file and field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from factory.lab.agreement import Floats, alpha_interval, pairwise_agreement
from factory.lab.intervals import proportion
from factory.quality.statistics import bootstrap

MAX_BYTES = 5_000_000  # of one file; 100 images of 8 captions with remarks of 500 characters are under 1 MB
MAX_FILES = 200
_RATER = re.compile(r"[A-Za-z0-9._-]{1,40}")
_REMEDY = "hand in the file as the review page saved it."

Unit = tuple[str, str]  # item, letter


@dataclass(frozen=True)
class Rating:
    """What one rater said of one caption; plausibility is 1 to 5, or None where none was given."""

    item: str
    letter: str
    plausibility: int | None
    defects: tuple[str, ...]
    remark: str


@dataclass(frozen=True)
class Review:
    """One rater's file."""

    rater: str
    ratings: tuple[Rating, ...]


def read_reviews(files: Sequence[Path], key: Mapping[str, Any]) -> list[Review]:
    """The reviews in exported files, by rater, each checked against the key.

    Raises ValueError, naming file and field, for a file that is too large, no JSON or of another study, an unknown
    item, letter or defect, a score out of range, a caption rated twice, or a rater who handed in two files.
    """
    if not 1 <= len(files) <= MAX_FILES:
        raise ValueError(
            f"--reviews must name 1 to {MAX_FILES} files, got {len(files)}; name the files that raters saved."
        )
    reviews: dict[str, tuple[Review, Path]] = {}
    for file in files:
        review = read_review(file, key)
        if review.rater in reviews:
            raise ValueError(
                f"{file.name}: rater must be in one file, got {review.rater!r} in {reviews[review.rater][1].name} too; "
                "leave out the older one."
            )
        reviews[review.rater] = review, file
    return [reviews[rater][0] for rater in sorted(reviews)]


def read_review(file: Path, key: Mapping[str, Any]) -> Review:
    """One exported file, checked against the key; errors as in `read_reviews`."""
    content = _content(file)

    def must(holds: bool, field: str, rule: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{file.name}: {field} must be {rule}, got {str(got)[:80]!r}; {_REMEDY}")

    must(content.get("format") == key["format"], "format", key["format"], content.get("format"))
    must(content.get("version") == key["version"], "version", str(key["version"]), content.get("version"))
    must(content.get("study") == key["study"], "study", f"{key['study']}, this run's", content.get("study"))
    rater = content.get("rater")
    must(isinstance(rater, str) and bool(_RATER.fullmatch(rater)), "rater", "a rater id", rater)
    rows = content.get("ratings")
    must(isinstance(rows, list), "ratings", "a list", rows)
    ratings: dict[Unit, Rating] = {}
    for i, row in enumerate(rows or []):
        rating = _rating(row, key, lambda holds, field, rule, got, i=i: must(holds, f"ratings[{i}]{field}", rule, got))
        unit = rating.item, rating.letter
        must(unit not in ratings, f"ratings[{i}]", "of a caption that is rated once", unit)
        ratings[unit] = rating
    return Review(str(rater), tuple(ratings.values()))


def _content(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{file.name} must have at most {MAX_BYTES:,} bytes, got {size:,}; {_REMEDY}")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} must be JSON, got {type(error).__name__}; {_REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} must be a JSON object, got {type(content).__name__}; {_REMEDY}")
    return content


def _rating(row: Any, key: Mapping[str, Any], must: Callable[..., None]) -> Rating:
    must(isinstance(row, dict), "", "a rating", row)
    item, letter, score = row.get("item"), row.get("caption"), row.get("plausibility")
    must(isinstance(item, str) and item in key["items"], ".item", "an item of the study", item)
    must(isinstance(letter, str) and letter in key["items"][item], ".caption", "a letter of its item", letter)
    whole = isinstance(score, int) and not isinstance(score, bool) and 1 <= score <= 5
    must(score is None or whole, ".plausibility", "1 to 5 or null", score)
    defects = row.get("defects")
    known = isinstance(defects, list) and all(isinstance(tag, str) and tag in key["defects"] for tag in defects)
    must(known and len(set(defects)) == len(defects), ".defects", "a list of known tags, each once", defects)
    remark = row.get("remark")
    short = isinstance(remark, str) and len(remark) <= key["max_remark"]
    must(short, ".remark", f"a text of at most {key['max_remark']} characters", remark)
    return Rating(item, letter, score, tuple(defects), remark)


# --------------------------------------------------------------------------------------------------- the result


def summarize(reviews: Sequence[Review], key: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """What the raters said, as JSON-ready numbers with 95 % intervals; NaN is None.

    backends: per backend the mean plausibility over all ratings (bootstrap over images, since captions of an image
    and ratings of a caption are not independent) and each defect's share of the captions judged, once if any rater
    named it and once if more than half of its raters did (Wilson). agreement: ordinal alpha of plausibility over all
    captions and per backend, nominal alpha of each defect, both with a bootstrap over images; for each two raters the
    share of equal scores and of those at most one apart. With one rater no agreement can be had, and it is None.
    A caption counts as judged by a rater who gave it a plausibility or a defect.
    """
    raters = [review.rater for review in reviews]
    units = [(item, letter) for item, letters in key["items"].items() for letter in letters]
    said = [{(r.item, r.letter): r for r in review.ratings} for review in reviews]
    scores = _table(said, units, lambda r: math.nan if r.plausibility is None else float(r.plausibility))
    judged = _table(said, units, lambda r: math.nan if r.plausibility is None and not r.defects else 1.0)
    tagged = {tag: np.where(np.isnan(judged), math.nan, _named(said, units, tag)) for tag in key["defects"]}
    behind = np.array([key["items"][item][letter] for item, letter in units])
    images = np.array([item for item, _ in units])
    return {
        "study": key["study"], "title": key["title"], "num_items": len(key["items"]), "num_captions": len(units),
        "raters": {
            rater: {"rated": int((~np.isnan(row)).sum()), "remarks": sum(bool(r.remark) for r in review.ratings)}
            for rater, row, review in zip(raters, scores, reviews, strict=True)
        },
        "backends": {
            name: _backend(scores[:, behind == name], {t: v[:, behind == name] for t, v in tagged.items()},
                           images[behind == name], seed)
            for name in key["backends"]
        },
        "agreement": _agreement(scores, tagged, images, behind, raters, seed) if len(reviews) > 1 else None,
        "remarks": [
            {"rater": review.rater, "item": r.item, "backend": key["items"][r.item][r.letter], "remark": r.remark}
            for review in reviews for r in review.ratings if r.remark
        ],
    }  # fmt: skip


def _table(said: Sequence[Mapping[Unit, Rating]], units: Sequence[Unit], value: Callable[[Rating], float]) -> Floats:
    """(raters, units), NaN where a rater said nothing."""
    return np.array([[value(of[unit]) if unit in of else math.nan for unit in units] for of in said], dtype=np.float64)


def _named(said: Sequence[Mapping[Unit, Rating]], units: Sequence[Unit], tag: str) -> Floats:
    return _table(said, units, lambda rating: float(tag in rating.defects))


def _backend(scores: Floats, tagged: Mapping[str, Floats], images: np.ndarray, seed: int) -> dict[str, Any]:
    given = ~np.isnan(scores)
    groups = np.broadcast_to(images, scores.shape)[given]
    mean = None
    if given.any():
        mean = dict(bootstrap(lambda values: float(values.mean()), groups, scores[given], seed=seed)._asdict())
    return {
        "plausibility": mean,
        "scores": {str(value): int((scores == value).sum()) for value in range(1, 6)},
        "defects": {tag: _shares(table) for tag, table in tagged.items()},
    }


def _shares(table: Floats) -> dict[str, Any]:
    """Captions with a defect among those judged: by any of their raters, and by more than half of them."""
    judged, named = (~np.isnan(table)).sum(axis=0), np.nansum(table, axis=0)
    num = int((judged > 0).sum())
    return {
        "any": proportion(int((named > 0).sum()), num),
        "most": proportion(int(((judged > 0) & (2 * named > judged)).sum()), num),
    }


def _agreement(
    scores: Floats, tagged: Mapping[str, Floats], images: np.ndarray, behind: np.ndarray, raters: list[str], seed: int
) -> dict[str, Any]:
    def alpha(table: Floats, level: str, of: np.ndarray) -> dict[str, Any]:
        return alpha_interval(table[:, of], level, images[of].tolist(), seed=seed).as_json()

    everything = np.ones(len(images), bool)
    return {
        "plausibility": alpha(scores, "ordinal", everything),
        "plausibility_by_backend": {
            str(name): alpha(scores, "ordinal", behind == name) for name in sorted(set(behind.tolist()))
        },
        "equal": pairwise_agreement(scores, raters),
        "within_one": pairwise_agreement(scores, raters, within=1),
        "defects": {
            tag: {"alpha": alpha(table, "nominal", everything), "equal": pairwise_agreement(table, raters)}
            for tag, table in tagged.items()
        },
    }
