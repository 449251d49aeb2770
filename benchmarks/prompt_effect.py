"""Whether a generator draws what its prompt says, and whether its masks are where its lesions are.

    python benchmarks/prompt_effect.py [--family joint] [--weights PATH] [--adapter PATH] [--count 64] [--sheet FILE]

Pairs of prompts that differ in one word only, drawn from the same seeds; the AUC says how often a sample of the second
prompt measures more than one of the first (0.5: the word does nothing). Masks are compared with those that a segmenter
finds in the encoded image, which was fitted on true masks and has never seen a generator. Writes
results/prompt_effect-FAMILY.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factory.images import read_mask, read_png
from factory.models.families import load_denoiser
from factory.models.segmenter import load_latent_segmenter
from factory.models.weights import STARTER
from factory.quality import statistics
from factory.quality.attributes import measure
from factory.quality.overlap import iou
from factory.quality.skin_tone import skin_lab
from factory.recipe import GateSection, PlanSection, SynthesizeSection
from factory.release.sheet import contact_sheet
from factory.stages.plan import sample_rows
from factory.stages.synthesize import SynthesizeSamples

RESULTS = Path(__file__).parent / "results"
FEW, MANY = "light-brown", "light-brown,dark-brown,black,blue-gray"
LOOK: dict[str, Any] = {
    "diagnosis": "melanoma", "skin_type": "II", "asymmetry": "medium", "border": "medium", "colors": None
}  # fmt: skip
# name: (what the two prompts say, what is measured)
CONTRASTS: dict[str, tuple[str, Any, Any]] = {
    "asymmetry": ("asymmetry", "low", "high"),
    "border_irregularity": ("border", "low", "high"),
    "num_colors": ("colors", FEW, MANY),
    "darkness_of_skin": ("skin_type", "I", "VI"),
    "color_asymmetry": ("diagnosis", "nevus", "melanoma"),
}


def drawn(stage: SynthesizeSamples, section: PlanSection, said: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Samples of one look. Seeds are those of their numbers, the same for every look."""
    colors = said["colors"].split(",") if said["colors"] else None
    rows = sample_rows(count=count, section=section, seed=0, **{**said, "colors": colors})
    return stage([row | {"seed": 1000 + number} for number, row in enumerate(rows)])


def measured(row: dict[str, Any]) -> dict[str, float]:
    """What the contrasts are read from; nothing where a sample holds no lesion to measure."""
    rgb, mask = read_png(row["image"]["bytes"]), read_mask(row["mask"]["bytes"])
    try:
        found = measure(rgb, mask)
    except ValueError:
        return {}
    skin = skin_lab(rgb, mask)
    return {
        "asymmetry": found.asymmetry, "border_irregularity": found.border_irregularity,
        "num_colors": len(found.colors), "color_asymmetry": found.color_asymmetry,
        **({} if skin is None else {"darkness_of_skin": -float(skin[0])}),
    }  # fmt: skip


def overlaps(rows: list[dict[str, Any]], weights: Path, adapter: Path | None, family: str) -> np.ndarray:
    """IoU of each sample's mask with the one found in its encoded image."""
    denoiser = load_denoiser(weights, adapter, family)
    segmenter = load_latent_segmenter(STARTER / "gate", denoiser.vae_digest).eval()
    found = []
    for row in rows:
        image = torch.from_numpy(read_png(row["image"]["bytes"]).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        mask = read_mask(row["mask"]["bytes"])
        with torch.inference_mode():
            latents = denoiser.image_latents(denoiser.encode(image, torch.from_numpy(mask)[None, None].float()))
            seen = segmenter(latents)[0, 0].numpy() > 0
        found.append(float(iou(mask[None], seen[None])[0]))
    return np.asarray(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="joint")
    parser.add_argument("--weights", type=Path, default=STARTER)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    section = PlanSection(generator=asked.family, guidance=asked.guidance)
    synthesis = SynthesizeSection(keep_rejected="image", num_threads=2, slots=32)
    stage = SynthesizeSamples(asked.weights, asked.adapter, synthesis, GateSection(), None, family=asked.family)
    started, shown, everything = time.perf_counter(), [], []
    contrasts: dict[str, Any] = {}
    for name, (word, first, second) in CONTRASTS.items():
        sides = [drawn(stage, section, LOOK | {word: value}, asked.count) for value in (first, second)]
        values = [[found[name] for row in side if name in (found := measured(row))] for side in sides]
        area = statistics.auc(np.asarray(values[1]), np.asarray(values[0]))
        contrasts[name] = {
            "prompts": [sides[0][0]["prompt"], sides[1][0]["prompt"]],
            "medians": [float(np.median(side)) for side in values],
            "auc": [round(area.value, 3), round(area.low, 3), round(area.high, 3)],
            "measured": [len(side) for side in values],
        }
        everything += sides[0] + sides[1]
        shown += sides[0][:4] + sides[1][:4]
        print(name, contrasts[name], flush=True)
    agree = overlaps(everything, asked.weights, asked.adapter, asked.family)
    above = statistics.wilson(int((agree > 0.7).sum()), len(agree))
    result = {
        "family": asked.family, "guidance": asked.guidance, "num_samples": len(everything), "contrasts": contrasts,
        "mask_iou_with_independent_segmenter": {
            "median": float(np.median(agree)), "share_above_0.7": [above.value, above.low, above.high],
        },
        "seconds": round(time.perf_counter() - started),
    }  # fmt: skip
    (RESULTS / f"prompt_effect-{asked.family}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["mask_iou_with_independent_segmenter"]))
    if asked.sheet is not None:
        title = f"{asked.family}: pairs of prompts that differ in one word"
        contact_sheet(shown, title=title, columns=4).save(asked.sheet)


if __name__ == "__main__":
    main()
