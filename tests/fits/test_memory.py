"""What a fit needs of a GPU: against hand-computed numbers at FLUX.1-dev's size, and against what autograd saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_sd
import torch
from tiny_flux import transformer
from torch import Tensor, nn

from factory.fits import preflight, presets
from factory.fits.memory import RESERVE, Workload, activations, base_bytes, narrow_base, workload_of
from factory.models.flux import velocity
from factory.models.flux_lora import TARGETS, add_lora
from factory.recipe import FluxSection, LoraSection

BASE = 11_901_408_320  # parameters of FLUX.1-dev's transformer
TRAINED = {
    "budget": 104_595_456, "dermaflux_released": 343_670_784, "dermaflux_612m_peft": 612_163_584,
    "dermaflux_text_literal": 612_864_000,
}  # fmt: skip


def section(preset: str = "budget", dtype: str = "bfloat16", **change: Any) -> LoraSection:
    own = FluxSection(preset=preset, base_dtype=dtype, scales=[512])  # type: ignore[arg-type]
    return LoraSection(family="flux", flux=own, **{"batch_size": 1, **change})


@pytest.mark.parametrize("preset", sorted(TRAINED))
def test_the_parts_of_flux_are_counts_times_bytes(preset: str) -> None:
    found = presets.describe("flux", preset, None, section(preset, ema_decay=0.99, num_workers=1))["memory"]
    trained = TRAINED[preset]
    assert found["base"] == 2 * BASE == 23_802_816_640
    assert (found["adapter"], found["gradients"], found["optimizer"], found["average"]) == (
        4 * trained, 4 * trained, 8 * trained, 4 * trained
    )  # fmt: skip
    saved = found["activations"]
    assert found["total"] == 2 * BASE + 20 * trained + RESERVE + saved["gradient_checkpointing"]
    # 19 blocks of two streams and 38 of one; with T5's 512 tokens an image of 32 x 32 makes 1,536 of 3,072 values.
    inputs = (19 + 38) * 1536 * 3072 * 2
    assert inputs < saved["gradient_checkpointing"] < 2 * inputs < saved["plain"] / 8
    assert json.loads(json.dumps(found)) == found


def test_a_base_of_four_or_eight_bits_is_as_small_as_its_linear_layers_allow() -> None:
    with torch.device("meta"):
        network = presets._flux(presets.preset_of("flux"), None, "budget")[0]
    linear = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad)
    rows = sum(m.out_features for m in network.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad)
    assert base_bytes(network, "float32") == 4 * BASE and base_bytes(network, "bfloat16") == 2 * BASE
    assert base_bytes(network, "fp8") == linear + 4 * rows + 2 * (BASE - linear)
    assert base_bytes(network, "nf4") == pytest.approx(linear * 0.515869 + 2 * (BASE - linear), rel=1e-6)
    assert base_bytes(network, "nf4") / 1e9 == pytest.approx(6.14, abs=0.01)
    assert base_bytes(network, "fp8") / 1e9 == pytest.approx(11.92, abs=0.01)


def tiny(device: str, **config: Any) -> Any:
    with torch.device(device):
        return add_lora(transformer(**config).to(torch.bfloat16), 4, TARGETS["all_linears"])


def forward(network: Any, device: str, rows: int = 2) -> Tensor:
    with torch.device(device):
        levels = torch.ones(rows)
        return velocity(network, torch.ones(rows, 4, 8, 8), levels, torch.ones(rows, 9, 32), levels)


def saved_by_autograd(network: nn.Module) -> int:
    """Bytes of what a forward on the CPU really saves, each storage once."""
    known, alive = {}, []
    own = {value.untyped_storage().data_ptr() for value in network.parameters()}

    def pack(value: Tensor) -> Tensor:
        alive.append(value)
        if value.untyped_storage().data_ptr() not in own:
            known[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        kept = forward(network.train(), "cpu")
    assert kept.requires_grad
    return sum(known.values())


def test_what_is_counted_without_a_weight_is_what_autograd_saves() -> None:
    torch.set_num_threads(1)
    network = tiny("meta")
    counted = activations(network, lambda: forward(network, "meta"))["plain"]
    assert counted == pytest.approx(saved_by_autograd(tiny("cpu")), rel=0.05)


def test_a_further_checkpointed_block_costs_its_inputs_alone() -> None:
    found = []
    for blocks in (2, 3):
        network = tiny("meta", num_single_layers=blocks)
        found.append(activations(network, lambda network=network: forward(network, "meta")))
    (few, more) = found
    # Between blocks go 16 image and 8 text tokens of 32 values in bfloat16, for two rows.
    assert more["gradient_checkpointing"] - few["gradient_checkpointing"] == 2 * (16 + 8) * 32 * 2
    assert more["plain"] - few["plain"] > 10 * 2 * (16 + 8) * 32 * 2


def test_a_workload_is_what_one_worker_holds_at_once() -> None:
    asked = section(batch_size=16, num_workers=2, micro_batch=3, ema_decay=0.9)
    assert workload_of(asked, 128) == Workload(3, 512, 512, "bfloat16", True, True, True)
    assert workload_of(LoraSection(batch_size=5, num_workers=2), 128) == Workload(3, 128, data_parallel=True)


@pytest.mark.parametrize("family", presets.FAMILIES)
def test_every_family_is_counted_and_rows_cost_in_proportion(family: str, tmp_path: Path) -> None:
    base = None
    if family == "flux":
        transformer().save_pretrained(tmp_path / "transformer")
        base = tmp_path
    if family == "inpaint":
        base = tiny_sd.save_pipeline(tmp_path)
    two, four = (
        presets.describe(family, None, base, LoraSection(family=family, batch_size=rows), 128)["memory"]  # type: ignore[arg-type]
        for rows in (2, 4)
    )
    assert two["base"] == four["base"] and two["optimizer"] == four["optimizer"]
    assert 1.8 < four["activations"]["plain"] / two["activations"]["plain"] < 2.01


def test_a_gpu_that_is_too_small_is_refused_with_the_largest_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # whatever is installed here
    (tmp_path / "transformer").mkdir()
    shape = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "num_layers": 1, "num_single_layers": 1}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(shape))
    total = {
        (preset, dtype): preflight.needed(section(preset, dtype), 512, tmp_path)["total"]
        for preset in TRAINED for dtype in ("bfloat16", "nf4")
    }  # fmt: skip
    asked, tight = section("dermaflux_released"), total["dermaflux_released", "bfloat16"] - 1
    preflight.check(asked, 512, tmp_path, None)
    preflight.check(asked, 512, tmp_path, tight + 1)
    words = "must fit in a GPU's .* GB, got one that needs .* GB; the largest that fits is fit.lora.flux.preset=(\\w+) "
    with pytest.raises(ValueError, match=words + "with fit.lora.flux.base_dtype=nf4, set these.") as refused:
        preflight.check(asked, 512, tmp_path, tight)
    found = str(refused.value).split("preset=")[1].split()[0]
    assert total[found, "nf4"] <= tight < total[found, "bfloat16"]
    assert all(total[other, "nf4"] > tight for other in TRAINED if TRAINED[other] > TRAINED[found])
    with pytest.raises(ValueError, match="needs .* GB; lower fit.lora.micro_batch or the size, or fit on a larger GPU"):
        preflight.check(asked, 512, tmp_path, 10**9)
    plain = asked.model_copy(update={"flux": asked.flux.model_copy(update={"gradient_checkpointing": False})})
    with pytest.raises(ValueError, match="base_dtype=bfloat16 and fit.lora.flux.gradient_checkpointing=true, set"):
        preflight.check(plain, 512, tmp_path, total["dermaflux_text_literal", "bfloat16"])


def test_the_command_describes_memory_for_the_recipe_that_is_given(
    factory_command: Callable[..., Any], tmp_path: Path
) -> None:
    transformer(num_layers=1, num_single_layers=1).save_pretrained(tmp_path / "transformer")
    totals = []
    for rows in (1, 4):
        said = factory_command(
            "fit", "lora", "--describe", "--family", "flux", "--base", tmp_path, "--set", f"fit.lora.batch_size={rows}"
        )
        assert said.status == 0, said.err
        memory = json.loads(said.out)["memory"]
        assert memory["rows"] == rows and memory["side"] == 128 and memory["base_dtype"] == "bfloat16"
        totals.append(memory["total"])
    assert totals[0] < totals[1]


def test_frozen_weights_are_counted_in_what_they_are_computed_in() -> None:
    network = tiny("meta")
    for dtype, found in (("float32", torch.bfloat16), ("nf4", torch.bfloat16)):  # float32 leaves them as they were
        narrow_base(network, dtype)
        assert {value.dtype for value in network.parameters() if not value.requires_grad} == {found}
    assert {value.dtype for value in network.parameters() if value.requires_grad} == {torch.float32}
