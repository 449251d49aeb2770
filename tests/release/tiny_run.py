"""A small run written by hand with the real tables, whose counts are known because they are written down here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from factory import records, taxonomy
from factory.images import encode_mask, encode_png
from factory.lab.dermae import cells_of, not_run
from factory.lab.dermae_summary import summary_of
from factory.phantom import draw
from factory.recipe import DermaeSection
from factory.run import Run
from factory.storage import open_store
from factory.tables import Table

HOSTILE = "<script>alert('x')</script><img src=https://example.com/a.png>"
DIAGNOSES = ("nevus", "melanoma", "seborrheic_keratosis")


@dataclass(frozen=True)
class TinyRun:
    """A run and what was put into it."""

    path: Path
    samples: list[dict[str, Any]]
    planned: int


def _pictures(seed: int, index: int, size: int, name: str, **wanted: Any) -> tuple[Any, dict[str, Any]]:
    phantom = draw(seed, index, size, **wanted)
    image = records.image_struct(encode_png(phantom.image), f"{name}.png")
    mask = records.image_struct(encode_mask(phantom.mask), f"{name}-mask.png")
    return phantom, {"image": image, "mask": mask}


def corpus_rows(count: int, size: int, photographs: bool = False) -> list[dict[str, Any]]:
    """Accepted phantoms in three splits; as `photographs` their truth is left out, so that they pass for real."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        phantom, pictures = _pictures(1, i, size, f"c{i}", diagnosis=DIAGNOSES[i % 3])
        truth = {} if photographs else {"true_asymmetry": phantom.asymmetry}
        rows.append({
            "row_id": records.row_id("s", str(i)), "record_id": records.record_id(phantom.image),
            "source": "isic2017" if photographs else "phantom", "source_id": f"p{i}", **pictures,
            "diagnosis": phantom.diagnosis, "skin_type": taxonomy.SKIN_TYPES[phantom.skin_type - 1],
            "split": ("train", "train", "val", "test")[i % 4], "width": size, "height": size,
            "licence": "CC0" if photographs else "Apache-2.0", "outcome": "accepted", **truth,
        })  # fmt: skip
    return rows


