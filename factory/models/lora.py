"""LoRA on a U-Net, in the file format that diffusers pipelines load.

`pytorch_lora_weights.safetensors` holds the adapter and its metadata; `dual_io.safetensors` holds `conv_in` and
`conv_out`, or the one of them that is trained whole, which `load_lora_weights` would refuse in the same file. Alpha
equals the rank, so a loader that ignores metadata scales it right all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from factory.models.weights import canonical_metadata, refuse_pickled

TARGETS: tuple[str, ...] = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
ATTENTION: tuple[str, ...] = TARGETS[:4]
ADAPTER_FILE, DUAL_IO_FILE = "pytorch_lora_weights.safetensors", "dual_io.safetensors"
IO: tuple[str, ...] = ("conv_in", "conv_out")  # trained whole in the joint family
_NAME = "default"


def add_lora(
    unet: UNet2DConditionModel, rank: int, targets: Sequence[str] = TARGETS, whole: Sequence[str] = IO
) -> UNet2DConditionModel:
    """Freeze the U-Net in place, then add what is trained: LoRA of this rank, and the convolutions `whole`, for a plain
    U-Net none."""
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    unet.add_adapter(config, adapter_name=_NAME)
    for name in whole:
        unet.get_submodule(name).requires_grad_(True)
    return unet


def save_lora(directory: str | Path, unet: UNet2DConditionModel, whole: Sequence[str] = IO) -> None:
    """Write the adapter that `add_lora` made, and the convolutions `whole`. The same weights always give the same
    bytes.

    Keys stay PEFT's own: `convert_state_dict_to_diffusers` renames the attention layers only, and of such a mixture
    `load_lora_weights` drops the attention layers with no more than a warning.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = unet.peft_config[_NAME].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, whose order changes with the process
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=_NAME),
        unet_lora_adapter_metadata=metadata,
    )
    canonical_metadata(folder / ADAPTER_FILE)
    if whole:
        save_file(dual_io(unet, whole), folder / DUAL_IO_FILE)


def dual_io(unet: UNet2DConditionModel, whole: Sequence[str] = IO) -> dict[str, Tensor]:
    """The tensors of the convolutions `whole`, by their names in the U-Net."""
    state = {f"{name}.{key}": value for name in whole for key, value in unet.get_submodule(name).state_dict().items()}
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def load_adapter(unet: UNet2DConditionModel, directory: str | Path, whole: Sequence[str] = IO) -> UNet2DConditionModel:
    """Put the adapter in a directory onto the U-Net, in place; the result is bit-identical to the one saved.

    A plain Stable Diffusion LoRA without `dual_io.safetensors` is taken too and leaves the convolutions `whole` alone.
    """
    folder = Path(directory)
    if not (folder / ADAPTER_FILE).is_file():
        refuse_pickled(folder)
        raise ValueError(f"adapter must be a directory with {ADAPTER_FILE}, got {directory}; fit one or name another.")
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        folder, weight_name=ADAPTER_FILE, unet_config=unet.config, return_lora_metadata=True, local_files_only=True
    )
    _check_fits(state, unet, folder / ADAPTER_FILE)
    if (folder / DUAL_IO_FILE).is_file():
        _load_dual_io(unet, load_file(folder / DUAL_IO_FILE), folder, whole)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, adapter_name=_NAME, metadata=metadata)
    return unet.eval()


def check_fitted_for(adapter: Path, kind: str) -> None:
    """Refuse an adapter whose card says that it was fitted on a base that predicts something else."""
    card = adapter / "card.json"
    fitted = json.loads(card.read_text()).get("prediction_type", kind) if card.is_file() else kind
    if fitted != kind:
        raise ValueError(
            f"adapter must have been fitted on a base that predicts {kind}, got one of {fitted} in {adapter}; "
            "use the base that it was fitted on."
        )


def _check_fits(state: Mapping[str, Tensor], unet: UNet2DConditionModel, file: Path) -> None:
    """Refuse an adapter that was fitted on another base, by its first tensor; the library says so once a layer."""
    layers = dict(unet.named_modules())
    for key, value in sorted(state.items()):
        name, found, end = key.removeprefix("unet.").partition(".lora_")
        if not found or end[:2] not in ("A.", "B."):  # another format's names, which the library knows
            continue
        side = 1 if end.startswith("A") else 0  # A's columns, B's rows, for a linear layer and a convolution
        weight = getattr(layers.get(name), "weight", None)
        if weight is None:
            rule, got = "a layer of this base", "a layer that it does not have"
        elif value.shape[side] == weight.shape[side]:
            continue
        else:
            sides = f"(rank, {weight.shape[1]})" if side else f"({weight.shape[0]}, rank)"
            rule, got = f"of shape {sides}", str(tuple(value.shape))
        raise ValueError(f"{key} in {file} must be {rule}, got {got}; use the base that the LoRA was fitted on.")


def _load_dual_io(unet: UNet2DConditionModel, state: dict[str, Tensor], folder: Path, whole: Sequence[str]) -> None:
    for key, value in dual_io(unet, whole).items():
        found = tuple(state[key].shape) if key in state else None
        if found != tuple(value.shape):
            raise ValueError(
                f"{DUAL_IO_FILE} in {folder} must hold {key} of shape {tuple(value.shape)}, got {found}; "
                "use the base that the adapter was fitted on."
            )
    for name in whole:
        unet.get_submodule(name).load_state_dict(
            {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        )


def fuse(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Merge the adapter into the weights and drop it: the same network to rounding, at the base's cost."""
    unet.fuse_lora(adapter_names=[_NAME])
    unet.unload_lora()
    return unet
