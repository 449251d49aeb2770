"""Text embeddings are computed once per caption and encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from factory.models import text_cache
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


def small(monkeypatch: pytest.MonkeyPatch, rows: int = 2) -> None:
    """Parts of two prompts, read one at a time, and no more held in memory than so many embeddings of 3 x 5."""
    for name, value in {"MAX_BYTES": rows * 3 * 5 * 4, "PART_PROMPTS": 2, "READ_ROWS": 1}.items():
        monkeypatch.setattr(text_cache, name, value)


def embed(prompts: list[str]) -> torch.Tensor:
    """(N, 3, 5), of bfloat16's values."""
    seeds = [torch.Generator().manual_seed(sum(prompt.encode())) for prompt in prompts]
    return torch.stack([torch.randn(3, 5, generator=seed).bfloat16().float() for seed in seeds])


MANY = ["e", "b", "d", "a", "c", "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [True, False])
def test_what_is_too_large_for_memory_is_a_file_of_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stored: bool
) -> None:
    store = open_store(tmp_path / "store") if stored else None
    inside, index = TextEmbeddings(store, "text", embed, "f" * 64, dtype, tmp_path / "in").of(MANY)
    assert inside.dtype == torch.float32 and not (tmp_path / "in").exists()
    small(monkeypatch)
    first, second, elsewhere = (
        TextEmbeddings(store, "text", embed, "f" * 64, dtype, tmp_path / name) for name in ("one", "one", "other")
    )
    for cache, computed in ((first, 5), (second, 0), (elsewhere, 5)):
        mapped, places = cache.of(MANY)
        assert cache.computed == (0 if stored else computed)
        assert mapped.dtype == dtype and torch.equal(mapped.float(), inside) and np.array_equal(places, index)
        assert torch.equal(mapped[places].float(), embed(MANY))
    (file,) = (tmp_path / "one").rglob("rows.bin")
    assert file.stat().st_size == 5 * 3 * 5 * dtype.itemsize
    assert {path.name for path in file.parent.iterdir()} == {"rows.bin", "layout.json"}  # nothing half made beside it
    assert len(list((tmp_path / "one").iterdir())) == 2  # the file's folder and its lock


def test_a_part_that_is_stored_and_one_that_is_not_meet_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    store = open_store(tmp_path / "store")
    TextEmbeddings(store, "text", embed, "f" * 64).of(["b", "d"])
    more = TextEmbeddings(store, "text", embed, "f" * 64, scratch=tmp_path / "one")
    mapped, index = more.of(MANY)
    assert more.computed == 3 and torch.equal(mapped[index], embed(MANY))
    assert len(list((tmp_path / "one").rglob("rows.bin"))) == 1


def test_a_file_that_was_left_half_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)

    def broken(prompts: list[str]) -> torch.Tensor:
        if "e" in prompts:
            raise OSError("no more")
        return embed(prompts)

    with pytest.raises(OSError, match="no more"):
        TextEmbeddings(None, "text", broken, "f" * 64, scratch=tmp_path).of(MANY)
    assert not list(tmp_path.rglob("rows.bin"))
    mapped, index = TextEmbeddings(None, "text", embed, "f" * 64, scratch=tmp_path).of(MANY)
    assert torch.equal(mapped[index], embed(MANY))


def test_an_encoder_that_says_less_than_it_returns_loses_nothing_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    cache = TextEmbeddings(None, "text", lambda prompts: embed(prompts) / 3, "f" * 64, torch.bfloat16, tmp_path)
    with pytest.raises(AssertionError, match="narrower than its encoder"):
        cache.of(MANY)
