"""Does the class show? The class-conditional generator, fitted on phantoms alone, measured by what it draws.

The `budget` U-Net is fitted on the starter's VAE from equally many phantoms of each diagnosis, then draws samples of
each. Masks (by colour) and attributes are measured alike on three sets: phantoms that no fit has seen, the same through
the VAE and back, and the samples. For every class and attribute there is an AUC of that class over the others; the
samples' should be the phantoms'. A logistic regression of the attributes, fitted on further phantoms, says how often a
set's picture is taken for the class that was asked, against the same samples with their classes shuffled.

A fit that was stopped goes on where it was: call it again with the same arguments.

    python benchmarks/class_effect.py [--steps 6000] [--phantoms 3000] [--samples 128] [--work runs/class_effect]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from factory import records
from factory.fits.class_conditional import FitClassConditional
from factory.fits.loop import train
from factory.images import encode_png
from factory.models.class_conditional import ClassConditionalDenoiser
from factory.models.sampler import SampleJob, Sampler
from factory.models.weights import STARTER
from factory.phantom import DIAGNOSES, draw
from factory.quality.attributes import estimate_mask, measure
from factory.quality.statistics import auc
from factory.recipe import LoraSection
from factory.release.sheet import contact_sheet

NUMBERS = ("asymmetry", "border_irregularity", "color_asymmetry", "radial_variance", "num_colors", "relative_diameter")
FIT_SEED, JUDGE_SEED, TEST_SEED = 11, 12, 13  # phantoms of the fit, of the judge, and of the comparison


def phantoms(seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    """Images (N, S, S, 3) uint8 of equally many phantoms of each diagnosis, and the diagnoses."""
    names = [DIAGNOSES[number % len(DIAGNOSES)] for number in range(count)]
    return np.stack([draw(seed, number, size, diagnosis=name).image for number, name in enumerate(names)]), names


def through_vae(denoiser: ClassConditionalDenoiser, images: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return np.concatenate([bytes_of(denoiser.decode(denoiser.encode_image(part))[0]) for part in pixels.split(16)])


def bytes_of(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def sampled(
    denoiser: ClassConditionalDenoiser, names: Sequence[str], args: argparse.Namespace
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each sample and its image, as they come."""
    conditions = {name: denoiser.condition([name])[0] for name in set(names)}
    jobs = [
        SampleJob(str(number), 1000 + number, conditions[name], args.guidance, args.num_inference_steps)
        for number, name in enumerate(names)
    ]
    sampler = Sampler(denoiser, width=args.size, height=args.size, slots=16, decode="all", decode_batch=16)
    for drawn in sampler.run(jobs):
        assert drawn.image is not None
        yield int(drawn.sample_id), bytes_of(drawn.image[None])[0]


def attributes(images: np.ndarray) -> np.ndarray:
    """(N, len(NUMBERS)); a row of NaN where no lesion stands out."""
    rows = []
    for image in images:
        try:
            found = measure(image, estimate_mask(image))
        except ValueError:  # there is no lesion to measure
            rows.append([np.nan] * len(NUMBERS))
            continue
        own = {name: getattr(found, name) for name in NUMBERS if name != "num_colors"}
        rows.append([float(({"num_colors": len(found.colors)} | own)[name]) for name in NUMBERS])
    return np.array(rows)


