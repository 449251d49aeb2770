"""Seconds and memory of `factory plan` for a million rows: a sealed plan table, on captions of a made-up corpus.

Two arms, each a process of its own: no captions, and a corpus of `--images` captioned images whose looks are drawn
from; it holds no pixels. Against the goal of 60 s and 1.5 GiB, beside the hashing that ids and seeds need at least.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from factory import line, records, taxonomy
from factory.recipe import load
from factory.run import Run

ROWS, GOAL_S, GOAL_BYTES = 1_000_000, 60.0, 1.5 * 2**30
RESULT = Path(__file__).parent / "results" / "plan_million.json"


def captioned(run: Run, images: int, part_rows: int = 20_000) -> None:
    """Sealed corpus and captions of as many images of three diagnoses, without pixels."""
    corpus, captions = run.table("corpus"), run.table("captions")
    rng, diagnoses, parts = np.random.default_rng(0), ("nevus", "melanoma", "seborrheic_keratosis"), 0
    for parts, first in enumerate(range(0, images, part_rows), 1):
        rows, texts = [], []
        for number in range(first, min(first + part_rows, images)):
            name = records.digest("made up", number)
            rows.append({
                "row_id": name, "record_id": name, "source": "made_up", "source_id": str(number), "licence": "CC0",
                "diagnosis": diagnoses[int(rng.integers(3))], "split": "train", "outcome": "accepted",
                "ita": float(rng.uniform(-60, 80)), "site": "hand", "modality": "dermoscopic",
            })  # fmt: skip
            colors = [color for color in taxonomy.COLORS if rng.random() < 0.4] or ["red"]
            texts.append({
                "record_id": name, "asymmetry": float(rng.random()), "border_irregularity": float(rng.random() * 2),
                "colors": colors, "relative_diameter": float(rng.random()), "outcome": "accepted",
            })  # fmt: skip
        corpus.commit(parts - 1, records.rows_to_table("corpus", rows))
        captions.commit(parts - 1, records.rows_to_table("captions", texts))
    corpus.seal(parts, {"made": "up"}, {})
    captions.seal(parts, {"made": "up"}, {"corpus": corpus.digest()})


def planned(uri: str) -> tuple[float, float, int]:
    """Seconds of the plan, the process's largest memory in bytes, and the rows."""
    run, start = Run(uri), time.perf_counter()
    line.plan(run, load(None, [f"plan.count={ROWS}"]), print, table=True)
    spent = time.perf_counter() - start
    return spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, run.table("plan").sealed().rows


def hashing() -> float:
    """Seconds of the ids and seeds alone."""
    start = time.perf_counter()
    records.seeds_of(records.sample_ids("f", range(ROWS)))
    return time.perf_counter() - start


def alone(function: object, *arguments: object) -> object:
    """A function's result in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500_000)
    images = parser.parse_args().images
    result: dict[str, object] = {"rows": ROWS, "goal_s": GOAL_S, "goal_gib": GOAL_BYTES / 2**30}
    result["hashing_s"] = round(alone(hashing), 2)
    with tempfile.TemporaryDirectory() as folder:
        for name, captions in (("without_captions", 0), ("with_captions", images)):
            run = Run(f"{folder}/{name}")
            if captions:
                alone(captioned, run, captions)
            seconds, memory, rows = alone(planned, run.uri)
            result[name] = {
                "captioned_images": captions, "rows": rows, "seconds": round(seconds, 1),
                "peak_gib": round(memory / 2**30, 2), "within_goal": seconds < GOAL_S and memory < GOAL_BYTES,
            }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
