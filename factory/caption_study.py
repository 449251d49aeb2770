"""The caption study of a run: which images, what their captioners say of them, the page for raters, and its import.

lab/caption_comparison.json       the captioners compared on the drawn images
lab/caption_review/index.html     the page that a rater opens, and all that a rater is given
lab/caption_review/key.json       which captioner stands behind which letter; not for raters
lab/caption_review.json           what the raters said, once their files were imported
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from factory import records
from factory.run import Run, read_events

COMPARISON, RESULT = "lab/caption_comparison.json", "lab/caption_review.json"
PAGE, KEY = "lab/caption_review/index.html", "lab/caption_review/key.json"
LONGEST = 512  # px of the longer side on the page

Echo = Callable[[str], None]


def prepare(run: Run, others: Sequence[str], count: int, seed: int, echo: Echo) -> None:
    """Draws the images, compares the run's captioner with those of `others`, and writes the review page and its key.

    others: runs that captioned the same corpus, each RUN or NAME=RUN. The same captions, count and seed write the same
    study. A key of another study that is there already is kept beside the new one, since raters may still hand in its
    files; the results of its import are removed. Raises ValueError if the runs share no image or no caption was made.
    """
    from factory.lab.captions import compare, of_images
    from factory.release.review import build_review, key_of

    captions = captions_of(run, others)
    drawn = draw(run, captions, count, seed)
    ids = drawn["record_id"].to_pylist()
    chosen = {name: of_images(table, ids) for name, table in captions.items()}
    _write(run, COMPARISON, compare(chosen, ids, seed))
    echo(f"compared    {', '.join(chosen)} on {len(ids)} images by diagnosis and skin type")
    items = _items(drawn, chosen)
    title = f"Captions of {len(items)} images"  # not the run's name, which may be a captioner's
    key = key_of(items, title, seed)
    _keep_former(run, key["study"], echo)
    run.store.replace(PAGE, build_review(items, title, seed).encode())
    _write(run, KEY, key)
    echo(f"review      {run.uri}/{PAGE}, {len(items)} images; keep {KEY} from the raters")


def import_reviews(run: Run, named: Sequence[Path], echo: Echo) -> None:
    """Reads raters' files, or all *.json of a folder that is named, and writes what they said.

    Raises ValueError where there is no study yet or a file is not of it (see `factory.lab.reviews.read_reviews`).
    """
    from factory.lab.reviews import read_reviews, summarize

    if not run.store.exists(KEY):
        raise ValueError(
            f"--reviews must belong to a study, but {run.uri} has no {KEY}; run `factory evaluate captions` without "
            "--reviews first."
        )
    files = [file for path in named for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    key = json.loads(run.store.read(KEY))
    result = summarize(read_reviews(files, key), key)
    _write(run, RESULT, result)
    agreed = result["agreement"]["plausibility"]["value"] if result["agreement"] else None
    alpha = "undefined" if agreed is None else f"{agreed:.3f}"
    echo(f"reviews     {len(result['raters'])} raters on {result['num_captions']} captions, alpha {alpha}")


def captions_of(run: Run, others: Sequence[str]) -> dict[str, pa.Table]:
    """The captions tables by backend, named as asked, else by the captioner that most rows state; with what a model
    stated in place of what was measured, and with seconds and cost where the run tells them."""
    from factory.lab.captions import as_stated

    found: dict[str, pa.Table] = {}
    for text in ("", *others):
        name, equals, uri = text.rpartition("=")
        if text and (not uri or (equals and not name)):
            raise ValueError(f"--with must be RUN or NAME=RUN, got {text!r}; for example --with vlm=runs/vlm.")
        of = Run(uri) if text else run
        table = of.table("captions").read()
        name = name or _captioner(table)
        if name in found:
            raise ValueError(f"--with must give each captioner a name of its own, got {name} twice; say NAME=RUN.")
        found[name] = _timed(of, as_stated(table, *_prices(of)))
    return found


def _prices(run: Run) -> tuple[float, float]:
    """Of a million tokens in and out, as the run's recipe states them."""
    http = ((run.header() or {}).get("recipe") or {}).get("caption", {}).get("http") or {}
    return float(http.get("price_in") or 0.0), float(http.get("price_out") or 0.0)


