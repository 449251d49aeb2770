"""Text embeddings are computed once per caption and encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factory.models.joint import JointDenoiser
from factory.models.text_cache import TextEmbeddings
from factory.models.weights import STARTER, text_encoder_digest
from factory.storage import open_store

PROMPTS = ["a melanoma", "a nevus", "a melanoma", ""]


@pytest.fixture(scope="module")
def denoiser() -> JointDenoiser:
    return JointDenoiser.load(STARTER)


def cache(denoiser: JointDenoiser, folder: Path, digest: str = "") -> TextEmbeddings:
    return TextEmbeddings(open_store(folder), "cache/text", denoiser.condition, digest or text_encoder_digest(STARTER))


def test_what_is_read_is_bit_by_bit_what_would_be_computed(denoiser: JointDenoiser, tmp_path: Path) -> None:
    first, again = cache(denoiser, tmp_path), cache(denoiser, tmp_path)
    for texts, computed in ((first, 3), (again, 0)):
        conditions, index = texts.of(PROMPTS)
        assert texts.computed == computed and len(conditions) == 3 and index.tolist() == [1, 2, 1, 0]
        assert torch.equal(conditions[index], denoiser.condition(PROMPTS))


def test_only_new_captions_are_embedded_and_another_encoder_meets_none_of_them(
    denoiser: JointDenoiser, tmp_path: Path
) -> None:
    cache(denoiser, tmp_path).of(PROMPTS)
    more = cache(denoiser, tmp_path)
    more.of([*PROMPTS, "a keratosis"])
    assert more.computed == 1
    other = cache(denoiser, tmp_path, digest="0" * 64)
    other.of(PROMPTS)
    assert other.computed == 3


def test_two_that_embed_the_same_write_one_file(denoiser: JointDenoiser, tmp_path: Path) -> None:
    one, two = cache(denoiser, tmp_path), cache(denoiser, tmp_path)
    two._stored = lambda wanted: {}  # type: ignore[method-assign]  # began before the other had written
    one.of(PROMPTS)
    two.of(PROMPTS)
    assert two.computed == 3 and len(list(tmp_path.rglob("*.parquet"))) == 1


def test_the_digest_is_of_the_text_encoder_and_its_tokenizer(tiny_weights: object) -> None:
    tiny = text_encoder_digest(tiny_weights.generator)  # type: ignore[attr-defined]
    assert tiny != text_encoder_digest(STARTER) == text_encoder_digest(STARTER)
