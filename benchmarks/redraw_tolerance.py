"""How far a sample differs when it is drawn again at another batch shape or thread count: what `factory reproduce`
forgives. The starter's samples at 128 px after 20 calls, and after 14 of them, beside the same on the same processor,
where they are byte-equal if nothing is changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factory.models.families import load_denoiser
from factory.models.sampler import SampleJob, Sampler
from factory.models.weights import STARTER

RESULT = Path(__file__).parent / "results" / "redraw_tolerance.json"
# Samples, calls of 20, (slots, threads), and what they are compared with.
RUNS = (
    (8, 20, (16, 1), ((1, 1), (4, 1), (8, 1), (32, 1))),
    (4, 20, (4, 1), ((4, 2), (1, 1), (8, 1))),
    (4, 14, (4, 1), ((4, 2), (1, 1), (8, 1))),
)
PROMPT = "a dermoscopic image of a {} on {} skin"


def drawn(denoiser: Any, count: int, slots: int, threads: int, calls: int) -> dict[str, np.ndarray]:
    """Levels (N, 3, H, W) int, masks (N, H, W) bool and half-precision latents (N, C, h, w) after `calls` of 20."""
    torch.set_num_threads(threads)
    words = [PROMPT.format(name, tone) for name in ("melanoma", "nevus") for tone in ("fair", "dark")]
    jobs = [
        SampleJob(str(k), 7000 + k, denoiser.condition([words[k % 4]])[0], 2.0, 20, stop_after=calls)
        for k in range(count)
    ]
    sampler = Sampler(denoiser, width=128, height=128, slots=slots, decode="all", decode_batch=min(4, slots))
    found = sorted(sampler.run(jobs), key=lambda sampled: int(sampled.sample_id))
    images = torch.stack([sampled.image for sampled in found if sampled.image is not None])
    masks = torch.stack([sampled.mask for sampled in found if sampled.mask is not None])
    return {
        "levels": ((images + 1) * 127.5).round().clamp(0, 255).int().numpy(),
        "mask": masks[:, 0].numpy() > 0.5,
        "latents": torch.stack([sampled.latents for sampled in found]).half().float().numpy(),
    }


def compared(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    levels = np.abs(one["levels"] - other["levels"])
    return {
        "levels_max": int(levels.max()),
        "levels_differing_share": float((levels > 0).mean()),
        "mask_pixels_max": int((one["mask"] != other["mask"]).sum((1, 2)).max()),
        "latents_max": float(np.abs(one["latents"] - other["latents"]).max()),
        "latents_largest": float(np.abs(one["latents"]).max()),
    }


def main() -> None:
    denoiser = load_denoiser(STARTER, None, "joint")
    result: dict[str, dict[str, float]] = {}
    for count, calls, base, others in RUNS:
        known = drawn(denoiser, count, *base, calls)
        for slots, threads in others:
            name = f"{count} samples, {calls} calls, slots {base[0]} to {slots}, threads {base[1]} to {threads}"
            result[name] = compared(known, drawn(denoiser, count, slots, threads, calls))
            print(name, result[name], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
