"""What people really hand to a fit: each mistake is one sentence that says the remedy, and nothing is overwritten.

Lost rows and small corpora are in `test_joint_fit.py` and `test_flux_fit.py`, wrong recipes in `ground/test_recipe.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_flux
import tiny_sd
import torch
from diffusers import UNet2DConditionModel

from factory import phantom
from factory.fits.flux import FitFluxLora
from factory.fits.joint import FitLora
from factory.fits.loop import train
from factory.images import encode_mask, encode_png
from factory.models.families import check_base
from factory.models.flux import FluxDenoiser
from factory.models.joint import JointDenoiser, widen
from factory.models.lora import add_lora, load_adapter, save_lora
from factory.models.weights import tree_digest
from factory.recipe import FluxSection, LoraSection

SECTION = LoraSection(steps=1, batch_size=2, rank=2, warmup_steps=0)
PAIRS = [phantom.draw(3, number, 32) for number in range(2)]
IMAGES, MASKS = [encode_png(pair.image) for pair in PAIRS], [encode_mask(pair.mask) for pair in PAIRS]


def joint_fit(base: Path) -> FitLora:
    return FitLora(base, IMAGES, MASKS, ["a", "b"], SECTION, 16)


def flux_fit(base: Path, **change: Any) -> FitFluxLora:
    own = FluxSection(preset=None, max_sequence_length=tiny_flux.LENGTH, base_dtype="float32", **change)
    section = SECTION.model_copy(update={"family": "flux", "flux": own})
    return FitFluxLora(base, IMAGES, ["a", "b"], section, 16)


FITS: dict[str, Callable[[Path], Any]] = {"joint": joint_fit, "flux": flux_fit}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"joint": tiny_sd.save_pipeline(folder / "sd"), "flux": tiny_flux.save_pipeline(folder / "flux")}


def refusal(call: Callable[[], Any]) -> str:
    """The sentence of a refusal: one line, with what was got and a remedy."""
    with pytest.raises(ValueError, match=", got ") as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and ";" in sentence.split(", got ", 1)[1], sentence
    return sentence


def changed(base: Path, folder: Path, part: str, **fields: Any) -> Path:
    """A copy of a base with some fields of a part's config changed."""
    shutil.copytree(base, folder)
    path = next((folder / part).glob("*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(("family", "other"), [("joint", "flux"), ("flux", "joint")])
def test_weights_of_another_family(bases: dict[str, Path], family: str, other: str) -> None:
    said = refusal(lambda: check_base(bases[other], family))
    assert f"must hold a base of {family} for the family {family}, got one of {other} in" in said
    assert " directory with " in refusal(lambda: FITS[family](bases[other]))  # and without the check too


def test_weights_of_no_known_family_and_none_at_all(bases: dict[str, Path], tmp_path: Path) -> None:
    odd = changed(bases["joint"], tmp_path / "odd", "unet", in_channels=5)
    assert "got UNet2DConditionModel with 5 in" in refusal(lambda: check_base(odd, "joint"))
    assert "weights must be a diffusers directory with unet/config.json" in refusal(
        lambda: check_base(tmp_path, "joint")
    )


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("joint", "vae"),
        ("joint", "text_encoder"),
        ("joint", "tokenizer"),
        ("joint", "scheduler"),
        ("flux", "vae"),
        ("flux", "text_encoder_2"),
        ("flux", "tokenizer_2"),
    ],
)
def test_a_missing_subfolder_before_and_after_a_cluster_is_started(
    bases: dict[str, Path], tmp_path: Path, family: str, part: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases[family], base)
    shutil.rmtree(base / part)
    for call in (lambda: check_base(base, family), lambda: FITS[family](base)):
        assert f"without {part}; save the pipeline there with save_pretrained." in refusal(call)


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("joint", {"prediction_type": "sample"}, "prediction_type must be epsilon or v_prediction for a U-Net"),
        ("joint", {"prediction_type": "epsilon"}, "rescale_betas_zero_snr must be False when prediction_type is epsi"),
        (
            "joint", {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "scheduler must be one of noise levels (DDIMScheduler) for a network of the family joint, got FlowMatch",
        ),
        (
            "flux", {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
            "scheduler must be a flow's (FlowMatchEulerDiscreteScheduler) for a network of the family flux, got DDIM",
        ),
    ],
)  # fmt: skip
def test_a_scheduler_that_contradicts_the_model(
    bases: dict[str, Path], tmp_path: Path, family: str, fields: dict[str, Any], sentence: str
) -> None:
    base = changed(bases[family], tmp_path / "base", "scheduler", **fields)
    for call in (lambda: check_base(base, family), lambda: FITS[family](base)):
        assert sentence in refusal(call)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"cross_attention_dim": 48},
            r"attn2.to_k.lora_A.weight in .* must be of shape \(rank, 48\), got \(2, 32\); use",
        ),
        (
            {"block_out_channels": (16, 48)},
            r"proj_in.lora_A.weight in .* must be of shape \(rank, 48\), got \(2, 32\); ",
        ),
        (
            {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
            r"must be a layer of this base, got a layer that it does not have; use the base that the LoRA was",
        ),
    ],
)
def test_a_lora_of_another_base(bases: dict[str, Path], tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    import re

    save_lora(tmp_path, add_lora(JointDenoiser.load(bases["joint"]).unet, 2))
    other = widen(
        UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(bases["joint"] / "unet"), **config})
    )
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert re.search(sentence, refusal(lambda: load_adapter(other, tmp_path)))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_an_adapter_of_a_base_of_the_same_shape_that_predicts_something_else(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    objective = joint_fit(bases["joint"])
    (tmp_path / "lora").mkdir()
    objective.save(train(objective, SECTION, tmp_path / "fit"), tmp_path / "lora")
    noise = tiny_sd.save_pipeline(tmp_path / "noise", prediction_type="epsilon")
    said = refusal(lambda: JointDenoiser.load(noise, tmp_path / "lora"))
    assert "fitted on a base that predicts epsilon, got one of v_prediction in" in said
    JointDenoiser.load(bases["joint"], tmp_path / "lora")


def test_an_adapter_that_is_not_there(bases: dict[str, Path], tmp_path: Path) -> None:
    assert "adapter must be a directory with" in refusal(lambda: JointDenoiser.load(bases["joint"], tmp_path))
    assert "adapter must be a directory with" in refusal(lambda: FluxDenoiser.load(bases["flux"], tmp_path))


def test_an_empty_bucket_is_left_out_and_no_bucket_at_all_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    objective = flux_fit(bases["flux"], scales=[16, 64])  # no image fills the second
    assert [len(bucket) for bucket in objective.examples.buckets] == [2] and not objective.dropped
    train(objective, objective.section, tmp_path / "one")
    empty = flux_fit(bases["flux"], scales=[64])
    assert empty.dropped == {"too_small": 2} and len(empty.examples) == 0
    assert "a fit needs at least one example, got none" in refusal(
        lambda: train(empty, empty.section, tmp_path / "none")
    )
    assert not (tmp_path / "none").exists()


def test_a_refused_fit_leaves_the_base_and_earlier_weights_as_they_were(bases: dict[str, Path], tmp_path: Path) -> None:
    objective = joint_fit(bases["joint"])
    (tmp_path / "lora").mkdir()
    objective.save(train(objective, SECTION, tmp_path / "fit"), tmp_path / "lora")
    kept = [tree_digest(folder) for folder in (bases["joint"], tmp_path / "lora")]
    other = changed(bases["joint"], tmp_path / "base", "scheduler", prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type must be"):
        joint_fit(other)
    with pytest.raises(ValueError, match="prediction_type must be"):
        JointDenoiser.load(other, tmp_path / "lora")
    assert [tree_digest(folder) for folder in (bases["joint"], tmp_path / "lora")] == kept


def test_half_a_checkpoint_is_told_in_one_sentence(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from factory.fits.card import checkpoint_at

    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.zeros(100)}, whole)
    assert checkpoint_at(str(whole), "fit.mae.weights") == whole
    half = tmp_path / "half.safetensors"
    half.write_bytes(whole.read_bytes()[:120])
    with pytest.raises(ValueError, match=r"fit\.mae\.weights must be a whole .* of 120 bytes \(.*\); copy it again"):
        checkpoint_at(str(half), "fit.mae.weights")
