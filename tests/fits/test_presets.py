"""The presets: what each trains, counted at FLUX.1-dev's real size, and how a wrong name is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_flux import transformer

from factory.fits.presets import FAMILIES, PRESETS, describe, preset_of
from factory.models.families import load_denoiser
from factory.models.weights import STARTER


@pytest.mark.parametrize(
    ("preset", "parameters", "modules"),
    [
        ("dermaflux_released", 343_670_784, 494),
        ("dermaflux_612m_peft", 612_163_584, 494),
        ("dermaflux_text_literal", 612_864_000, 266),
        ("budget", 104_595_456, 266),
    ],
)
def test_a_preset_trains_as_many_parameters_as_the_page_of_papers_says(
    preset: str, parameters: int, modules: int
) -> None:
    found = describe("flux", preset)
    assert found["trainable_parameters"] == parameters
    assert found["bytes"] == {"bfloat16": 2 * parameters, "float32": 4 * parameters}
    assert found["modules"] == modules and found["rank"] == PRESETS["flux"][preset].rank
    assert json.loads(json.dumps(found)) == found
    assert not [target for target in found["targets"] if target == "proj_out"]  # the model's own last layer


def test_the_default_is_the_budget() -> None:
    assert preset_of("flux") == PRESETS["flux"]["budget"]
    assert all("budget" in presets for presets in PRESETS.values())
    assert set(FAMILIES) == {"flux", "inpaint", "joint", "class_conditional"}


def test_another_base_is_counted_by_its_config(tmp_path: Path) -> None:
    transformer(num_layers=1, num_single_layers=1).save_pretrained(tmp_path / "transformer")
    found = describe("flux", "budget", tmp_path)
    assert found["modules"] == 11
    assert found["trainable_parameters"] == 64 * 11 * (32 + 32)


def test_the_joint_family_counts_its_lora_and_the_convolutions_it_trains_whole(tmp_path: Path) -> None:
    from factory.models.starter import build_unet

    unet = build_unet(
        block_out_channels=(16, 16),
        num_plain_blocks=1,
        num_heads=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        channels=4,
    )
    unet.save_pretrained(tmp_path / "unet")
    found = describe("joint", "budget", tmp_path)
    assert found["targets"][-2:] == ["conv_in (whole)", "conv_out (whole)"]
    whole = 2 * (8 * 16 * 9) + 16 + 8  # widened to eight channels in and out, and their biases
    sides = [
        sum(module.weight.shape)
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"))
    ]
    assert found["modules"] == len(sides) and found["trainable_parameters"] == 16 * sum(sides) + whole
    assert describe("joint")["trainable_parameters"] > 0  # of the shipped starter


# DiT-B/2 by hand, as diffusers has it: 12 blocks of width 768, each with attention, an MLP of four times the width, its
# six modulations, and a time embedder and a class table (seven and the null class) of its own.
_BLOCK = (
    4 * (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 6 * (768 * 768 + 768)
    + (256 * 768 + 768) + (768 * 768 + 768) + 8 * 768
)  # fmt: skip
DIT_B = 12 * _BLOCK + (2 * 2 * 4 * 768 + 768) + (768 * 2 * 768 + 2 * 768) + (768 * 16 + 16)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("dermae_dit_b", DIT_B), ("dermae_unet", 263_146_180), ("budget", 5_222_468)]
)
def test_a_network_of_classes_is_counted_whole(preset: str, parameters: int) -> None:
    found = describe("class_conditional", preset)
    assert (found["trainable_parameters"], found["rank"], found["modules"]) == (parameters, 0, 0)
    assert found["targets"] == ["every weight"] and json.loads(json.dumps(found)) == found


def test_a_lora_on_a_network_of_classes_is_counted_by_its_base(tmp_path: Path) -> None:
    from tiny_classes import build_classes

    for kind in ("unet", "dit"):
        denoiser = build_classes(kind)
        denoiser.save(tmp_path / kind)
        sides = [
            sum(module.weight.shape)
            for name, module in denoiser.network.named_modules()
            if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
        ]
        found = describe("class_conditional", "lora", tmp_path / kind)
        assert sides and found["modules"] == len(sides) and found["trainable_parameters"] == 16 * sum(sides)
        stored = sum(value.numel() for value in load_denoiser(tmp_path / kind).network.parameters())
        assert describe("class_conditional", base=tmp_path / kind)["trainable_parameters"] == stored
    assert describe("class_conditional", base=STARTER) == describe("class_conditional")  # four channels, too
    with pytest.raises(ValueError, match="--base must hold a network of classes for a LoRA, got .*; name one or leave"):
        describe("class_conditional", "lora", STARTER)


def test_wrong_names_and_bases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family must be a known word, got 'fluks'; did you mean 'flux'"):
        describe("fluks")
    with pytest.raises(ValueError, match="preset of flux must be a known word, got 'dermaflux_release'; did you mean"):
        describe("flux", "dermaflux_release")
    with pytest.raises(ValueError, match="--base must be a diffusers directory with transformer/config.json, got"):
        describe("flux", base=tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(ValueError, match="--base must hold a FluxTransformer2DModel, got SD3Transformer2DModel in"):
        describe("flux", base=tmp_path)


def test_naming_a_preset_loads_no_torch() -> None:
    script = "import sys, factory.fits.presets as p; p.preset_of('flux'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_command_describes_a_lora_without_a_run(factory_command: Callable[..., Any], tmp_path: Path) -> None:
    transformer(num_layers=1, num_single_layers=1).save_pretrained(tmp_path / "transformer")
    said = factory_command("fit", "lora", "--describe", "--family", "flux", "--preset", "budget", "--base", tmp_path)
    assert said.status == 0, said.err
    assert json.loads(said.out)["trainable_parameters"] == 64 * 11 * 64


def test_the_command_lists_every_fit_and_preset(factory_command: Callable[..., Any]) -> None:
    said = factory_command("fit", "list")
    assert said.status == 0, said.err
    lines = said.out.splitlines()
    for name, count in {"dermaflux_released": "343,670,784", "budget": "104,595,456"}.items():
        assert any(name in line and count in line and "lora" in line for line in lines), said.out
    for fit in ("gate", "mae", "distill"):
        assert any(line.startswith(fit) for line in lines), said.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lora"], "--run must name the run to fit in, got nothing; give --run, or --describe to count parameters"),
        (["gate", "--describe"], "--describe must go with `fit lora`, got gate; leave it out."),
        (["lora", "--describe"], "--family must be given with --describe, got nothing; choose one of flux, "),
        (
            ["lora", "--run", "runs/x", "--preset", "budget"],
            "--preset must come with --family, got it alone; say whose",
        ),
        (
            ["gate", "--run", "runs/x", "--family", "flux"],
            "--family, --preset and --base must go with `fit lora`, got gate",
        ),
        (
            ["lora", "--run", "runs/x", "--family", "fluks"],
            "family must be a known word, got 'fluks'; did you mean 'flux'?",
        ),
        (["lora", "--describe", "--family", "flux", "--preset", "bugdet"], "got 'bugdet'; did you mean 'budget'?"),
    ],
)
def test_wrong_requests_of_the_command_are_refused(
    factory_command: Callable[..., Any], arguments: list[str], sentence: str
) -> None:
    said = factory_command("fit", *arguments)
    assert said.status == 2 and sentence in said.err, said.err