def _timed(run: Run, captions: pa.Table) -> pa.Table:
    """With `seconds` per caption: those of the run's caption steps, the start of Ray included, over its captions."""
    total, begun = 0.0, None
    for event in read_events(run.store):  # driver by driver; one that was killed has a start and no end
        if event.get("step") == "caption":
            at = datetime.fromisoformat(str(event["time"])).timestamp()
            if event["event"] == "started":
                begun = at
            elif begun is not None:
                total, begun = total + at - begun, None
    if not captions.num_rows or not total:
        return captions
    return captions.append_column("seconds", pa.array([total / captions.num_rows] * captions.num_rows, pa.float64()))


def _captioner(table: pa.Table) -> str:
    counts = pc.value_counts(table["captioner"].combine_chunks()).to_pylist()
    return str(max(counts, key=lambda one: one["counts"])["values"]) if counts else "no captioner"


def draw(run: Run, captions: dict[str, pa.Table], count: int, seed: int) -> pa.Table:
    """At most `count` accepted images that every captioner was given: record_id and image, in an order of the seed's.

    As even over pairs of diagnosis and skin type as their sizes allow (`release.pictures.stratified`). Of a corpus of
    many parts the images come from some of them, evenly spread (`release.collect.within_parts`).
    """
    from factory.release.collect import fetch, within_parts
    from factory.release.pictures import stratified

    table = run.table("corpus")
    light = within_parts(table, table.read(["row_id", "record_id", "diagnosis", "skin_type", "outcome"]))
    rows = light.filter(records.accepted())
    for other in captions.values():
        rows = rows.filter(pc.is_in(rows["record_id"], other["record_id"].combine_chunks()))
    if not rows.num_rows:
        raise ValueError(
            f"captions must be of images of {run.uri}, got none that {', '.join(captions)} share; caption one corpus "
            "with each."
        )
    strata = [f"{row['diagnosis']}, {row['skin_type']}" for row in rows.select(["diagnosis", "skin_type"]).to_pylist()]
    lots = [records.digest("caption review", seed, record_id) for record_id in rows["record_id"].to_pylist()]
    chosen = sorted(stratified(strata, lots, count), key=lambda position: lots[position])
    ids = rows["row_id"].to_pylist()
    return fetch(table, ["row_id", "record_id", "image"], "row_id", [ids[position] for position in chosen])


def _items(drawn: pa.Table, captions: dict[str, pa.Table]) -> list[Any]:
    """What the page shows: each image encoded anew, so that nothing but its pixels is in it, with its captions."""
    from factory.images import encode_png, read_png, resized
    from factory.release.review import Item

    said: dict[str, dict[str, str]] = {}
    for name, table in captions.items():
        for row in table.select(["record_id", "caption", "outcome"]).to_pylist():
            if row["outcome"] == records.ACCEPTED and row["caption"]:
                said.setdefault(row["record_id"], {})[name] = row["caption"]
    items = []
    for row in drawn.to_pylist():
        if row["record_id"] in said:
            rgb = read_png(row["image"]["bytes"])
            scale = min(1.0, LONGEST / max(rgb.shape[:2]))
            small = resized(rgb, max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
            items.append(Item(row["record_id"], encode_png(small), said[row["record_id"]]))
    return items


def _keep_former(run: Run, study: str, echo: Echo) -> None:
    if not run.store.exists(KEY):
        return
    former = json.loads(run.store.read(KEY))["study"]
    if former == study:
        return
    kept = f"lab/caption_review/key-{former}.json"
    run.store.replace(kept, run.store.read(KEY))
    if run.store.exists(RESULT):
        run.store.delete(RESULT)
    echo(f"review      the captions have changed; the key of the study before is {kept}")


def _write(run: Run, path: str, content: dict[str, Any]) -> None:
    run.store.replace(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
