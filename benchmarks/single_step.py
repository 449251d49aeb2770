"""DiffAug's single-step validation against the path that draws to the end, from the same noisy latents.

Phantoms are noised to one level by the starter. The short path asks the network once, takes the clean estimate (Eq. 11)
and segments it in latent space. The long path draws on for 50 calls of DDIM, decodes, and segments the clean latents;
both are guided. They take turns on batches of the same rows, so that what else the machine does falls on both alike.

With 50 calls, a decode d and a segmentation s, both in calls of the network, the ratio is (50 + d + s) / (1 + s), so
that 40 asks for a segmenter of at most about a fifth of a call. The paper counts 12.5 against 0.31 samples/s. Beside
it, what the short path is worth: how its overlap with the true mask agrees with the long path's.

    python benchmarks/single_step.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factory import phantom, taxonomy
from factory.models.families import load_denoiser
from factory.models.segmenter import load_latent_segmenter
from factory.models.weights import STARTER
from factory.prompts import prompt_for
from factory.quality import statistics
from factory.quality.overlap import iou

RESULT = Path(__file__).resolve().parent / "results" / "single_step.json"
SEED, SIZE, CALLS, GUIDANCE, THETA = 97, 128, 50, 3.0, 0.7
GOALS = {"ratio": 40.0, "segmenter_over_predict": 0.2}


class Paths:
    """Both paths over the starter and its gate, from latents at timestep `t` of 1,000."""

    def __init__(self, t: int) -> None:
        self.denoiser: Any = load_denoiser(STARTER)
        self.segmenter = load_latent_segmenter(STARTER / "gate", self.denoiser.vae_digest).eval()
        self.t, self.empty = t, self.denoiser.condition([""])

    @torch.inference_mode()
    def predict(self, noisy: Tensor, condition: Tensor) -> Tensor:
        rows = len(noisy)
        timesteps = torch.full((rows,), self.t)
        found = self.denoiser.predict(noisy, timesteps, condition, torch.full((rows,), GUIDANCE), self.empty)
        return self.denoiser.clean(noisy, timesteps, found.conditional)

    @torch.inference_mode()
    def segment(self, latents: Tensor) -> np.ndarray:
        return (self.segmenter(self.denoiser.image_latents(latents)) > 0)[:, 0].numpy()

    def short(self, noisy: Tensor, condition: Tensor) -> np.ndarray:
        return self.segment(self.predict(noisy, condition))

    def long(self, noisy: Tensor, condition: Tensor) -> np.ndarray:
        """50 calls over the levels below `t`, a decode, a segmentation."""
        latents = self.denoise(noisy, condition)
        with torch.inference_mode():
            self.denoiser.decode(latents)
        return self.segment(latents)

    @torch.inference_mode()
    def denoise(self, noisy: Tensor, condition: Tensor) -> Tensor:
        levels = self.denoiser.alphas_cumprod
        rows, guidance = len(noisy), torch.full((len(noisy),), GUIDANCE)
        steps = torch.linspace(self.t, 0, CALLS + 1).round().long().tolist()
        for now, then in itertools.pairwise(steps):
            timesteps = torch.full((rows,), now)
            found = self.denoiser.predict(noisy, timesteps, condition, guidance, self.empty)
            clean = self.denoiser.clean(noisy, timesteps, found.guided)
            eps = (noisy - levels[now].sqrt() * clean) / (1 - levels[now]).sqrt()
            noisy = levels[then].sqrt() * clean + (1 - levels[then]).sqrt() * eps if then else clean
        return noisy


def timed(path: Callable[..., Any], *given_to: Tensor) -> tuple[float, float, Any]:
    """Wall and CPU seconds of a call, and what it gave."""
    wall, cpu = time.perf_counter(), time.process_time()
    given = path(*given_to)
    return time.perf_counter() - wall, time.process_time() - cpu, given


def drawn(first: int, rows: int, denoiser: Any) -> tuple[Tensor, Tensor, np.ndarray]:
    """Latents and condition of phantoms with a lesion, and their true masks (n, H, W)."""
    one = [phantom.draw(SEED, first + number, SIZE) for number in range(rows)]
    images = torch.from_numpy(np.stack([each.image for each in one])).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = np.stack([each.mask for each in one])
    prompts = [prompt_for(each.diagnosis, taxonomy.SKIN_TYPES[each.skin_type - 1]) for each in one]
    return denoiser.encode(images, torch.from_numpy(masks[:, None]).float()), denoiser.condition(prompts), masks


def measure(turns: int, batch: int, t: int) -> dict[str, Any]:
    paths, noise = Paths(t), torch.Generator().manual_seed(SEED)
    level = paths.denoiser.alphas_cumprod[t]
    spent: dict[str, list[tuple[float, float]]] = {"short": [], "long": [], "predict": [], "segment": [], "decode": []}
    overlaps: dict[str, list[float]] = {"short": [], "long": []}
    for turn in range(turns + 1):  # the first call of each shape is slow and not counted
        clean, condition, masks = drawn(turn * batch, batch, paths.denoiser)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * torch.randn(clean.shape, generator=noise)
        found = {
            "short": timed(paths.short, noisy, condition), "long": timed(paths.long, noisy, condition),
            "predict": timed(paths.predict, noisy, condition), "segment": timed(paths.segment, clean),
            "decode": timed(paths.denoiser.decode, clean),
        }  # fmt: skip
        if turn:
            for name, (wall, cpu, _) in found.items():
                spent[name].append((wall, cpu))
            for name in overlaps:
                overlaps[name] += [float(value) for value in iou(masks, found[name][2])]
    total = {name: np.asarray(seconds).sum(0) for name, seconds in spent.items()}
    turn_by_turn = np.asarray(spent["long"]) / np.asarray(spent["short"])
    short, long = (np.asarray(overlaps[name]) for name in ("short", "long"))
    rank = statistics.auc(short[long > THETA], short[long <= THETA])
    return {
        "size": SIZE, "batch": batch, "turns": turns, "timestep": t, "calls": CALLS,
        "threads": torch.get_num_threads(), "goals": GOALS,
        "ratio_wall": float(total["long"][0] / total["short"][0]),
        "ratio_cpu": float(total["long"][1] / total["short"][1]),
        "ratio_of_turns": [float(value) for value in np.percentile(turn_by_turn[:, 0], [2.5, 50, 97.5])],
        "segmenter_over_predict": float(total["segment"][1] / total["predict"][1]),
        "decode_over_predict": float(total["decode"][1] / total["predict"][1]),
        "samples_per_s": {name: turns * batch / float(total[name][0]) for name in ("short", "long")},
        "median_iou_with_the_truth": {"short": float(np.median(short)), "long": float(np.median(long))},
        "accepted_at_0.7": {"short": float(np.mean(short > THETA)), "long": float(np.mean(long > THETA))},
        "same_verdict_at_0.7": float(np.mean((short > THETA) == (long > THETA))),
        "auc_of_the_short_overlap_for_the_long_verdict": [float(v) if np.isfinite(v) else None for v in rank[:3]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--timestep", type=int, default=200, help="of 1,000; the paper's t is 0.2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    result = measure(asked.turns, asked.batch, asked.timestep)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
