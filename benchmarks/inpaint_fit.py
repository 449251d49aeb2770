"""The shipped starter fitted for inpainting on phantoms for a minute: do lesions come to lie in their planned masks?

Before and after the fit the same samples are planned (masks from the phantoms' own shapes, backgrounds from phantoms
that the fit has not seen) and judged by the shipped gate, which is handed the planned mask. Told are the IoU of what it
finds with that mask, how many it accepts, and the PSNR of the background before it is pasted back.

    python benchmarks/inpaint_fit.py --steps 150
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factory import phantom, records
from factory.fits.inpaint import FitInpaintLora
from factory.fits.loop import train
from factory.images import encode_mask, encode_png
from factory.models.families import vae_digest_of
from factory.models.weights import STARTER
from factory.prompts import prompt_for
from factory.quality.normal_skin import Box, normal_square
from factory.quality.shape_prior import ShapePrior
from factory.recipe import GateSection, InpaintSection, LoraSection, SynthesizeSection
from factory.stages.score import LocalGate, ScoreSamples
from factory.stages.synthesize import SynthesizeSamples

RESULT = Path(__file__).resolve().parent / "results/inpaint_fit.json"
SIZE, FITTED, OTHERS, MIN_SIDE = 128, 96, 40, 32
FIT_SEED, BACKGROUND_SEED = 77, 99


def fit(steps: int, folder: Path) -> tuple[Path, float]:
    """The adapter's directory, and seconds per step."""
    drawn = [phantom.draw(FIT_SEED, number, SIZE) for number in range(FITTED)]
    section = LoraSection(
        family="inpaint", steps=steps, batch_size=8, learning_rate=1e-3, warmup_steps=10, rank=16,
        inpaint=InpaintSection(preset=None),
    )  # fmt: skip
    images, masks = [encode_png(one.image) for one in drawn], [encode_mask(one.mask) for one in drawn]
    prompts = [prompt_for(one.diagnosis, None) for one in drawn]
    objective = FitInpaintLora(STARTER, images, masks, prompts, section, SIZE)
    started = time.perf_counter()
    model = train(objective, section, folder / "fit")
    seconds = (time.perf_counter() - started) / steps
    objective.save(model, folder / "weights")
    return folder / "weights", seconds


def planned(count: int, guidance: float) -> tuple[list[dict[str, Any]], int]:
    """Rows to draw, and how many of OTHERS phantoms have normal skin."""
    seen = [phantom.draw(FIT_SEED, number, SIZE) for number in range(FITTED)]
    prior = ShapePrior.fit([one.mask for one in seen], [one.diagnosis for one in seen])
    found = [phantom.draw(BACKGROUND_SEED, number, SIZE) for number in range(OTHERS)]
    skin = [box.of(one.image) for one in found if isinstance(box := normal_square(one.image, one.mask, MIN_SIDE), Box)]
    rows = []
    for number in range(count):
        diagnosis = ("nevus", "melanoma", "seborrheic_keratosis")[number % 3]
        mask = prior.sample(np.random.default_rng(number), diagnosis, SIZE)
        rows.append({
            "sample_id": f"s{number}", "unit": 0, "index": number, "prompt": prompt_for(diagnosis, None),
            "seed": number, "width": SIZE, "height": SIZE, "guidance": guidance, "num_inference_steps": 20,
            "audit": True, "generator": "inpaint", "mask": records.image_struct(encode_mask(mask), "mask.png"),
            "background": records.image_struct(encode_png(skin[number % len(skin)]), "skin.png"),
        })  # fmt: skip
    return rows, len(skin)


def judged(adapter: Path | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the gate says of the rows drawn with an adapter, none stopped early."""
    policy = GateSection(checkpoints=[])
    gate = LocalGate(ScoreSamples(STARTER / "gate", vae_digest_of(STARTER, None, "inpaint"), policy))
    section = SynthesizeSection(slots=8, keep_rejected="image")
    made = SynthesizeSamples(STARTER, adapter, section, policy, gate, "", "inpaint")(rows)
    return {
        "mean_iou": float(np.mean([row["iou"] for row in made])),
        "accepted": sum(row["outcome"] == records.ACCEPTED for row in made),
        "median_background_psnr_db": float(np.median([row["score_background_psnr"] for row in made])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--guidance", type=float, default=7.5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows, skin = planned(asked.count, asked.guidance)
    result: dict[str, Any] = vars(asked) | {"backgrounds": f"{skin} of {OTHERS}", "before": judged(None, rows)}
    with tempfile.TemporaryDirectory() as folder:
        adapter, result["seconds_per_step"] = fit(asked.steps, Path(folder))
        result["after"] = judged(adapter, rows)
    RESULT.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
