"""FLUX.1 in four or eight bits: refused where it cannot be, and a LoRA learns beside such weights where it can."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_flux import LENGTH, moved, save_pipeline

from factory import recipe
from factory.fits.flux import FitFluxLora
from factory.fits.loop import train
from factory.images import encode_png
from factory.models.families import load_denoiser
from factory.models.flux import FluxDenoiser, velocity
from factory.models.flux_lora import TARGETS, adapter_state, add_lora, save_adapter
from factory.models.quantise import check_quantised, compute_dtype, is_quantised, load_base
from factory.recipe import FluxSection, LoraSection


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("flux"))


def objective(base: Path, dtype: str = "bfloat16") -> FitFluxLora:
    own = FluxSection(preset=None, scales=[32], max_sequence_length=LENGTH, base_dtype=dtype)  # type: ignore[arg-type]
    section = LoraSection(
        family="flux", flux=own, steps=3, batch_size=2, rank=2, warmup_steps=1, learning_rate=1e-2, checkpoint_every=3
    )
    pixels = torch.randint(0, 255, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return FitFluxLora(base, [encode_png(row.numpy()) for row in pixels], ["a", "b", "c"], section, 32)


def test_what_cannot_be_is_refused_in_one_sentence(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantised(None, "joint", "x")
    check_quantised("bfloat16", "joint", "x")
    with pytest.raises(ValueError, match="x must be null for the family joint, got fp8; leave it out, only FLUX.1 is"):
        check_quantised("fp8", "joint", "x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="x fp8 must have torchao, got none installed; install dermafactory.small-card"
    ):
        check_quantised("fp8", "flux", "x")
    with pytest.raises(ValueError, match="fit.lora.flux.base_dtype nf4 must have bitsandbytes, got none installed"):
        objective(base, "nf4")
    with pytest.raises(ValueError, match="synthesize.base_dtype fp8 must have torchao, got none"):
        load_denoiser(base, base_dtype="fp8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="base_dtype nf4 must have a GPU, got none; run on a machine with one, or use fp8."
    ):
        load_base(base / "transformer", "nf4")
    with pytest.raises(ValueError, match="sharding: must be replicated for flux.base_dtype nf4, got sharded"):
        recipe.load(None, ["fit.lora.family=flux", "fit.lora.flux.base_dtype=nf4", "fit.lora.sharding=sharded"])


def test_encoders_and_vae_are_let_go_before_the_transformer_is_read(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    real = FluxDenoiser.load.__func__  # type: ignore[attr-defined]

    def load(cls: Any, *args: Any, **options: Any) -> FluxDenoiser:
        found = real(cls, *args, **options)
        held.extend(weakref.ref(module) for module in found._modules().values())
        assert found.transformer.device.type == "meta" and found.vae.device.type == "cpu"
        return found

    monkeypatch.setattr(FluxDenoiser, "load", classmethod(load))
    fit = objective(base)
    gc.collect()
    assert len(held) == 4 and all(one() is None for one in held)
    assert fit._transformer is None
    model = fit.build()
    assert model is fit._transformer and next(model.parameters()).dtype == compute_dtype("bfloat16")


def test_a_lora_learns_beside_eight_bit_weights(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    fit = objective(base, "fp8")
    fresh = fit.build()
    assert is_quantised(fresh)
    before = {name: value.detach().clone() for name, value in fresh.named_parameters() if value.requires_grad}
    assert before and {value.dtype for value in before.values()} == {torch.float32}
    model = train(fit, fit.section, tmp_path / "fit")
    changed = [
        name for name, value in model.named_parameters() if name in before and not torch.equal(value, before[name])
    ]
    assert {name.split(".lora_")[1] for name in changed} >= {"A.default.weight", "B.default.weight"}
    fit.save(model, tmp_path / "lora")
    again = adapter_state(fit.load(tmp_path / "lora"))
    assert all(torch.equal(value.to(again[name]), again[name]) for name, value in adapter_state(model).items())


def test_eight_bit_weights_draw_nearly_the_same_and_keep_their_adapter_apart(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    whole = load_base(base / "transformer", "bfloat16")
    save_adapter(tmp_path, adapter_state(moved(add_lora(whole, 2, TARGETS["attention"]))))
    (tmp_path / "card.json").write_text('{"max_sequence_length": 16}')
    inputs = (torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), torch.randn(2, 1 + LENGTH, 32), torch.ones(2))
    wide, narrow = (load_denoiser(base, tmp_path, dtype=torch.bfloat16, base_dtype=kind) for kind in (None, "fp8"))
    narrow.to("cpu", torch.bfloat16)
    assert is_quantised(narrow.transformer) and not is_quantised(wide.transformer)  # type: ignore[attr-defined]
    assert narrow.digest == wide.digest
    with torch.no_grad():
        found, wanted = (velocity(one.transformer, *inputs) for one in (narrow, wide))  # type: ignore[attr-defined]
    assert 0 < (found - wanted).abs().max() < 0.25 * wanted.abs().max()