def sample_rows(count: int, size: int, parents: list[str]) -> list[dict[str, Any]]:
    """Of every ten samples: seven accepted, one rejected with its pixels, one rejected without, one failed."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        diagnosis, skin = DIAGNOSES[i % 3], i % 6 + 1
        phantom, pictures = _pictures(9, i, size, f"s{i}", diagnosis=diagnosis, skin_type=skin)
        outcome, reason = "accepted", None
        if i % 10 == 7:
            outcome, reason = "rejected", "low_iou"
            pictures["mask"] = records.image_struct(encode_mask(np.roll(phantom.mask, size // 4, 1)), "m.png")
        elif i % 10 == 8:
            outcome, reason, pictures = "rejected", "empty_mask", {}
        elif i % 10 == 9:
            outcome, reason, pictures = "failed", "out_of_memory", {}
        rows.append({
            "sample_id": records.sample_id("plan", i), "unit": i // 16, "index": i, "round": 0, "generator": "joint",
            "diagnosis": diagnosis, "skin_type": taxonomy.SKIN_TYPES[skin - 1], "prompt": f"a {diagnosis} {HOSTILE}",
            "parents": parents[i % len(parents):][:1], "seed": records.seed_of(str(i)), "width": size, "height": size,
            "guidance": 2.0, "num_inference_steps": 20, "audit": False, **pictures, "mask_source": "joint",
            "iou": 0.8 + i % 10 / 100 if outcome == "accepted" else 0.3, "score_area": 0.2,
            "calls_run": 14 if outcome == "rejected" else 20, "weights_digest": "w" * 32, "outcome": outcome,
            "reason": reason,
        })  # fmt: skip
    return rows


def _write(run: Path, name: str, rows: list[dict[str, Any]], per_part: int) -> None:
    table = Table(open_store(run), name)
    spans = [rows[i : i + per_part] for i in range(0, len(rows), per_part)]
    for part, span in enumerate(spans):
        table.commit(part, records.rows_to_table(name, span))
    table.seal(len(spans), {"of": "test"}, {})


def build(
    path: Path,
    *,
    count: int = 40,
    waiting: int = 4,
    size: int = 64,
    photographs: bool = False,
    only: str | None = None,
    without_image: int | None = None,
    test_only_source: str | None = None,
    parents_from_test: bool = False,
) -> TinyRun:
    """Write the run; `waiting` planned samples are not made, `only` samples of that outcome are, and the accepted
    sample `without_image` has lost its pixels. The test split is of `test_only_source`, and samples may name it
    as a parent."""
    corpus = corpus_rows(24, size, photographs)
    tests = [row for row in corpus if row["split"] == "test"]
    for row in tests if test_only_source else []:
        row |= {"source": test_only_source, "licence": "CC-BY-NC-4.0"}
    lineage = tests if parents_from_test else [row for row in corpus if row["split"] == "train"]
    samples = sample_rows(count + waiting, size, [row["record_id"] for row in lineage])
    made = [row for row in samples[:count] if only in (None, row["outcome"])]
    if without_image is not None:
        made[without_image]["image"] = None
    plan_columns = [name for name in records.PLAN.names if name in samples[0] and name != "mask"]
    _write(path, "corpus", corpus, 16)
    _write(path, "plan", [{name: row[name] for name in plan_columns} for row in samples], 1000)
    _write(path, "samples", made, 16)
    weights = path / "weights" / "lora-joint"
    weights.mkdir(parents=True)
    card = {"objective": "lora", "digest": "w" * 32, "licence": "Apache-2.0", "params": 1_234_567}
    (weights / "card.json").write_text(json.dumps(card))
    steps = range(10, 410, 10)
    (weights / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 0.9 * 2 ** (-s / 150) + 0.02 * (s % 30 == 0)}) + "\n" for s in steps)
    )
    said = {"fingerprint": "f" * 32, "versions": {"dermafactory": "0.1.0"}, "recipe": {"gate": {"min_iou": 0.7}}}
    (path / "run.json").write_text(json.dumps(said))
    return TinyRun(path, made, count + waiting)


def _share(successes: int, trials: int) -> dict[str, Any]:
    return {
        "value": successes / trials, "low": max(0.0, successes / trials - 0.05),
        "high": min(1.0, successes / trials + 0.05),
        "successes": successes, "trials": trials,
    }  # fmt: skip


def _about(mean: float, **more: Any) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03, "n": 9, **more}


def lab_results() -> dict[str, dict[str, Any]]:
    """Invented measurements in the forms that the lab's functions return."""
    gains = {"real": 0.0, "real_repeated": 0.01, "real_synthetic": 0.06}
    classify = {arm: {"auc": _about(0.70 + d), "f1": _about(0.52 + d)} for arm, d in gains.items()}
    verdict = _about(0.05, verdict="better")
    pair = {"sample_id": "s1", "features": {"record_id": "r1", "similarity": 0.981}, "near_copy": True}
    return {
        "worth": {
            "tasks": {
                "classify": {
                    "arms": classify,
                    "differences": {"real_synthetic - real_repeated": {"auc": verdict, "f1": verdict}},
                },
                "segment": {"not_run": "no real row has what it needs"},
            },
            "notes": ["These are closed-set numbers."], "how": "Mean over seeds x folds.",
        },
        "gate_accuracy": {
            "precision": _share(94, 100), "recall": _share(90, 99), "specificity": _share(88, 95),
            "by_fault": {
                "none": {"count": 80, "mean_true_iou": 1.0, "good_accepted": _share(78, 80), "bad_refused": {
                    "value": None, "low": 0.0, "high": 1.0, "successes": 0, "trials": 0}},
                "shifted": {
                    "count": 41, "mean_true_iou": 0.43, "good_accepted": _share(4, 7), "bad_refused": _share(33, 34),
                },
            },
            "accept_everything": {"precision": 0.52, "recall": 1.0},
            "setting": {"count": 200, "margin": 0.05, "good_iou": 0.7},
        },
        "caption_accuracy": {
            "num_records": 24,
            "asymmetry": {
                "num_records": 24, "spearman": 0.91, "mean_absolute_error": 0.021, "level_agreement": _share(20, 24),
            },
            "color_count": {"num_records": 24, "spearman": None, "mean_absolute_error": 0.4, "exact": _share(15, 24)},
        },
        "caption_attributes": {
            "num_images": 20, "left_out": {"failed": 2}, "diagnoses": {"melanoma": 8, "nevus": 12},
            "attributes": {
                "asymmetry": {
                    "by_diagnosis": {
                        "melanoma": {"lower_quartile": 0.1, "median": 0.2, "upper_quartile": 0.3, "num": 8},
                        "nevus": {"lower_quartile": 0.05, "median": 0.1, "upper_quartile": 0.2, "num": 12},
                    },
                    "melanoma_over_nevus": {"value": 0.71, "low": 0.6, "high": 0.82, "num": 20},
                },
            },
            "colors": {"black": {"melanoma": _share(4, 8), "nevus": _share(3, 12)}},
        },
        "near_copies": {
            "near_copies": _share(1, 28), "by": {"features": {"threshold": 0.974, "flagged": 1}},
            "nearest_pairs": [pair], "how": "Threshold: the 99.9th percentile.",
        },
        "dermae_table": _dermae_table(),
    }  # fmt: skip


def _dermae_table() -> dict[str, Any]:
    """Two seeds; synthetic images add 0.1 and a teacher 0.05 to every network."""
    section, cells = DermaeSection(seeds=2), []
    for cell in cells_of(section):
        value = 0.5 + 0.1 * (cell.data == "real_synthetic") + 0.05 * cell.taught + 0.01 * cell.seed
        metrics = dict.fromkeys(("accuracy", "macro_f1", "balanced_accuracy"), value)
        cells.append(asdict(cell) | {"metrics": metrics})
    about = {
        name: {"model": f"net-{name}", "given": "random", "params": 1000, "flops": 2_500_000_000, "image_size": 224}
        for name in ("large", "base", "small")
    }
    counts = {
        "num_real": 40, "num_synthetic": 30, "num_test": 20, "kin_of_held_out": 3, "sample_of_unknown_class": 2,
        "test_of_unknown_class": 1,
    }  # fmt: skip
    return summary_of(cells, not_run(section), about, counts, section)


def write_lab(path: Path) -> None:
    """Put them where the report looks."""
    (path / "lab").mkdir()
    for name, content in lab_results().items():
        (path / "lab" / f"{name}.json").write_text(json.dumps(content))


def captioned_run(folder: Path, rows: list[dict[str, Any]]) -> Run:
    """A run of these corpus rows and a caption for each, both sealed."""
    found = Run(str(folder))
    captions = [
        {"record_id": row["record_id"], "caption": f"caption {k}", "captioner": "test", "outcome": "accepted"}
        for k, row in enumerate(rows)
    ]
    for name, table in {"corpus": rows, "captions": captions}.items():
        found.table(name).commit(0, records.rows_to_table(name, table))
        found.table(name).seal(1, {"of": "test"}, {})
    return found
