"""What early rejection saved in a run that is there: calls of the network, decodes, and what it cost in good samples.

The audit share of a plan is drawn to its end whatever a checkpoint says, so it tells how many samples that the whole
gate accepts would have been stopped. It needs the recipe that the run was made with, which the run knows.

    python benchmarks/run_savings.py --run runs/isic2017
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from factory.quality import statistics
from factory.records import ACCEPTED, REJECTED
from factory.run import Run

RESULT = Path(__file__).resolve().parent / "results" / "run_savings.json"
COLUMNS = ["sample_id", "outcome", "reason", "calls_run", "num_inference_steps", "audit", "iou", "score_latent_iou"]


def saved(run: Run) -> dict[str, Any]:
    recipe = run.recipe()
    assert recipe is not None, f"{run.uri} holds nothing"
    samples = run.table("samples")
    rows, images = samples.read(COLUMNS).to_pylist(), samples.read(["image"])["image"]
    stopped = [row for row in rows if row["outcome"] == REJECTED and row["calls_run"] < row["num_inference_steps"]]
    refused = [row for row in rows if row["outcome"] == REJECTED]
    calls, planned = sum(row["calls_run"] or 0 for row in rows), sum(row["num_inference_steps"] for row in rows)
    audits = [row for row in rows if row["audit"] and row["score_latent_iou"] is not None]
    least = recipe.gate.min_iou - recipe.gate.checkpoint_slack
    good = [row for row in audits if row["outcome"] == ACCEPTED]
    lost = sum(row["score_latent_iou"] < least for row in good)
    return {
        "planned": len(rows), "counts": dict(Counter(row["outcome"] for row in rows)),
        "reasons": dict(Counter(row["reason"] for row in refused)),
        "gate": {"min_iou": recipe.gate.min_iou, "checkpoints": recipe.gate.checkpoints},
        "stopped_early": len(stopped), "share_of_rejections_stopped_early": len(stopped) / max(1, len(refused)),
        "ended_after_calls": dict(sorted(Counter(row["calls_run"] for row in rows).items())),
        "calls_run": calls, "calls_of_the_plan": planned, "calls_saved": 1 - calls / planned,
        "decoded": len(images) - images.null_count, "decodes_saved": images.null_count / len(images),
        "audits": len(audits), "audits_accepted": len(good), "of_them_the_last_checkpoint_would_have_stopped": lost,
        "lost_share": list(statistics.wilson(lost, len(good))[:3]) if good else None,
        "median_iou": float(np.median([row["iou"] for row in rows if row["iou"] is not None])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    result = saved(Run(asked.run))
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
