"""LoRA on the attention of a class-conditional network: `pytorch_lora_weights.safetensors`.

Layers are named as in the network, below `unet.` or `transformer.`, and alpha is the rank, so that no metadata is
needed. Neither network is one of those whose pipeline loads a LoRA, so PEFT does what pipelines do elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from factory.models.class_networks import Network
from factory.models.lora import ADAPTER_FILE

TARGETS: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
_NAME = "default"


def add_lora(network: Network, rank: int) -> Network:
    """Freeze the network in place and add a LoRA of this rank, alpha the same, to its attention."""
    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS))
    inject_adapter_in_model(config, network, adapter_name=_NAME)
    return network


def save_adapter(directory: str | Path, network: Network) -> None:
    """Write the adapter that `add_lora` made. The same weights always give the same bytes."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_state(network), folder / ADAPTER_FILE, metadata={"format": "pt"})


def load_adapter(network: Network, directory: str | Path) -> Network:
    """Put the adapter in a directory onto the network, in place. One of another base is a ValueError that names the
    first tensor in which they differ."""
    file = Path(directory) / ADAPTER_FILE
    if not file.is_file():
        raise ValueError(f"adapter must be a directory with {ADAPTER_FILE}, got {directory}; fit one or name another.")
    state = load_file(file)
    rank = next((len(value) for key, value in sorted(state.items()) if ".lora_A." in key), 1)
    add_lora(network, rank)
    wanted = _state(network)
    for key in sorted({*state, *wanted}):
        had, got = ((tuple(of[key].shape) if key in of else None) for of in (wanted, state))
        if had != got:
            raise ValueError(
                f"{ADAPTER_FILE} in {directory} must hold {key} of shape {had}, got {got}; "
                "use the base that the adapter was fitted on."
            )
    prefix = _prefix(network)
    set_peft_model_state_dict(network, {k.removeprefix(prefix): v for k, v in state.items()}, adapter_name=_NAME)
    return network.eval()


def fuse(network: Network) -> Network:
    """Merge the adapter into the weights and drop it: the same network to rounding, at the base's cost."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[operator]
            network.set_submodule(name, module.get_base_layer())
    network.__dict__.pop("peft_config", None)
    return network


def _prefix(network: Network) -> str:
    return "unet." if isinstance(network, UNet2DModel) else "transformer."


def _state(network: Network) -> dict[str, Tensor]:
    found = get_peft_model_state_dict(network, adapter_name=_NAME)
    return {_prefix(network) + key: value.detach().cpu().contiguous() for key, value in found.items()}
