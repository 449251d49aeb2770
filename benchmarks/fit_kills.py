"""`factory fit lora` under kills, each family: does the fit that goes on have the undisturbed one's curve?

One run of phantoms with captions. Each family is fitted on it by the command twice, on Ray: undisturbed, and killed
with all that it started (SIGKILL) at a random step, then asked for again in the same words. Told are the last step that
was kept when it fell, the largest difference of the two curves' losses, and whether the weights have the same bytes.
joint and inpaint go on from the shipped starter, class_conditional is fitted whole on its VAE, flux has a small random
base of the real classes.

    python benchmarks/fit_kills.py [--families joint inpaint] [--steps 24]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from prompt_fit import LENGTH, flux_parts

from factory import images, phantom, records
from factory.models.weights import tree_digest
from factory.run import Run

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results/fit_kills.json"
SIDE, COUNT, TIMEOUT_S = 64, 24, 900
FAMILIES = {
    "joint": [],
    "inpaint": ["fit.lora.inpaint.preset=null"],
    "class_conditional": ["fit.lora.train_mode=full"],
    "flux": [
        "fit.lora.flux.preset=null", f"fit.lora.flux.max_sequence_length={LENGTH}", "fit.lora.flux.base_dtype=float32",
        "fit.lora.flux.gradient_checkpointing=false",
    ],
}  # fmt: skip


def captioned(folder: Path) -> Path:
    """A run whose corpus and captions are sealed."""
    run, rows, captions = Run(str(folder)), [], []
    for number in range(COUNT):
        drawn, name = phantom.draw(5, number, SIDE), f"r{number:02}"
        rows.append({
            "row_id": name, "record_id": name, "group_id": name, "source": "phantom", "licence": "CC0-1.0",
            "split": "val" if number % 4 == 3 else "train", "diagnosis": drawn.diagnosis,
            "image": records.image_struct(images.encode_png(drawn.image), name),
            "mask": records.image_struct(images.encode_mask(drawn.mask), name), "outcome": records.ACCEPTED,
        })  # fmt: skip
        captions.append({"record_id": name, "caption": f"a {drawn.diagnosis}", "outcome": records.ACCEPTED})
    run.table("corpus").commit(0, records.rows_to_table("corpus", rows))  # type: ignore[arg-type]
    run.table("corpus").seal(1, {"of": "fit_kills"}, {})
    run.table("captions").commit(0, records.rows_to_table("captions", captions))  # type: ignore[arg-type]
    run.table("captions").seal(1, {"of": "fit_kills"}, {"corpus": run.table("corpus").digest()})
    return folder


def command(run: Path, family: str, steps: int, base: Path | None) -> list[str]:
    fields = [
        f"plan.size={SIDE}", f"fit.lora.steps={steps}", "fit.lora.batch_size=4", "fit.lora.rank=2",
        "fit.lora.warmup_steps=2", "fit.lora.checkpoint_every=2",
        *FAMILIES[family],
    ]  # fmt: skip
    begin = [sys.executable, "-m", "factory.cli", "fit", "lora", "--run", str(run), "--family", family]
    based = ["--base", str(base)] if base is not None else []
    return [*begin, *based, *(word for field in fields for word in ("--set", field))]


def curve_of(run: Path) -> list[dict[str, Any]]:
    found = sorted(run.glob("fits/lora-*/metrics.jsonl"))
    return [json.loads(line) for line in found[0].read_text().splitlines()] if found else []


def carried_out(words: list[str], run: Path, fall_at: int | None, log: Path) -> list[dict[str, Any]]:
    """The curve when the command has ended, or when it was killed because it had come to a step."""
    with log.open("ab") as out:
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"a fit takes more than {TIMEOUT_S} s; see {log}")
        curve = curve_of(run)
        if fall_at is not None and curve and curve[-1]["step"] >= fall_at:
            family = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            for one in family:
                if one.is_running():
                    one.kill()
            process.wait()
            psutil.wait_procs(family, timeout=30)
            return curve_of(run)
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"a fit ended with {process.returncode}: {log.read_text()[-2000:]}")
    return curve_of(run)


def compared(family: str, steps: int, corpus: Path, folder: Path, rng: random.Random) -> dict[str, Any]:
    base = None
    if family == "flux":
        from diffusers import FluxPipeline

        base = folder / "base"
        FluxPipeline(**flux_parts()).save_pretrained(base)
    runs = {name: folder / name for name in ("calm", "killed")}
    for run in runs.values():
        shutil.copytree(corpus, run)
    log = folder / "log"
    calm = carried_out(command(runs["calm"], family, steps, base), runs["calm"], None, log)
    fall_at = rng.randrange(4, steps - 4)
    words = command(runs["killed"], family, steps, base)
    fallen = carried_out(words, runs["killed"], fall_at, log)
    done = carried_out(words, runs["killed"], None, log)
    weights = [next((run / "weights").glob("lora-*")) for run in runs.values()]
    return {
        "fell_at_step": fallen[-1]["step"], "log_lines": len(done),
        "largest_difference_of_loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(calm, done, strict=True)),
        "same_weights": len({tree_digest(place) for place in weights}) == 1,
        "first_and_last_loss": [calm[0]["loss"], calm[-1]["loss"]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, found = random.Random(asked.seed), {}
    with tempfile.TemporaryDirectory() as scratch:
        corpus = captioned(Path(scratch) / "corpus")
        for family in asked.families:
            folder = Path(scratch) / family
            folder.mkdir()
            found[family] = compared(family, asked.steps, corpus, folder, rng)
            print(family, json.dumps(found[family]), flush=True)
    RESULT.write_text(json.dumps({"steps": asked.steps, "families": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
