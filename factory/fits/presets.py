"""Named LoRA settings of each generator family, and what each costs. Torch is loaded only when one is counted.

DermaFlux (arXiv 2603.16392) says "only the attention layers" and "612M trainable parameters", which no usual rank makes
true together. Its released weights are named `flux_lora_64_64`, and rank 64 on all linears of both block types is
612.6 MB in the fused layout of its trainer, so the megabytes are the likelier reading. All readings are here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory import taxonomy

if TYPE_CHECKING:
    from torch import nn

    from factory.recipe import LoraSection


@dataclass(frozen=True)
class Preset:
    """Which layers get a LoRA (`attention`, `all_linears`, or `joint` for the joint family's own), and its rank. Alpha
    is always the rank. `whole` is a network from nothing, of rank 0."""

    targets: str
    rank: int
    meaning: str


DEFAULT = "budget"
PRESETS: dict[str, dict[str, Preset]] = {
    "flux": {
        "budget": Preset("attention", 64, "attention alone, for one card of 80 GB"),
        "dermaflux_released": Preset("all_linears", 64, "DermaFlux as released, 612M read as megabytes"),
        "dermaflux_612m_peft": Preset("all_linears", 114, "612M read as parameters of split queries, keys and values"),
        "dermaflux_text_literal": Preset("attention", 375, "612M parameters in attention alone, as the text says"),
    },
    "inpaint": {
        "budget": Preset("attention", 4, "attention alone at diffusers' own rank for SDXL"),
        "diffaug": Preset("attention", 16, "DiffAug, whose public text gives no rank"),
    },
    "joint": {
        "budget": Preset("joint", 16, "image and mask together on a small budget, the recipe's own rank"),
        "skindualgen_latent8": Preset("joint", 32, "SkinDualGen's joint latents"),
    },
    "class_conditional": {
        "budget": Preset("whole", 0, "a small U-Net on the starter's VAE, for a CPU"),
        "dermae_dit_b": Preset("whole", 0, "DiT-B/2's size (arXiv 2212.09748)"),
        "dermae_unet": Preset("whole", 0, "the size of LDM-4 by class (arXiv 2112.10752)"),
        "lora": Preset("attention", 16, "LoRA on a base's attention, the recipe's own rank"),
    },
}
FAMILIES = tuple(PRESETS)
NUM_CLASSES = 7  # HAM10000's, which DerMAE balances; of a network that no base decides


def preset_of(family: str, name: str | None = None) -> Preset:
    """A preset by name, the default for None. Raises ValueError that names the nearest right word."""
    known = PRESETS[taxonomy.check(family, FAMILIES, "family")]
    return known[taxonomy.check(DEFAULT if name is None else name, tuple(known), f"preset of {family}")]


def overrides(family: str, preset: str | None = None) -> list[str]:
    """What a family and its preset are in a recipe, as `a.b=c`. A network of classes is fitted whole, unless the preset
    is the LoRA on one. Raises ValueError that names the nearest right word."""
    preset_of(family, preset)
    found = [f"fit.lora.family={family}", f"plan.generator={family}"]
    if family == "class_conditional":
        found.append(f"fit.lora.train_mode={'lora' if preset == 'lora' else 'full'}")
    known = preset is not None and (family, preset) != ("class_conditional", "lora")
    return [*found, f"fit.lora.{family}.preset={preset}"] if known else found


def describe(
    family: str,
    preset: str | None = None,
    base: str | Path | None = None,
    section: LoraSection | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """What a LoRA trains and what memory that takes, counted on the meta device without a weight: JSON-ready.

    base: a diffusers directory, whose config decides the shapes; None means FLUX.1-dev for flux, SDXL-inpainting for
    inpaint, the shipped starter for joint, and for class_conditional the preset's network for seven classes on four
    channels. section, size: the recipe's fit.lora and plan.size, by default its defaults. Keys: family, preset, rank,
    trainable_parameters, bytes (by dtype), targets, modules (how many), memory (bytes by part, see `fits/memory.py`).
    """
    from factory.recipe import LoraSection, PlanSection

    chosen = preset_of(family, preset)
    given = LoraSection(family=family) if section is None else section.model_copy(update={"family": family})  # type: ignore[arg-type]
    model, targets = built(family, chosen, base, DEFAULT if preset is None else preset)
    found = _counted(family, preset, model, targets)
    return found | {"memory": memory_of(model, base, given, PlanSection().size if size is None else size)}


def memory_of(model: nn.Module, base: str | Path | None, section: LoraSection, size: int) -> dict[str, Any]:
    """Bytes by part of a fit of `model`, a network on the meta device with what trains on it (`memory.estimate`)."""
    from factory.fits import memory, meta_forward
    from factory.models.weights import STARTER

    starter = base is None and section.family in ("joint", "class_conditional")
    factor = meta_forward.factor_of(STARTER if starter else base)
    work = memory.workload_of(section, size)
    memory.narrow_base(model, work.base_dtype)
    return memory.estimate(model, meta_forward.forward_of(section.family, model, work, factor), work)


def built(family: str, preset: Preset, base: str | Path | None, name: str) -> tuple[nn.Module, list[str]]:
    """The network of a preset of this name on the meta device, and its layers that train."""
    import torch

    build = {"flux": _flux, "inpaint": _inpaint, "joint": _joint, "class_conditional": _class_conditional}[family]
    with torch.device("meta"):
        return build(preset, base, name)


def _counted(family: str, preset: str | None, model: nn.Module, targets: list[str]) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    chosen, count = preset_of(family, preset), _trained(model)
    return {
        "family": family,
        "preset": DEFAULT if preset is None else preset,
        "rank": chosen.rank,
        "trainable_parameters": count,
        "bytes": {"bfloat16": 2 * count, "float32": 4 * count},
        "targets": targets,
        "modules": sum(isinstance(module, LoraLayer) for module in model.modules()),
    }


def listed() -> list[str]:
    """Every fit and preset with its trainable parameters at the recipe's defaults, a line each: lora by family and
    preset (`*` the default), then the others."""
    rows = [
        (f"lora {family} {name}{'*' if name == DEFAULT else ''}", _count(family, name), preset.meaning)
        for family, presets in PRESETS.items()
        for name, preset in presets.items()
    ]
    lines = [
        f"{title:<36}{found['trainable_parameters']:>12,}  {_extent(found['rank'])} {meaning}"
        for title, found, meaning in rows
    ]
    return lines + [f"{title:<36}{count:>12,}  {meaning}" for title, count, meaning in _others()]


def _count(family: str, name: str) -> dict[str, Any]:
    return _counted(family, name, *built(family, preset_of(family, name), None, name))


def _extent(rank: int) -> str:
    return f"rank {rank:<4}" if rank else "whole    "


def _others() -> list[tuple[str, int, str]]:
    """The fits without presets, at the recipe's defaults."""
    from factory.models.classifier import build_classifier
    from factory.models.mae import MaskedAutoencoder
    from factory.models.segmenter import LatentSegmenter
    from factory.recipe import FitsSection, PlanSection

    mae, student, classes = FitsSection().mae, FitsSection().distill.student, len(PlanSection().diagnoses)
    autoencoder = MaskedAutoencoder(
        mae.encoder, mae.image_size, mae.patch_size, decoder_width=mae.decoder_width, decoder_depth=mae.decoder_depth
    )
    classifier = build_classifier(mae.encoder, classes, mae.image_size, patch_size=mae.patch_size)
    return [
        ("gate", _trained(LatentSegmenter()), "the latent segmenter of the starter's VAE"),
        ("mae", _trained(autoencoder), f"{mae.encoder} and its decoder"),
        ("finetune", _trained(classifier), f"{mae.encoder} as mae fitted it, {classes} diagnoses"),
        ("distill", _trained(build_classifier(student, classes, mae.image_size)), f"{student}, {classes} diagnoses"),
    ]


def _trained(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def _flux(preset: Preset, base: str | Path | None, name: str) -> tuple[nn.Module, list[str]]:
    from diffusers import FluxTransformer2DModel

    from factory.models.flux_lora import TARGETS, add_lora

    # The class's defaults are FLUX.1-dev's shape but for its guidance embedding.
    config = {"guidance_embeds": True} if base is None else _config(base, "transformer", "FluxTransformer2DModel")
    targets = TARGETS[preset.targets]
    return add_lora(FluxTransformer2DModel.from_config(config), preset.rank, targets), list(targets)


# SDXL-inpainting's, as it is published.
_SDXL_INPAINTING: dict[str, Any] = {
    "in_channels": 9, "out_channels": 4, "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def _inpaint(preset: Preset, base: str | Path | None, name: str) -> tuple[nn.Module, list[str]]:
    from diffusers import UNet2DConditionModel

    from factory.models.inpaint import CHANNELS, WHOLE, widen
    from factory.models.lora import ATTENTION, add_lora

    config = _SDXL_INPAINTING if base is None else _config(base, "unet", "UNet2DConditionModel")
    unet = UNet2DConditionModel.from_config(config)
    whole: tuple[str, ...] = ()
    if unet.config.in_channels != CHANNELS:
        unet, whole = widen(unet), WHOLE
    return add_lora(unet, preset.rank, ATTENTION, whole), [*ATTENTION, *(f"{name} (whole)" for name in whole)]


def _joint(preset: Preset, base: str | Path | None, name: str) -> tuple[nn.Module, list[str]]:
    from diffusers import UNet2DConditionModel

    from factory.models.joint import widen
    from factory.models.lora import IO, TARGETS, add_lora
    from factory.models.weights import STARTER

    unet = UNet2DConditionModel.from_config(_config(base or STARTER, "unet", "UNet2DConditionModel"))
    if unet.config.in_channels == unet.config.out_channels == 4:
        widen(unet)
    return add_lora(unet, preset.rank), [*TARGETS, *(f"{name} (whole)" for name in IO)]


def _class_conditional(preset: Preset, base: str | Path | None, name: str) -> tuple[nn.Module, list[str]]:
    """The network of a class-conditional base, whole or with a LoRA; of any other base, and of none, the preset's."""
    from factory.models.class_lora import TARGETS, add_lora
    from factory.models.class_networks import NETWORKS, DiTTransformer2DModel, UNet2DModel, build_network
    from factory.models.weights import family_of

    if base is None or family_of(base) != "class_conditional":
        if preset.targets != "whole" and base is not None:
            raise ValueError(f"--base must hold a network of classes for a LoRA, got {base}; name one or leave it out.")
        kind, config = NETWORKS[name if preset.targets == "whole" else DEFAULT]
        vae = {} if base is None else json.loads((Path(base) / "vae" / "config.json").read_text())
        model = build_network(kind, config, NUM_CLASSES, vae.get("latent_channels", 4), 32)
    else:
        of = DiTTransformer2DModel if (Path(base) / "transformer").is_dir() else UNet2DModel
        part = "transformer" if of is DiTTransformer2DModel else "unet"
        model = of.from_config(_config(base, part, of.__name__))
    if preset.targets == "whole":
        return model, ["every weight"]
    return add_lora(model, preset.rank), list(TARGETS)


def _config(base: str | Path, part: str, kind: str) -> dict[str, Any]:
    """The config of a part of a diffusers directory, if it is of this class."""
    path = Path(base) / part / "config.json"
    if not path.is_file():
        raise ValueError(f"--base must be a diffusers directory with {part}/config.json, got {base}; check the path.")
    found: dict[str, Any] = json.loads(path.read_text())
    if found.get("_class_name") != kind:
        raise ValueError(
            f"--base must hold a {kind}, got {found.get('_class_name')} in {path}; name a base of the family."
        )
    return found
