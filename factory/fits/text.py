"""The starter's text encoder, fitted before its U-Net: what a prompt says becomes readable from every state after it.

A small text encoder that learns from the denoising loss alone hears the words that change an image's mean (a skin
tone) and nothing else: shape and colours move that loss by less than its noise. So it first learns to say what it
read, from prompts of the grammar alone, and no image: each fact of a prompt by a linear readout from the states at its
end and in the padding after it. Those are the states that a cross-attention which has learnt nothing yet averages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from factory import phantom, taxonomy
from factory.fits.joint import tokens_of
from factory.fits.objective import RowNoise
from factory.models.joint import JointDenoiser
from factory.prompts import prompt_for

SAID = 0.8  # how often a prompt says each of what it may say
FACTS: tuple[str, ...] = (
    "label",
    *(f"diagnosis {name}" for name in phantom.DIAGNOSES),
    *(f"skin {name}" for name in taxonomy.SKIN_TYPES),
    *(f"asymmetry {name}" for name in taxonomy.LEVELS),
    *(f"border {name}" for name in taxonomy.LEVELS),
    *(f"color {name}" for name in taxonomy.COLORS),
)


def draw_prompt(rng: np.random.Generator) -> tuple[str, set[str]]:
    """A prompt of the grammar with something left unsaid, and those of FACTS that it states."""
    diagnosis = str(rng.choice(phantom.DIAGNOSES))
    skin, asymmetry, border = (
        str(rng.choice(words)) if rng.random() < SAID else None
        for words in (taxonomy.SKIN_TYPES, taxonomy.LEVELS, taxonomy.LEVELS)
    )
    number = int(rng.integers(1, 5)) if rng.random() < SAID else 0
    colors = [str(name) for name in rng.choice(taxonomy.COLORS, number, replace=False)]
    labelled = bool(rng.random() < SAID)
    prompt = prompt_for(diagnosis, skin, asymmetry, border, colors or None, label_in_prompt=labelled)
    said = {f"color {name}" for name in colors}
    said |= {f"{word} {value}" for word, value in (("skin", skin), ("asymmetry", asymmetry), ("border", border)) if value}
    return prompt, said | ({"label", f"diagnosis {diagnosis}"} if labelled else set())


class PromptExamples:
    """`count` prompts as tokens (N, L) and what each says, (N, len(FACTS)) in {0, 1}."""

    def __init__(self, denoiser: JointDenoiser, count: int, seed: int) -> None:
        rng = np.random.default_rng([seed, 6])
        drawn = [draw_prompt(rng) for _ in range(count)]
        self.tokens = tokens_of(denoiser, [prompt for prompt, _ in drawn])
        self.facts = np.array([[fact in said for fact in FACTS] for _, said in drawn], np.float32)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.tokens[indices].astype(np.int64))
        return {"tokens": tokens, "facts": torch.from_numpy(self.facts[indices])}


class FitText:
    """Objective: a fresh joint denoiser's text encoder, by the cross-entropy of a linear readout of FACTS."""

    def __init__(self, base: Callable[[], JointDenoiser], count: int, seed: int) -> None:
        self.base = base
        self.examples = PromptExamples(base(), count, seed)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        denoiser = self.base()
        self._end = int(denoiser.tokenizer.eos_token_id)
        encoder = denoiser.text_encoder
        readout = nn.Linear(encoder.config.hidden_size, len(FACTS))
        return nn.ModuleDict({"encoder": encoder, "readout": readout}).requires_grad_(True).train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        after = (batch["tokens"] == self._end).cumsum(1) > 0  # (B, L): the end and the padding
        logits = model["readout"](model["encoder"](batch["tokens"])[0])  # type: ignore[index]  # (B, L, facts)
        wanted = batch["facts"][:, None].expand_as(logits)
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(2)  # (B, L)
        wrong = ((logits > 0) != (wanted > 0.5)).any(2).float()
        share = after / after.sum(1, keepdim=True)
        return {"loss": (each * share).sum(1).mean(), "misread": (wrong * share).sum(1).mean()}

    def save(self, model: nn.Module, directory: Path) -> None:
        model["encoder"].eval().save_pretrained(directory)  # type: ignore[index,operator]

    def load(self, directory: Path) -> nn.Module:
        return CLIPTextModel.from_pretrained(directory, local_files_only=True)
