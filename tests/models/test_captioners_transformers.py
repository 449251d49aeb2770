"""Tiny Mllama and Qwen2-VL models through the same code as the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_vlm import save_mllama, save_qwen

from factory.models.captioners.protocol import Request
from factory.models.captioners.transformers_vlm import TransformersCaptioner
from factory.models.weights import tree_digest
from factory.progress import Stopped


@pytest.fixture(scope="module", params=[save_mllama, save_qwen], ids=["mllama", "qwen2_vl"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    made: Callable[[Path], Path] = request.param
    return made(tmp_path_factory.mktemp("vlm") / "model")


def requests(count: int = 5) -> list[Request]:
    """Images of two sizes and prompts of three lengths."""
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 255, (56, 56 + 28 * (k % 2), 3), dtype=np.uint8) for k in range(count)]
    return [Request(image, "describe the mole " * (1 + k % 3)) for k, image in enumerate(images)]


def test_answers_come_in_order_whatever_the_batch(weights: Path) -> None:
    one = TransformersCaptioner(weights, max_new_tokens=6, batch_size=1).ask(requests())
    three = TransformersCaptioner(weights, max_new_tokens=6, batch_size=3).ask(requests())
    assert [answer.text for answer in one] == [answer.text for answer in three]
    assert all(answer.problem is None and 0 < answer.tokens_out <= 6 and answer.tokens_in > 3 for answer in three)


def test_it_says_what_generate_says(weights: Path) -> None:
    captioner = TransformersCaptioner(weights, max_new_tokens=6, batch_size=2)
    inputs = captioner.inputs(requests(2))
    made = captioner.model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    wanted = captioner.processor.tokenizer.batch_decode(made, skip_special_tokens=True)
    assert sorted(answer.text or "" for answer in captioner.ask(requests(2))) == sorted(wanted)
    assert captioner.digest == tree_digest(weights) and captioner.model.dtype == torch.float32


def test_a_batch_that_runs_out_of_memory_is_halved(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = TransformersCaptioner(weights, max_new_tokens=4, batch_size=4)
    wanted = [answer.text for answer in captioner.ask(requests())]
    real, sizes = captioner._generated, []

    def short_of_memory(batch: list[Request]) -> object:
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(batch)

    monkeypatch.setattr(captioner, "_generated", short_of_memory)
    assert [answer.text for answer in captioner.ask(requests())] == wanted
    assert sizes == [4, 2, 1, 1, 2, 1, 1, 1]


def test_one_bad_image_fails_by_itself(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = TransformersCaptioner(weights, max_new_tokens=4, batch_size=4)
    real, shown = captioner._generated, requests()

    def choosy(batch: list[Request]) -> object:
        if any(one is shown[2] for one in batch):
            raise RuntimeError("a shape that the model does not like")
        return real(batch)

    monkeypatch.setattr(captioner, "_generated", choosy)
    found = captioner.ask(shown)
    assert [answer.problem for answer in found] == [None, None, "generation_failed", None, None]


def test_a_model_that_fails_on_everything_stops_the_run(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = TransformersCaptioner(weights, max_new_tokens=4, batch_size=4)
    monkeypatch.setattr(captioner, "_generated", lambda batch: 1 / 0)
    with pytest.raises(Stopped, match=r"failed on all of 5 images \(ZeroDivisionError: division by zero\); try it"):
        captioner.ask(requests())
    with pytest.raises(Stopped):  # and is not tried on the units after this one
        captioner.ask(requests(1))


def test_what_is_no_vision_language_model_is_refused(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(ValueError, match=r"caption\.model must be a directory with safetensors"):
        TransformersCaptioner(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    with pytest.raises(ValueError, match=r"caption\.model must be an image-text-to-text model with its processor"):
        TransformersCaptioner(tmp_path)
