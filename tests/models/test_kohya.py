"""kohya's FLUX LoRAs and ours: the same change of every weight, whichever format it went through."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_flux import LENGTH, build_pipeline, save_pipeline, transformer
from torch import Tensor

from factory.models import kohya
from factory.models.flux import FluxDenoiser
from factory.models.flux_lora import ALL_LINEARS, ATTENTION, adapter_state, add_lora, fuse, load_adapter, save_adapter
from factory.models.lora import ADAPTER_FILE


def base(**config: Any) -> Any:
    torch.manual_seed(0)
    return transformer(**config).eval()


def trained(targets: tuple[str, ...] = ALL_LINEARS, rank: int = 3) -> Any:
    """A transformer with an adapter that changes it."""
    found = add_lora(base(), rank, targets)
    rng = torch.Generator().manual_seed(1)
    for name, value in found.named_parameters():
        if ".lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=rng)
    return found


def merged(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in fuse(model).state_dict().items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


def kohya_file(path: Path, rank: int = 4, alpha: float = 1.0, prefix: str = "") -> dict[str, Tensor]:
    """A file as sd-scripts writes it with its default targets: fused layers of both blocks, alpha not the rank."""
    rng = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}
    double = {"attn_qkv": (96, 32), "attn_proj": (32, 32), "mlp_0": (128, 32), "mlp_2": (32, 128), "mod_lin": (192, 32)}
    layers = {
        f"double_blocks_{k}_{s}_{name}": size for k in (0, 1) for s in ("img", "txt") for name, size in double.items()
    }
    single = {"linear1": (224, 32), "linear2": (32, 160), "modulation_lin": (96, 32)}
    layers |= {f"single_blocks_{k}_{name}": size for k in (0, 1) for name, size in single.items()}
    layers |= {"img_in": (32, 16), "final_layer_adaLN_modulation_1": (64, 32), "guidance_in_in_layer": (32, 256)}
    for name, (rows, columns) in layers.items():
        state[f"lora_unet_{prefix}{name}.lora_down.weight"] = torch.randn(rank, columns, generator=rng)
        state[f"lora_unet_{prefix}{name}.lora_up.weight"] = torch.randn(rows, rank, generator=rng)
        state[f"lora_unet_{prefix}{name}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return state


def test_a_kohya_file_changes_the_weights_by_what_its_matrices_say(tmp_path: Path) -> None:
    state = kohya_file(tmp_path / "lora.safetensors")
    before, after = base().state_dict(), merged(load_adapter(base(), tmp_path / "lora.safetensors"))

    def change(name: str) -> Tensor:
        return after[f"{name}.weight"] - before[f"{name}.weight"]

    def theirs(name: str) -> Tensor:
        return 0.25 * state[f"lora_unet_{name}.lora_up.weight"] @ state[f"lora_unet_{name}.lora_down.weight"]

    parts = [
        change(f"single_transformer_blocks.1.{name}") for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    torch.testing.assert_close(torch.cat(parts), theirs("single_blocks_1_linear1"), rtol=0, atol=1e-6)
    parts = [change(f"transformer_blocks.0.attn.{name}") for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
    torch.testing.assert_close(torch.cat(parts), theirs("double_blocks_0_txt_attn_qkv"), rtol=0, atol=1e-6)
    for ours, name in {
        "transformer_blocks.1.ff.net.0.proj": "double_blocks_1_img_mlp_0",
        "transformer_blocks.1.norm1_context.linear": "double_blocks_1_txt_mod_lin",
        "single_transformer_blocks.0.proj_out": "single_blocks_0_linear2",
        "x_embedder": "img_in",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    }.items():
        torch.testing.assert_close(change(ours), theirs(name), rtol=0, atol=1e-6)
    shift, scale = theirs("final_layer_adaLN_modulation_1").chunk(2)  # diffusers has scale first
    torch.testing.assert_close(change("norm_out.linear"), torch.cat([scale, shift]), rtol=0, atol=1e-6)
    untouched = {name for name in before if not torch.equal(before[name], after[name])} ^ {
        name for name in before if name.endswith("weight") and (before[name] - after[name]).abs().max() > 0
    }
    assert not untouched


def test_kohya_to_diffusers_to_kohya_is_the_same_change(tmp_path: Path) -> None:
    kohya_file(tmp_path / "lora.safetensors")
    wanted = merged(load_adapter(base(), tmp_path / "lora.safetensors"))
    converted = kohya.read(tmp_path / "lora.safetensors", base())
    assert {len(value) for key, value in converted.state.items() if ".lora_A." in key} == {4}  # the rank stays
    save_adapter(tmp_path / "diffusers", converted.state)
    assert_equal(merged(load_adapter(base(), tmp_path / "diffusers")), wanted)
    kohya.write(tmp_path / "again.safetensors", converted.state, base())
    assert_equal(merged(load_adapter(base(), tmp_path / "again.safetensors")), wanted)


@pytest.mark.parametrize("targets", [ALL_LINEARS, ATTENTION])
def test_our_adapter_through_kohya_comes_back_as_it_was(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = trained(targets)
    state = adapter_state(model)
    wanted = merged(model)
    kohya.write(tmp_path / "lora.safetensors", state, base())
    stored = load_file(tmp_path / "lora.safetensors")
    assert stored["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (9, 32)
    assert all(
        float(stored[key]) == len(stored[key.replace("alpha", "lora_down.weight")]) for key in stored if "alpha" in key
    )
    back = kohya.read(tmp_path / "lora.safetensors", base())
    assert back.state.keys() == state.keys() and not back.notes
    assert all(torch.equal(back.state[key], value) for key, value in state.items())
    assert_equal(merged(load_adapter(base(), tmp_path / "lora.safetensors")), wanted)


def test_a_layer_with_zeros_in_it_comes_apart_at_the_ranks_it_had(tmp_path: Path) -> None:
    state = adapter_state(trained())
    state["transformer_blocks.0.attn.to_k.lora_B.weight"][:, 1] = 0.0
    kohya.write(tmp_path / "lora.safetensors", state, base())
    back = kohya.read(tmp_path / "lora.safetensors", base()).state
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_the_librarys_own_converter_agrees_at_the_width_it_knows() -> None:
    # diffusers takes single blocks to be 3,072 wide with an MLP of 12,288, as FLUX.1-dev's are.
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    with torch.device("meta"):
        real = transformer(
            num_layers=0, num_single_layers=1, in_channels=64, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=(16, 56, 56),
        )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    state = {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.randn(2, 3072, generator=rng),
        "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.randn(21504, 2, generator=rng),
        "lora_unet_single_blocks_0_linear1.alpha": torch.tensor(1.0),
    }
    ours = kohya.from_kohya(state, real, "a file").state
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(state))
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        key = f"single_transformer_blocks.0.{name}.lora"
        wanted = theirs[f"transformer.{key}_B.weight"] @ theirs[f"transformer.{key}_A.weight"][:, :64]
        torch.testing.assert_close(ours[f"{key}_B.weight"] @ ours[f"{key}_A.weight"][:, :64], wanted)
    assert len(ours) == 8


def test_text_encoder_tensors_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = kohya_file(tmp_path / "lora.safetensors")
    text = {
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{kind}": torch.ones(2, 2)
        for kind in ("lora_down.weight", "lora_up.weight")
    }
    save_file(state | text, tmp_path / "both.safetensors")
    found = kohya.read(tmp_path / "both.safetensors", base())
    assert found.notes == ["2 tensors of text encoders were left out: the factory's LoRA is the transformer's alone."]
    with caplog.at_level(logging.WARNING):
        load_adapter(base(), tmp_path / "both.safetensors")
    assert "2 tensors of text encoders were left out" in caplog.text


def test_a_lora_of_another_base_is_refused_by_its_first_tensor(tmp_path: Path) -> None:
    kohya_file(tmp_path / "lora.safetensors")
    with pytest.raises(
        ValueError,
        match=r"^lora_unet_double_blocks_0_img_attn_proj.lora_down.weight in .* must be of shape \(rank, 16\), "
        r"got \(4, 32\); use the base that the LoRA was fitted on\.$",
    ):
        load_adapter(base(num_attention_heads=1), tmp_path / "lora.safetensors")
    with pytest.raises(
        ValueError, match=r"^lora_unet_double_blocks_1_img_attn_proj.alpha in .* got a layer that it does"
    ):
        load_adapter(base(num_layers=1), tmp_path / "lora.safetensors")
    kohya_file(tmp_path / "sdxl.safetensors", prefix="down_blocks_")
    with pytest.raises(
        ValueError, match=r"^lora_unet_down_blocks_double_blocks_0_.* must be a layer of this base, got a"
    ):
        load_adapter(base(), tmp_path / "sdxl.safetensors")
    save_adapter(tmp_path / "diffusers", adapter_state(trained()))
    with pytest.raises(
        ValueError,
        match=r"^single_transformer_blocks.0.attn.to_k.lora_A.weight in .*lora_weights.safetensors must be of shape "
        r"\(rank, 16\), got \(3, 32\); use the base",
    ):
        load_adapter(base(num_attention_heads=1), tmp_path / "diffusers")


def test_files_that_are_no_flux_lora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter must be a directory with pytorch_lora_weights.safetensors or a safe"):
        load_adapter(base(), tmp_path)
    save_file({"lora_te1_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "text.safetensors")
    with pytest.raises(
        ValueError, match="must hold a LoRA of FLUX.1's transformer, got none of its layers; name another"
    ):
        load_adapter(base(), tmp_path / "text.safetensors")
    state = kohya_file(tmp_path / "lora.safetensors")
    del state["lora_unet_img_in.lora_up.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(
        ValueError, match=r"must hold lora_unet_img_in.lora_up.weight, got none; fetch or write the file"
    ):
        load_adapter(base(), tmp_path / "cut.safetensors")
    elsewhere = {
        "time_text_embed.x.lora_A.weight": torch.ones(1, 1),
        "time_text_embed.x.lora_B.weight": torch.ones(1, 1),
    }
    with pytest.raises(
        ValueError, match=r"must consist of layers of FLUX.1's blocks, got time_text_embed.x.lora_A.weight"
    ):
        kohya.to_kohya(elsewhere, base())


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(tmp_path / name, adapter_state(trained()))
    assert (tmp_path / "one" / ADAPTER_FILE).read_bytes() == (tmp_path / "two" / ADAPTER_FILE).read_bytes()


def test_the_denoiser_and_the_librarys_pipeline_read_both_formats_alike(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "base")
    model = add_lora(FluxDenoiser.load(folder).transformer, 2, ATTENTION)
    rng = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            value.data = torch.randn(value.shape, generator=rng)
    state = adapter_state(model)
    save_adapter(tmp_path / "diffusers", state)
    kohya.write(tmp_path / "kohya.safetensors", state, model)
    ours = [
        merged_weights(FluxDenoiser.load(folder, adapter, max_sequence_length=LENGTH))
        for adapter in (tmp_path / "diffusers", tmp_path / "kohya.safetensors")
    ]
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path / "diffusers")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert_equal(ours[0], pipeline.transformer.state_dict())
    assert_equal(ours[1], ours[0])


def merged_weights(denoiser: FluxDenoiser) -> dict[str, Tensor]:
    found: dict[str, Tensor] = denoiser.transformer.state_dict()
    return found
