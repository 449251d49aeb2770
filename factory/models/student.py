"""Distillation of a large classifier into one that fits a phone (Hinton et al. 2015; DerMAE, section on students).

B images  H W pixels  K classes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """alpha * T^2 * KL(teacher || student) at temperature T + (1 - alpha) * cross-entropy, a mean over the batch.

    Logits (B, K), labels (B,). T^2 keeps the soft term's gradients the size of the hard one's when T changes.
    """
    soft = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)


class TeacherStudent(nn.Module):
    """A frozen teacher beside the student that trains: images (B, 3, H, W) -> both logits (B, K), student's first."""

    parts_are_called = True  # each by itself too, so a sharded fit cuts them apart

    def __init__(self, teacher: nn.Module, student: nn.Module, *, features: bool = False) -> None:
        super().__init__()
        self.teacher, self.student = teacher.requires_grad_(False), student
        self.projection: Any = None  # to the teacher's width; it trains with the student and is not saved
        if features:
            self.projection = nn.Linear(_width(student), _width(teacher), bias=False)

    def train(self, mode: bool = True) -> TeacherStudent:
        """The student follows; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            soft_targets = self.teacher(images)  # (B, K)
        return self.student(images), soft_targets

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both logits (B, K), student's first, and the mean squared error of the student's pooled features, projected,
        to the teacher's: the hidden-state term of timm's FeatureDistillationTask."""
        with torch.no_grad():
            wanted, soft_targets = _pooled(self.teacher, images)  # (B, D_t), (B, K)
        found, logits = _pooled(self.student, images)  # (B, D_s), (B, K)
        return logits, soft_targets, F.mse_loss(self.projection(found), wanted)


def _width(classifier: Any) -> int:
    """The width D of the features that a timm classifier's head is asked with. Raises ValueError for a head that is not
    one linear layer."""
    head = classifier.model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"feature_weight must be 0 for {type(classifier.model).__name__}, whose head is a {type(head).__name__} "
            "and no linear layer; distil its answers alone, or another model."
        )
    return head.in_features


def _pooled(classifier: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a timm classifier's head is asked with, (B, D), and its logits (B, K), of pixels in [0, 1]."""
    model = classifier.model
    features = model.forward_features((images - classifier.mean) / classifier.std)
    pooled = model.forward_head(features, pre_logits=True)  # (B, D)
    return pooled, model.get_classifier()(pooled)


@dataclass(frozen=True)
class Cost:
    """What a model asks of a device: parameters, bytes of its weights, and operations of one image."""

    params: int
    bytes: int
    flops: int  # two per multiply-add, of one forward pass at image_size
    image_size: int


def cost(model: nn.Module, image_size: int) -> Cost:
    """Counted on the meta device, so that no weight is touched and attention is seen in full.

    The CPU's fused attention is invisible to `torch.utils.flop_counter`; on meta it is two matrix products.
    """
    import copy

    shadow: Any = copy.deepcopy(model).to("meta").eval()
    image = torch.zeros(1, 3, image_size, image_size, device="meta")
    parameters = list(model.parameters())
    stored = parameters + list(model.buffers())
    return Cost(
        params=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in stored),
        flops=forward_flops(lambda: shadow(image)),
        image_size=image_size,
    )


def forward_flops(call: Callable[[], object]) -> int:
    """Operations of a call, two per multiply-add, on the meta device or another."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def cost_at(name: str, num_classes: int, image_size: int, **options: Any) -> Cost:
    """The cost of a timm classifier at a size, without a weight in memory: ViT-H is counted in seconds.

    options: as `build_classifier` takes them, for example a patch_size.
    """
    from factory.models.classifier import build_classifier

    with torch.device("meta"):
        return cost(build_classifier(name, num_classes, image_size, **options), image_size)
