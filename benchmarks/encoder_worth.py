"""Does masked pre-training on synthetic images raise a linear probe, and does a teacher raise its student?

A tiny ViT is pre-trained by MAE on phantoms alone. Its frozen features are probed against those of the same random
weights before the first step. Then it is fine-tuned, against the same from those random weights, and teaches a small
CNN, against the same CNN, steps and crops without it. Differences are paired by seed. On phantoms every seed draws its
own images; with --isic2017 a seed is a new split of the labelled images, a quarter held out, and intervals are widened
because splits share rows (Nadeau & Bengio 2003). A seed's pre-training serves both. Every seed of every arm is a file,
so a benchmark that was stopped goes on.

    python benchmarks/encoder_worth.py [--isic2017 PATH] [--samples RUN] [--seeds 5] [--work runs/encoder_worth]

--samples pre-trains on the accepted samples of a run in place of phantoms. It takes about a quarter of an hour a seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from factory import phantom, records
from factory.corpora import isic2017
from factory.fits.classifiers import load_classifier, save_timm
from factory.fits.distill import DistillObjective
from factory.fits.examples import ImageExamples, accepted_rows, image_bytes
from factory.fits.finetune import FinetuneObjective
from factory.fits.loop import train
from factory.fits.mae import MaeObjective
from factory.fits.probing import answers, linear_probe, nearest_neighbours, scores
from factory.images import encode_png
from factory.lab.dermae import AloneObjective
from factory.lab.intervals import cross_validated, over_seeds
from factory.models.classifier import Normalised, build_classifier
from factory.models.student import cost
from factory.recipe import CorpusSection, DistillSection, FinetuneSection, MaeSection
from factory.run import Run
from factory.storage import open_store

CLASSES = ["melanoma", "nevus", "seborrheic_keratosis"]
ENCODER, PATCH, STUDENT = "test_vit", 8, "mobilenetv3_small_050"
HELD_OUT = 4  # one image in so many
PAIRS = (
    ("linear_probe", "mae", "random"), ("nearest_neighbours", "mae", "random"), ("teacher", "taught", "from_random"),
    ("student", "taught", "alone"),
)  # fmt: skip
ARMS = ("random", "mae", "alone", "taught", "from_random")
METRICS = ("balanced_accuracy", "macro_f1", "accuracy")


def phantoms(seed: int, count: int, size: int) -> tuple[list[bytes], list[int]]:
    """Encoded phantoms and their classes, in turn."""
    drawn = [phantom.draw(seed, row, size, diagnosis=CLASSES[row % 3]).image for row in range(count)]
    return [encode_png(one) for one in drawn], [row % 3 for row in range(count)]


def published(root: Path, size: int) -> tuple[list[bytes], list[int]]:
    """The labelled images of a folder in the published layout, squeezed to squares."""
    found, labels = [], []
    for entry in isic2017.entries(str(root), CorpusSection()):
        if entry.image is None or entry.label is None or entry.problem is not None:
            continue
        pixels = cv2.imread(str(entry.image))[:, :, ::-1]
        found.append(encode_png(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)))
        labels.append(CLASSES.index(entry.label.replace(" ", "_")))
    return found, labels


def split(labels: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    fit, held_out = train_test_split(rows, test_size=1 / HELD_OUT, random_state=seed, stratify=labels)
    return fit, held_out


class Seed:
    """The fits of one seed on one kind of labelled images, in a folder where they resume."""

    def __init__(self, asked: argparse.Namespace, name: str, seed: int, synthetic: list[bytes], folder: Path) -> None:
        self.asked, self.seed, self.synthetic = asked, seed, synthetic
        self.folder, self.encoders = folder / f"{name}-s{seed}", folder / f"encoders-s{seed}"
        if name == "phantoms":
            self.labelled = phantoms(1000 + seed, asked.labelled, asked.size)
        else:
            self.labelled = published(asked.isic2017, asked.size)
        fit, held_out = split(self.labelled[1], seed)
        self.fit, self.held_out = self._rows(fit, True), self._rows(held_out, False)

    def _rows(self, rows: np.ndarray, balanced: bool) -> ImageExamples:
        images, labels = self.labelled
        return ImageExamples([images[i] for i in rows], self.asked.size, [labels[i] for i in rows], balanced=balanced)

    def encoder(self, arm: str) -> tuple[Normalised, Path]:
        """The encoder at step 0 or after pre-training, and its directory."""
        steps = self.asked.mae_steps
        section = MaeSection(
            encoder=ENCODER, patch_size=PATCH, image_size=self.asked.size, steps=steps, batch_size=64,
            warmup_steps=steps // 10, schedule="cosine", checkpoint_every=max(1, steps // 5), seed=self.seed,
        )  # fmt: skip
        objective, place = MaeObjective(section, ImageExamples(self.synthetic, self.asked.size)), self.encoders / arm
        model = objective.build() if arm == "random" else train(objective, section, self.encoders / "mae-fit")
        assert isinstance(model, Normalised)
        if not (place / "card.json").exists():
            objective.save(model, place)
        model.model = model.model.encoder
        return model, place

    def probe(self, arm: str) -> dict[str, Any]:
        encoder, _ = self.encoder(arm)
        probed = {"linear_probe": linear_probe, "nearest_neighbours": nearest_neighbours}
        return {name: call(encoder, self.fit, self.held_out) for name, call in probed.items()}

    def teacher(self, start: str = "mae") -> Path:
        place, steps = self.folder / f"teacher-{start}", self.asked.fit_steps
        if not (place / "card.json").exists():
            section = FinetuneSection(
                steps=steps, batch_size=32, warmup_steps=steps // 10, checkpoint_every=max(1, steps // 2),
                learning_rate=1e-3, layer_decay=0.75, mixup=0.2, cutmix=0.0, seed=self.seed,
            )  # fmt: skip
            weights = self.encoder(start)[1] / "model.safetensors"
            objective = FinetuneObjective(section, ENCODER, weights, self.fit, CLASSES)
            objective.save(train(objective, section, self.folder / f"teacher-{start}-fit"), place)
        return place

    def taught_by(self, start: str) -> dict[str, float]:
        """The scores of a teacher."""
        return scores(answers(load_classifier(self.teacher(start)), self.held_out), self.held_out)

    def result(self, arm: str) -> dict[str, Any]:
        """The scores of an arm, by what was tested."""
        if arm in ("random", "mae"):
            return self.probe(arm)
        return {"teacher": self.taught_by("random")} if arm == "from_random" else self.student(arm)

    def student(self, arm: str) -> dict[str, Any]:
        steps, start = self.asked.student_steps, self.folder / "student"
        if not (start / "card.json").exists():
            self._save_start(start)
        section = DistillSection(
            student=STUDENT, student_weights=str(start / "model.safetensors"), steps=steps, batch_size=32,
            warmup_steps=steps // 10, schedule="cosine", checkpoint_every=max(1, steps // 2), seed=self.seed,
            alpha=0.7 if arm == "taught" else 0.0, teacher=str(self.teacher()) if arm == "taught" else None,
        )  # fmt: skip
        place = self.folder / f"{arm}-fit"
        if arm == "alone":
            model = train(AloneObjective(section, start, self.fit, CLASSES), section, place)
            return {"student": scores(answers(model, self.held_out), self.held_out)}
        pair = train(DistillObjective(section, self.teacher(), self.fit, CLASSES), section, place)
        said = answers(pair.student, self.held_out)  # type: ignore[arg-type]
        return {"student": scores(said, self.held_out), "teacher": self.taught_by("mae")}

    def _save_start(self, directory: Path) -> None:
        from factory.fits.card import write_card

        torch.manual_seed(self.seed)
        model = build_classifier(STUDENT, len(CLASSES), self.asked.size)
        save_timm(model, directory)
        write_card(directory, cost(model, self.asked.size), {"architecture": STUDENT})


def measured(asked: argparse.Namespace, name: str, synthetic: list[bytes]) -> dict[str, Any]:
    """The means and paired differences over the seeds of one kind of labelled images."""
    store, found = open_store(str(asked.work)), {}
    given = "" if asked.samples is None else f"-{records.digest(asked.samples)[:8]}"
    budgets = (asked.size, asked.mae_steps, asked.fit_steps, asked.student_steps, asked.labelled, asked.synthetic)
    setting = "-".join(map(str, budgets)) + given
    named, folder = f"{name}-{setting}", asked.work / "fits" / setting
    for seed in range(asked.seeds):
        of_seed = partial(Seed, asked, name, seed, synthetic, folder)
        one: Seed | None = None
        for arm in ARMS:
            path = f"cells/{named}/{arm}-s{seed}.json"
            if not store.exists(path):
                one = one or of_seed()
                store.put_if_absent(path, (json.dumps(one.result(arm), indent=2) + "\n").encode())
            found[arm, seed] = json.loads(store.read(path))
            print(
                name, arm, seed, {key: round(value["balanced_accuracy"], 3) for key, value in found[arm, seed].items()}
            )
        shutil.rmtree(folder / f"{name}-s{seed}", ignore_errors=True)
    return {pair[0]: _compared(found, pair, asked.seeds, name == "phantoms") for pair in PAIRS}


def _compared(found: dict[Any, Any], pair: tuple[str, str, str], seeds: int, independent: bool) -> dict[str, Any]:
    what, high, low = pair
    table: dict[str, Any] = {}
    for metric in METRICS:
        values = {arm: [found[arm, seed][what][metric] for seed in range(seeds)] for arm in (high, low)}
        gains = [a - b for a, b in zip(values[high], values[low], strict=True)]
        table[metric] = {arm: over_seeds(own, (0.0, 1.0)) for arm, own in values.items()}
        table[metric]["gain"] = over_seeds(gains, (-1.0, 1.0)) if independent else cross_validated(
            gains, HELD_OUT, (-1.0, 1.0)
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isic2017", type=Path)
    parser.add_argument("--samples", help="a run whose accepted samples are pre-trained on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--labelled", type=int, default=2400, help="phantoms with labels, of a seed")
    parser.add_argument("--synthetic", type=int, default=6000)
    parser.add_argument("--mae-steps", type=int, default=4000)
    parser.add_argument("--fit-steps", type=int, default=500, help="of the teacher")
    parser.add_argument("--student-steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/encoder_worth"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/encoder_worth.json"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.samples is None:
        synthetic = phantoms(7, asked.synthetic, asked.size)[0]
    else:
        synthetic = image_bytes(accepted_rows(Run(asked.samples).table("samples").read()))[: asked.synthetic]
    result = {
        name: value for name, value in vars(asked).items() if name not in ("isic2017", "work", "out", "samples")
    } | {"pretrained_on": "phantoms" if asked.samples is None else "accepted samples", "num_synthetic": len(synthetic)}
    for name in ("phantoms", *(["isic2017"] if asked.isic2017 else [])):
        result[name] = measured(asked, name, synthetic)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
