"""Pickled weights: refused everywhere with the command that converts them, and converted without running them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_flux import moved, transformer
from tiny_sd import save_pipeline
from torch import nn
from transformers import BertConfig, BertModel

from factory.models.convert import convert, tensors_of
from factory.models.flux_lora import adapter_state, add_lora
from factory.models.flux_lora import load_adapter as load_flux_adapter
from factory.models.joint import JointDenoiser
from factory.models.lora import add_lora as add_joint_lora
from factory.models.lora import load_adapter, save_lora
from factory.models.weights import tree_digest


class Sneaky:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def pickled(directory: Path) -> Path:
    """The directory as it would be had its weights been pickled."""
    for file in sorted(directory.rglob("*.safetensors")):
        name = file.name.replace("safetensors", "bin")
        name = "pytorch_" + name if file.name == "model.safetensors" else name
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    return directory


def test_a_pickled_base_is_refused_and_the_converted_one_is_the_base(tmp_path: Path) -> None:
    wanted = JointDenoiser.load(save_pipeline(tmp_path / "base")).vae_digest
    digest = tree_digest(tmp_path / "base")
    base = pickled(tmp_path / "base")
    sentence = r"weights must be safetensors, got .*unet.*\.bin, which is pickled and could run code; run `factory conv"
    with pytest.raises(ValueError, match=sentence):
        JointDenoiser.load(base)
    written = convert(base, tmp_path / "converted")
    assert sorted(file.relative_to(tmp_path / "converted").as_posix() for file in written) == [
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert JointDenoiser.load(tmp_path / "converted").vae_digest == wanted
    assert not list((tmp_path / "converted").rglob("*.bin")) and list(base.rglob("*.bin"))
    assert tree_digest(tmp_path / "converted") == digest  # even the files are those that diffusers writes


def test_a_pickled_adapter_is_refused_by_both_families(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flux = moved(add_lora(transformer(), 2, ["transformer_blocks.*.attn.to_q"]))
    named = {f"transformer.{key}": value for key, value in adapter_state(flux).items()}
    torch.save(named, tmp_path / "pytorch_lora_weights.bin")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(ValueError, match=r"got .*pytorch_lora_weights\.bin, which is pickled .* `factory convert "):
            load_flux_adapter(transformer(), path)
    convert(tmp_path / "pytorch_lora_weights.bin", tmp_path / "out")
    loaded = adapter_state(load_flux_adapter(transformer(), tmp_path / "out"))
    assert all(torch.equal(value, adapter_state(flux)[key]) for key, value in loaded.items())

    unet = JointDenoiser.load(save_pipeline(tmp_path / "base")).unet
    save_lora(tmp_path / "joint", add_joint_lora(unet, 2))
    with pytest.raises(ValueError, match=r"got .*dual_io\.bin, which is pickled"):
        load_adapter(unet, pickled(tmp_path / "joint"))


def test_shared_and_strided_tensors_each_get_memory_of_their_own(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    state = Tied().state_dict() | {"turned": torch.arange(6.0).reshape(2, 3).T}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    (file,) = convert(tmp_path / "last.ckpt", tmp_path / "out")
    assert file == tmp_path / "out" / "last.safetensors"
    found = load_file(file)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_shards_and_their_index_are_renamed_as_transformers_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model, folder = BertModel(config).eval(), tmp_path / "sharded"
    config.save_pretrained(folder)
    state = sorted(model.state_dict().items())
    parts = {"pytorch_model-00001-of-00002.bin": dict(state[:5]), "pytorch_model-00002-of-00002.bin": dict(state[5:])}
    for name, part in parts.items():
        torch.save(part, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(folder, tmp_path / "out")
    back = BertModel.from_pretrained(tmp_path / "out", use_safetensors=True, local_files_only=True)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in state)
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_where_both_forms_are_there_the_safetensors_one_stays(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    torch.save({"other": torch.zeros(1)}, base / "vae" / "diffusion_pytorch_model.bin")
    convert(base, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(base)


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "more": Sneaky(tmp_path / "mark")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt must hold tensors and nothing else, but torch refuses it with weig"):
        convert(tmp_path / "bad.pt", tmp_path / "out")
    assert not (tmp_path / "mark").exists() and sorted(os.listdir(tmp_path)) == ["bad.pt"]


@pytest.mark.parametrize("content", [b"", b"not a pickle at all", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.bin must hold tensors and nothing else, but torch refuses it"):
        tensors_of(tmp_path / "bad.bin")


def test_a_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth must hold tensors by name, got list; save the model's state_dict"):
        tensors_of(tmp_path / "list.pth")


def test_the_command_converts_and_overwrites_nothing(factory_command: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    done = factory_command("convert", tmp_path / "a.pt", "--out", tmp_path / "out")
    assert done.status == 0 and done.out.split() == ["converted", str(tmp_path / "out" / "a.safetensors")], done.err
    again = factory_command("convert", tmp_path / "a.pt", "--out", tmp_path / "out")
    assert again.status == 2 and "--out must be a directory that is not there yet, got" in again.err
    none = factory_command("convert", tmp_path / "out", "--out", tmp_path / "other")
    assert none.status == 2 and "PATH must be a file or a directory with one of .bin, .pt, .ckpt, .pth, got" in none.err
    assert factory_command("convert", tmp_path / "absent.pt", "--out", tmp_path / "other").status == 2
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "out"]
