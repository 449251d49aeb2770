"""Distillation: the MAE encoder is fine-tuned to name the diagnosis, then teaches a student that fits a phone.

Two fits, one after the other. `build` runs the first, the teacher's, with the same loop and the same exactness as any
fit; the loop that called it then trains the student against the frozen teacher. Both see the same crop of an image.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factory import records
from factory.fits.card import checkpoint_at, placed, read_card, write_card
from factory.fits.classifiers import accuracy, diagnosed, load_classifier, save_timm
from factory.fits.examples import ImageExamples, augment
from factory.fits.loop import Progress, Worker, train
from factory.fits.objective import Examples, RowNoise, decay_groups
from factory.fits.teaching import Teacher, kept_answers
from factory.models.classifier import Normalised, build_classifier
from factory.models.student import TeacherStudent, cost, distillation_loss
from factory.recipe import DistillSection, FitSection
from factory.storage import Store

TEACHER = "teacher"
# Derived, stated by no paper: large enough for a small encoder to move in some hundred steps.
TEACHER_LEARNING_RATE, TEACHER_WEIGHT_DECAY = 5e-4, 0.05
MIN_AREA = 0.6  # of a crop: milder than pre-training, since the whole lesion decides the label


class TeacherObjective:
    """Fine-tuning of an MAE encoder, average-pooled under a new head, with cross-entropy on balanced classes."""

    def __init__(self, encoder: Path, examples: Examples, num_classes: int, seed: int) -> None:
        self.encoder, self.num_classes, self.seed = encoder, num_classes, seed
        self.examples, self.weight_decay = examples, TEACHER_WEIGHT_DECAY

    def build(self) -> Normalised:
        card = read_card(self.encoder)
        return _seeded(
            self.seed, card["architecture"], self.num_classes, card["image_size"], self.encoder / "model.safetensors"
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        logits = model(augment(batch["image"], noise, MIN_AREA))  # (B, K)
        return {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": accuracy(logits, batch["label"])}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Biases and norms without weight decay."""
        return decay_groups(model, self.weight_decay)

    def save(self, model: nn.Module, directory: Path) -> None:
        """The teacher as a timm directory."""
        save_timm(model, directory)

    def load(self, directory: Path) -> Normalised:
        """The teacher that `save` wrote."""
        card = read_card(self.encoder)
        weights = directory / "model.safetensors"
        return build_classifier(card["architecture"], self.num_classes, card["image_size"], weights)


