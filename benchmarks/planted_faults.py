"""The gate on planted faults: of phantoms that no fit has seen, and of real masks, by size and by skin type.

65 of 100 pairs are good (true IoU above 0.7) and 35 bad, by shifted, scaled, torn and swapped masks (`lab/planted.py`).
Three policies judge the same pairs by the same IoU: DiffAug's flat theta of 0.7, the default (0.7, less for small
lesions by geometry), and theta by size as `quality/thresholds.py` fits it, on phantoms of the renderer's own settings
with seeds of their own. Precision and recall with Wilson intervals, for thirds of the lesions' areas and for groups of
skin types; how far the IoU that the gate states lies from the true one on average (calibration error); and how well
the segmenter finds the lesions at all.

    python benchmarks/planted_faults.py
    python benchmarks/planted_faults.py --isic2017 PATH          # the validation split's masks too
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from segmenter_transfer import TRAINING, VALIDATION

from factory import phantom
from factory.lab import planted
from factory.models.encoder import load_image_encoder
from factory.models.weights import STARTER
from factory.quality.faults import MARGIN, MIX, Planted, cases_of, plant, plant_real
from factory.quality.overlap import iou
from factory.quality.thresholds import fit_thresholds
from factory.recipe import GateSection
from factory.stages.score import ScoreSamples

RESULT = Path(__file__).resolve().parent / "results" / "planted_faults.json"
SIZE, SEED, FIT_SEED = 128, 97, 1301
GOALS = {"precision": 0.95, "recall": 0.95, "calibration_error": 0.05}


class Shown:
    """The pairs with what the segmenter found of each; policies come afterwards, and cost nothing."""

    def __init__(self, score: ScoreSamples, encode: Callable[[torch.Tensor], torch.Tensor], pairs: Iterable[Planted]):
        self.pairs, self.score = list(pairs), score
        latents = []
        for start in range(0, len(self.pairs), 16):
            images = np.stack([pair.image for pair in self.pairs[start : start + 16]])
            latents.append(encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).numpy())
        self.latents = np.concatenate(latents)
        self.chance = score.segment(self.latents)
        judged = score.judge(self.latents, self.chance, np.stack([pair.mask for pair in self.pairs]))
        self.stated = [row["scores"]["iou"] for row in judged]

    def under(self, section: GateSection) -> dict[str, Any]:
        """The tables under a policy."""
        self.score.section, place = section, iter(range(0, len(self.pairs), planted._BATCH))

        def validate(images: np.ndarray, masks: np.ndarray) -> list[planted.Verdict]:
            start = next(place)
            rows = slice(start, start + len(images))
            judged = self.score.judge(self.latents[rows], self.chance[rows], masks)
            return [(answer["outcome"], answer["reason"], answer["scores"]["iou"]) for answer in judged]

        return planted.accuracy(validate, self.pairs)


def found(shown: Shown, truths: Sequence[np.ndarray]) -> dict[str, Any]:
    """How well the segmenter finds the true lesions: mean IoU, and in thirds of their areas."""
    overlaps = iou(np.stack(truths), shown.chance > 0.5)
    order = np.argsort([pair.area for pair in shown.pairs], kind="stable")
    thirds = zip(("small", "medium", "large"), np.array_split(order, 3), strict=True)
    return {
        "mean_iou": float(overlaps.mean()), "above_0.7": float((overlaps > 0.7).mean()),
        "by_size": {name: float(overlaps[part].mean()) for name, part in thirds},
    }  # fmt: skip


def fitted_on(count: int) -> list[Planted]:
    """Pairs of phantoms as the renderer draws them, with seeds that no fit uses."""
    cases = enumerate(cases_of(MIX, FIT_SEED, count))
    return [plant(FIT_SEED, k, *case, SIZE, MARGIN, phantom.DEFAULT) for k, case in cases]


def real(root: Path, split: tuple[str, str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (S, S, 3) and masks (S, S) of a split, squeezed to SIZE."""
    pairs = []
    for path in sorted((root / split[0]).glob("*.jpg")):
        mask = cv2.imread(str(root / split[1] / f"{path.stem}_segmentation.png"), cv2.IMREAD_GRAYSCALE)
        image = cv2.resize(cv2.imread(str(path))[:, :, ::-1], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        pairs.append((image, cv2.resize(mask, (SIZE, SIZE), interpolation=cv2.INTER_AREA) > 127))
    return pairs


def compared(shown: Shown, policies: dict[str, GateSection]) -> dict[str, Any]:
    return {name: shown.under(section) for name, section in policies.items()}


def told(name: str, tables: dict[str, Any]) -> None:
    for policy, table in tables.items():
        rows = [("all", table), *table["by_size"].items(), *table["by_skin"].items()]
        for stratum, rates in rows:
            values = " ".join(
                f"{kind} {rates[kind]['value']:.3f} ({rates[kind]['low']:.2f} to {rates[kind]['high']:.2f})"
                for kind in ("precision", "recall") if rates[kind]["value"] is not None
            )  # fmt: skip
            print(f"{name:9} {policy:8} {stratum:7} {values}")
        print(f"{name:9} {policy:8} calibration error {table['gate_iou']['calibration_error']:.3f}")


def measure(count: int, gate: Path, isic: Path | None) -> dict[str, Any]:
    encoder = load_image_encoder(STARTER, None, "joint")
    score = ScoreSamples(gate, encoder.vae_digest, GateSection(), torch.get_num_threads())
    near = Shown(score, encoder.encode, fitted_on(count))
    theta = fit_thresholds(near.stated, [p.good for p in near.pairs], [float(p.mask.mean()) for p in near.pairs])
    policies = {
        "flat": GateSection(shift_tolerance=0.0), "default": GateSection(), "fitted": GateSection(theta_by_area=theta),
    }  # fmt: skip
    cases = cases_of(MIX, SEED, count)
    unseen = Shown(score, encoder.encode, (plant(SEED, k, *case, SIZE, MARGIN) for k, case in enumerate(cases)))
    true = [np.asarray(phantom.draw(SEED, k, SIZE, settings=phantom.HELD_OUT).mask, bool) for k in range(count)]
    result: dict[str, Any] = {
        "count": count, "size": SIZE, "goals": GOALS, "theta_by_area": theta,
        "phantoms": {"found": found(unseen, true), "policies": compared(unseen, policies)},
        "same_renderer": {"policies": compared(near, {"fitted": policies["fitted"], "flat": policies["flat"]})},
    }  # fmt: skip
    if isic is not None:
        pairs = [pair for split in (VALIDATION, TRAINING) for pair in real(isic, split)][:count]
        shown = Shown(score, encoder.encode, plant_real(SEED, pairs))
        result["isic2017"] = {
            "count": len(pairs), "found": found(shown, [mask for _, mask in pairs]),
            "policies": compared(shown, policies),
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1200, help="pairs")
    parser.add_argument("--gate", type=Path, default=STARTER / "gate", help="a directory that `fit gate` wrote")
    parser.add_argument("--isic2017", type=Path, help="the challenge's published layout")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    result = measure(wanted.count, wanted.gate, wanted.isic2017)
    for name in ("phantoms", "same_renderer", "isic2017"):
        if name in result:
            print(name, result[name].get("found", ""))
            told(name, result[name]["policies"])
    print("theta by area", result["theta_by_area"])
    wanted.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
