"""Where images come from, and how they are read and split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from factory.sections.base import Count, Natural, Section, Share, refuse


class PhantomSection(Section):
    """The phantom corpus, used when no other source is named."""

    count: Natural = 512
    size: Annotated[int, Field(ge=32, le=512)] = 128
    seed: Natural = 2017


class CorpusSection(Section):
    """Where images come from and how they are split."""

    sources: dict[str, str] = {}  # reader name -> path; empty means phantoms
    phantoms: PhantomSection = PhantomSection()
    labels: str | None = None  # a YAML file laid over the label policy, factory/labels.yaml
    allow_missing_images: bool = False  # a published table may be read without its images
    min_side: Annotated[int, Field(ge=16)] = 128  # DermaFlux drops images whose shorter side is below this
    scales: list[Annotated[int, Field(ge=16, le=2048)]] = [128, 256, 512]  # rungs; an image is stored at one
    frame: Literal["keep", "crop", "pad"] = "keep"  # the picture as it is, its central square, or padded to a square
    near_duplicates: Literal["reject", "group"] = "reject"  # of copies one stays, or all do in one group and split
    min_likeness: Share = 0.75  # from which on two images are one photograph
    embedding: str | None = None  # a transformers image model; images that it cannot tell apart share a group
    min_cosine: Share = 0.95  # of two embeddings, from which on it cannot
    max_pixels: Count = 64_000_000  # a larger declared size is refused before it is decoded
    max_bytes: Count = 67_108_864
    unit_rows: Count = 256
    val_share: Share = 0.1
    test_share: Share = 0.1

    @model_validator(mode="after")
    def _scales_reach_min_side(self) -> CorpusSection:
        problems = []
        if not self.scales or min(self.scales) > self.min_side:
            problems.append(f"scales must hold a rung not above min_side ({self.min_side}), got {self.scales}")
        if self.val_share + self.test_share >= 1.0:
            problems.append("val_share + test_share must leave a training split, so be below 1")
        refuse(problems)
        return self