def by_class(values: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """AUC of each class over the others, by attribute, with its interval."""
    labels, known = np.array(names), np.isfinite(values).all(axis=1)
    found: dict[str, dict[str, Any]] = {}
    for column, attribute in enumerate(NUMBERS):
        for name in DIAGNOSES:
            of = known & (labels == name)
            interval = auc(values[of, column], values[known & (labels != name), column])
            found.setdefault(attribute, {})[name] = interval._asdict()
    return found


def shares_taken_for(judge: Any, values: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """How often the judge names the class that was asked: of all, and the mean over classes."""
    known = np.isfinite(values).all(axis=1)
    right = judge.predict(values[known]) == np.array(names)[known]
    asked = np.array(names)[known]
    return {
        "all": float(right.mean()),
        **{name: float(right[asked == name].mean()) for name in DIAGNOSES if (asked == name).any()},
        "not_measured": int((~known).sum()),
    }


def correlation(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Of two sets' AUCs over all classes and attributes: Spearman's rank correlation, and the mean distance."""
    pairs = np.array([[s[a][c]["value"] for s in (one, other)] for a in NUMBERS for c in DIAGNOSES])
    return {"spearman": float(spearmanr(*pairs.T).statistic), "mean_distance": float(np.abs(np.diff(pairs)).mean())}


def fitted(args: argparse.Namespace) -> tuple[ClassConditionalDenoiser, dict[str, Any]]:
    """The denoiser after the fit, saved below the work directory, and what the fit was."""
    section = LoraSection(
        family="class_conditional", train_mode="full", steps=args.steps, batch_size=args.batch_size,
        learning_rate=args.learning_rate, warmup_steps=min(100, args.steps), schedule="cosine", ema_decay=0.999,
        checkpoint_every=args.checkpoint_every, caption_dropout=0.1,
    )  # fmt: skip
    images, names = phantoms(FIT_SEED, args.phantoms, args.size)
    objective = FitClassConditional(
        STARTER, [encode_png(image) for image in images], names, section, args.size, DIAGNOSES
    )
    started = time.perf_counter()
    shape = f"{args.steps}-{args.batch_size}-{args.learning_rate:g}-{args.phantoms}-{args.size}"
    directory = args.work / f"fit-{shape}"  # another fit is not gone on with
    model = train(objective, section, directory, report=lambda done: print(done.step, done.metrics, flush=True))
    objective.save(model, directory / "weights")
    curve = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    about = {
        "section": section.model_dump(mode="json", include={"steps", "batch_size", "learning_rate", "ema_decay"}),
        "num_phantoms": len(objective.examples), "parameters": sum(value.numel() for value in model.parameters()),
        "seconds_this_time": time.perf_counter() - started, "first_loss": curve[0]["loss"],
        "last_loss": float(np.mean([row["loss"] for row in curve[-10:]])),
    }  # fmt: skip
    return ClassConditionalDenoiser.load(directory / "weights"), about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--phantoms", type=int, default=3000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128, help="of each class, and so many test phantoms")
    parser.add_argument("--num-inference-steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/class_effect"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/class_effect.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    denoiser, fit = fitted(args)
    test, names = phantoms(TEST_SEED, args.samples * len(DIAGNOSES), args.size)
    started = time.perf_counter()
    drawn = np.stack([image for _, image in sorted(sampled(denoiser, names, args), key=lambda pair: pair[0])])
    seconds = time.perf_counter() - started
    sets = {"phantoms": test, "phantoms_through_vae": through_vae(denoiser, test), "samples": drawn}
    values = {name: attributes(images) for name, images in sets.items()}

    others, classes = phantoms(JUDGE_SEED, max(300, args.samples * len(DIAGNOSES)), args.size)
    learnt = attributes(others)
    known = np.isfinite(learnt).all(axis=1)
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    judge.fit(learnt[known], np.array(classes)[known])
    shuffled = list(np.random.default_rng(0).permutation(names))

    aucs = {name: by_class(found, names) for name, found in values.items()}
    result = {
        "fit": fit, "guidance": args.guidance, "num_inference_steps": args.num_inference_steps,
        "samples_per_class": args.samples, "samples_per_second": len(drawn) / seconds, "auc_of_class_over_others": aucs,
        "auc_like_the_phantoms": {name: correlation(aucs["phantoms"], aucs[name]) for name in list(aucs)[1:]},
        "taken_for_the_class_asked": {
            **{name: shares_taken_for(judge, found, names) for name, found in values.items()},
            "samples_with_shuffled_classes": shares_taken_for(judge, values["samples"], shuffled),
        },
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    rows = [
        {"image": image, "mask": estimate_mask(image), "outcome": records.ACCEPTED, "diagnosis": name}
        for image, name in list(zip(drawn, names, strict=True))[: 8 * len(DIAGNOSES)]
    ]
    title = f"a class each column, {fit['section']['steps']} steps, guidance {args.guidance}; masks by colour, no gate"
    contact_sheet(rows, title=title, columns=len(DIAGNOSES), tile=2 * args.size).save(args.work / "sheet.png")
    print(json.dumps({name: result[name] for name in ("auc_like_the_phantoms", "taken_for_the_class_asked")}, indent=2))
    print(f"sheet in {args.work / 'sheet.png'}, result in {args.out}")


if __name__ == "__main__":
    main()