class DistillObjective:
    """A student learns the teacher's soft answers and the labels.

    timm's own distillation tasks cannot read answers that are kept and normalise one batch for both, so the losses here
    are their formulas. encoder: the directory of a fitted MAE, to fit a teacher from, or with `section.teacher`
    of the classifier that teaches. store: where answers on whole images are kept. classes: the names of the labels.
    held_out: examples of the validation split, on which `save` states what was retained. teacher_dir: a directory that
    all workers share, where the fitted teacher is put, once, and found again; without one, every `build` fits it anew.
    """

    def __init__(
        self,
        section: DistillSection,
        encoder: Path,
        examples: ImageExamples,
        classes: Sequence[str],
        *,
        held_out: ImageExamples | None = None,
        teacher_dir: Path | None = None,
        store: Store | None = None,
        provenance: Mapping[str, object] | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        if len(classes) < 2:
            raise ValueError(
                f"distill must have at least two diagnoses to tell apart, got {list(classes)}; "
                "ingest a corpus with more."
            )
        self.section, self.encoder, self.images, self.classes = section, encoder, examples, list(classes)
        self.examples: Examples = examples
        self.held_out, self.teacher_dir, self.store, self.log = held_out, teacher_dir, store, log
        if section.teacher is not None:
            _check_teacher(encoder, self.classes)
        self.provenance = dict(provenance or {})

    def build(self) -> TeacherStudent:
        """Fits the teacher, if there is none, then returns it frozen beside a fresh student."""
        s, size = self.section, self.images.image_size
        begun = None if s.student_weights is None else checkpoint_at(s.student_weights, "fit.distill.student_weights")
        student = _seeded(s.seed, s.student, len(self.classes), size, begun)
        teacher = self._teacher() if s.teacher is None else load_classifier(self.encoder)
        if s.targets == "whole_image":
            asked = Teacher(teacher.to(_device()), size)
            self.images.also["teacher"] = kept_answers(asked, self.images.encoded, self.store)
            teacher.cpu()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            return TeacherStudent(teacher, student, features=s.feature_weight > 0)

    def _teacher(self) -> nn.Module:
        """The fitted teacher, the same for each worker and after each restart where they share a directory."""
        if self.teacher_dir is None:
            return self._fit_teacher()
        # A changed recipe, encoder or set of classes gets a folder of its own.
        place = self.teacher_dir / self._teacher_id()
        objective = self._teacher_objective()
        if not place.exists():
            placed(place, partial(objective.save, self._fit_teacher()))
        return objective.load(place)

    def _fit_teacher(self) -> nn.Module:
        s = self.section
        objective = self._teacher_objective()
        section = FitSection(
            steps=s.teacher_steps, batch_size=s.batch_size, learning_rate=TEACHER_LEARNING_RATE,
            weight_decay=TEACHER_WEIGHT_DECAY, warmup_steps=s.teacher_steps // 10, schedule="cosine",
            checkpoint_every=s.teacher_steps, seed=s.seed, precision=s.precision, micro_batch=s.micro_batch,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            return train(objective, section, Path(scratch), worker=Worker(device=_device()), report=self._report).cpu()

    def _teacher_objective(self) -> TeacherObjective:
        return TeacherObjective(self.encoder, self.examples, len(self.classes), self.section.seed)

    def _teacher_id(self) -> str:
        s, card = self.section, read_card(self.encoder)
        digest = records.digest(
            card["digest"], *self.classes, len(self.examples), s.teacher_steps, s.batch_size, s.seed,
            s.precision,
        )  # fmt: skip
        return f"{TEACHER}-{digest[:12]}"

    def _report(self, progress: Progress) -> None:
        metrics = ", ".join(f"{name} {progress.metrics[name]:.3f}" for name in ("loss", "accuracy"))
        self.log(f"teacher: step {progress.step} of {self.section.teacher_steps}, {metrics}")

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        assert isinstance(model, TeacherStudent)
        s, labels, pixels = self.section, batch["label"], augment(batch["image"], noise, MIN_AREA)
        further: dict[str, Tensor] = {}
        if "teacher" in batch:
            student, teacher = model.student(pixels), batch["teacher"]  # 2 x (B, K)
        elif s.feature_weight:
            student, teacher, further["features"] = model.with_features(pixels)
        else:
            student, teacher = model(pixels)
        loss = distillation_loss(student, teacher, labels, s.temperature, s.alpha)
        return further | {
            "loss": loss + s.feature_weight * further["features"] if further else loss,
            "accuracy": accuracy(student, labels),
            "agreement": accuracy(student, teacher.argmax(1)),
        }

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The student's biases and norms without weight decay."""
        return decay_groups(model, self.section.weight_decay)

    def save(self, model: nn.Module, directory: Path) -> None:
        """The student as a timm directory with its card, and the teacher below it."""
        assert isinstance(model, TeacherStudent)
        s, size = self.section, self.images.image_size
        save_timm(model.student, directory)
        save_timm(model.teacher, directory / TEACHER)
        fields: dict[str, object] = {
            "objective": "distill", "architecture": s.student, "classes": self.classes, "steps": s.steps,
            "batch_size": s.batch_size, "temperature": s.temperature, "alpha": s.alpha,
            "num_images": len(self.images.encoded), "targets": s.targets, "feature_weight": s.feature_weight,
            "teacher": {"encoder": read_card(self.encoder)["digest"], "steps": 0 if s.teacher else s.teacher_steps}
            | asdict(cost(model.teacher, size)),
        }  # fmt: skip
        if self.held_out is not None and len(self.held_out):
            fields["held_out"] = retained(model, self.held_out)
        write_card(directory, cost(model.student, size), self.provenance | fields)

    def load(self, directory: Path) -> TeacherStudent:
        """The teacher and student that `save` wrote."""
        student = load_classifier(directory)
        if self.section.teacher is not None:
            return TeacherStudent(load_classifier(self.encoder), student)
        teacher = self._teacher_objective()
        return TeacherStudent(teacher.load(directory / TEACHER), student)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_teacher(directory: Path, classes: list[str]) -> None:
    """Raises ValueError for a teacher of other classes than the student's."""
    known = read_card(directory).get("classes", [])
    if known != classes:
        raise ValueError(
            f"fit.distill.teacher must know the diagnoses of the corpus, {', '.join(classes)}, got one of "
            f"{', '.join(known) or 'none'} in {directory}; fine-tune one on this corpus."
        )


def retained(model: TeacherStudent, examples: ImageExamples) -> dict[str, float | int]:
    """How the student compares with its teacher on examples that neither was fitted on.

    agreement: share of images with the same answer. retained: the student's balanced accuracy (the mean recall over
    the classes present) over the teacher's.
    """
    from sklearn.metrics import balanced_accuracy_score

    training, device = model.training, next(model.parameters()).device
    model.eval()
    answers = []
    for start in range(0, len(examples), 64):
        batch = examples.batch(np.arange(start, min(start + 64, len(examples))))
        with torch.no_grad():
            pair = model(batch["image"].to(device).float() / 255)
        answers.append(torch.stack([logits.argmax(1).cpu() for logits in pair]))
    model.train(training)
    student, teacher = torch.cat(answers, dim=1).numpy()
    labels = examples.labels[examples.order] if examples.labels is not None else teacher
    accuracy = [float(balanced_accuracy_score(labels, found)) for found in (student, teacher)]
    return {
        "num_images": len(examples),
        "agreement": float((student == teacher).mean()),
        "student_balanced_accuracy": accuracy[0],
        "teacher_balanced_accuracy": accuracy[1],
        "retained": accuracy[0] / accuracy[1] if accuracy[1] else float("nan"),
    }


def distill_objective(
    section: DistillSection,
    encoder: Path,
    corpus: pa.Table,
    samples: pa.Table | None = None,
    *,
    teacher_dir: Path | None = None,
    store: Store | None = None,
    log: Callable[[str], None] = print,
) -> DistillObjective:
    """The objective over a run's tables: labelled training images and, if given, accepted samples.

    The labels are the diagnoses present in the corpus's training split; validation rows of those diagnoses are held
    out for the card.
    """
    data = diagnosed(corpus, samples, int(read_card(encoder)["image_size"]), rare=section.rare)
    return DistillObjective(
        section, encoder, data.examples, data.classes, held_out=data.held_out, teacher_dir=teacher_dir, store=store,
        provenance=data.provenance, log=log,
    )  # fmt: skip


def _seeded(seed: int, name: str, num_classes: int, image_size: int, checkpoint: Path | None) -> Normalised:
    """A classifier whose fresh weights are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_classifier(name, num_classes, image_size, checkpoint)
