"""DerMAE's table: which networks, from which weights, how long each is fitted, and on how many seeds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from factory.sections.base import Count, Positive, Section, refuse
from factory.sections.fits import DistillSection, FinetuneSection, MaeSection


class NetworkSection(Section):
    """One network of the table, by its timm name."""

    model: str
    patch_size: Count | None = None  # px, of a ViT without weights; null: the model's own
    weights: str | None = None  # ImageNet weights, a timm checkpoint (.safetensors) of `model`; null: random ones
    mae_weights: str | None = None  # of a ViT: a checkpoint (.safetensors) that MAE goes on from; null: random ones


class DermaeSection(Section):
    """Three networks on real and on real + synthetic images, from given weights and from MAE, taught and not.

    Of the three fits below, model, image and patch size, teacher, weights, seed and rows are the table's to set. The
    defaults are stand-ins that a laptop fits; `jobs/recipes/dermae.yaml` has the paper's networks.
    """

    large: NetworkSection = NetworkSection(model="vit_tiny_patch16_224", patch_size=8)  # ViT-H, the teacher
    base: NetworkSection = NetworkSection(model="test_vit", patch_size=8)  # ViT-B
    small: NetworkSection = NetworkSection(model="mobilenetv3_small_050")  # EfficientNet-B0
    image_size: Annotated[int, Field(ge=32)] = 64
    seeds: Count = 5
    pretrain_on: Literal["arm", "synthetic"] = "arm"  # synthetic: the arm with both pre-trains on samples alone
    pretrain_each_seed: bool = True  # false: once, with pretrain's seed; intervals then leave its spread out
    tflops: Positive | None = None  # 10^12 operations a second of one GPU or core as fits reach them, for the estimate
    pretrain: MaeSection = MaeSection()
    finetune: FinetuneSection = FinetuneSection()  # of the large network
    student: DistillSection = DistillSection()  # of the others; alpha is 0 where they are not taught

    @model_validator(mode="after")
    def _weights_are_a_networks_own(self) -> DermaeSection:
        if self.pretrain.weights is not None:
            refuse(["pretrain.weights must be null, for two ViTs are pre-trained: give large.mae_weights and base's"])
        return self
