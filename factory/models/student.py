"""Distillation of a large classifier into one that fits a phone (Hinton et al. 2015; DerMAE, section on students).

B images  H W pixels  K classes
"""

from __future__ import annotations

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

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = teacher.requires_grad_(False), student

    def train(self, mode: bool = True) -> TeacherStudent:
        """The student follows; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            soft_targets = self.teacher(images)  # (B, K)
        return self.student(images), soft_targets


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

    from torch.utils.flop_counter import FlopCounterMode

    shadow: Any = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.zeros(1, 3, image_size, image_size, device="meta"))
    parameters = list(model.parameters())
    stored = parameters + list(model.buffers())
    return Cost(
        params=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in stored),
        flops=counter.get_total_flops(),
        image_size=image_size,
    )


def cost_at(name: str, num_classes: int, image_size: int, **options: Any) -> Cost:
    """The cost of a timm classifier at a size, without a weight in memory: ViT-H is counted in seconds.

    options: as `build_classifier` takes them, for example a patch_size.
    """
    from factory.models.classifier import build_classifier

    with torch.device("meta"):
        return cost(build_classifier(name, num_classes, image_size, **options), image_size)
