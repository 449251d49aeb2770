"""Weights on disk: which files of a generator's directory count, and their digest. No torch, so a driver that only
needs a fingerprint stays light."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LARGE = 2**26  # bytes; the digest of a larger file is kept
STARTER = Path(__file__).resolve().parent.parent / "starter"
FAMILIES: tuple[str, ...] = ("flux", "joint", "inpaint", "class_conditional")
WEIGHTED_PARTS: tuple[str, ...] = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")  # if they are there
LABELS_FILE = "labels.json"  # of a class-conditional generator
CASCADE_FILE = "cascade.json"  # of a joint generator that draws the mask after the image
PICKLED: tuple[str, ...] = (".bin", ".pt", ".ckpt", ".pth")  # never read but by `factory convert`
_OTHER_PARTS = ("tokenizer", "tokenizer_2", "scheduler")
_DECIDING = ("latent_stats.json", "scheduler/scheduler_config.json", CASCADE_FILE)
_CONFIGS = ("unet/config.json", "transformer/config.json", "vae/config.json", "model_index.json", LABELS_FILE)
# What a directory's denoising network is, by its class, and for a U-Net with text by its channels in.
_NETWORKS = {"FluxTransformer2DModel": "flux", "DiTTransformer2DModel": "class_conditional",
             "UNet2DModel": "class_conditional"}  # fmt: skip
_CHANNELS = {4: "joint", 8: "joint", 9: "inpaint"}
_ADAPTER = (
    "pytorch_lora_weights.safetensors", "dual_io.safetensors", "latent_stats.json", CASCADE_FILE, "vae/config.json",
)  # fmt: skip


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors files that are loaded from a part's folder, and their variant (`fp16`, or None).

    Pickled weights are never read.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if ".fp16" not in file.name]
    if not files:
        refuse_pickled(folder)
        raise ValueError(
            f"{folder} must hold safetensors, got none; save the pipeline with safe_serialization=True or name another "
            "directory."
        )
    return (plain, None) if plain else (files, "fp16")


def refuse_pickled(path: Path) -> None:
    """Refuse a pickled file, or a directory that holds one, by the command that converts it."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix in PICKLED and file.is_file():
            raise ValueError(
                f"weights must be safetensors, got {file}, which is pickled and could run code; "
                f"run `factory convert {path} --out DIR` and name DIR instead."
            )


def family_of(directory: str | Path) -> str:
    """The family that a diffusers directory draws as it is, by its denoising network's config: one of FAMILIES.

    A plain Stable Diffusion U-Net (4 channels) is `joint`, which widens it. Raises ValueError for any other network.
    """
    base = Path(directory)
    configs = [base / part / "config.json" for part in ("transformer", "unet")]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise ValueError(
            f"weights must be a diffusers directory with unet/config.json or transformer/config.json, got {base}; "
            "save the pipeline there with save_pretrained."
        )
    found = json.loads(config.read_text())
    name, channels = found.get("_class_name"), found.get("in_channels")
    family = _CHANNELS.get(channels) if name == "UNet2DConditionModel" else _NETWORKS.get(name)
    if family is None:
        raise ValueError(
            f"weights must hold a FLUX.1 or DiT transformer or a U-Net of 4, 8 or 9 channels, got {name} with "
            f"{channels} in {config}; name a base of one of {', '.join(FAMILIES)}."
        )
    return family


def check_directory(directory: str | Path) -> Path:
    """The directory, if every part that its `model_index.json` names is there and its scheduler is one for its network.

    Reads no weights, so that a driver can refuse before anything is started. Raises ValueError, one sentence.
    """
    base = Path(directory)
    index = base / "model_index.json"
    listed = json.loads(index.read_text()) if index.is_file() else {}
    named = [
        part for part in (*WEIGHTED_PARTS, *_OTHER_PARTS) if isinstance(listed.get(part), list) and listed[part][0]
    ]
    if missing := [part for part in named if not (base / part).is_dir()]:
        raise ValueError(
            f"weights must be a directory with {', '.join(named)}, as its model_index.json says, got {base} without "
            f"{', '.join(missing)}; save the pipeline there with save_pretrained."
        )
    check_scheduler(base)
    return base


def check_scheduler(base: Path) -> None:
    """Refuse a scheduler that contradicts the network beside it: loading it as another class would only leave out
    what the other does not know, and draw noise."""
    path = base / "scheduler" / "scheduler_config.json"
    if not path.is_file() or family_of(base) == "class_conditional":
        return
    config, family = json.loads(path.read_text()), family_of(base)
    name = str(config.get("_class_name"))
    if ("FlowMatch" in name) != (family == "flux"):
        rule = (
            "a flow's (FlowMatchEulerDiscreteScheduler)" if family == "flux" else "one of noise levels (DDIMScheduler)"
        )
        raise ValueError(
            f"scheduler must be {rule} for a network of the family {family}, got {name} in {path}; "
            "copy the scheduler folder of the base that the network comes from."
        )
    if family == "joint":
        check_prediction(config)


def check_prediction(config: Mapping[str, Any]) -> None:
    """Refuse a prediction type that cannot be used with its own schedule."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"scheduler.prediction_type must be epsilon or v_prediction for a U-Net or a DiT, got "
            f"{kind!r}; use weights with one of these."
        )
    if config.get("rescale_betas_zero_snr") and kind == "epsilon":
        raise ValueError(
            "scheduler.rescale_betas_zero_snr must be False when prediction_type is epsilon, got True; at zero SNR the "
            "noise says nothing of the image: use a v_prediction base, or set it to False."
        )


def generator_digest(directory: str | Path, adapter: str | Path | None = None) -> str:
    """SHA-256 (64 hex digits) over the files that decide what a generator draws, adapter (a directory or one file)
    included, by name and content."""
    base = Path(directory)
    deciding = _DECIDING if family_of(base) == "joint" else _DECIDING + _CONFIGS
    files = [file for part in WEIGHTED_PARTS if (base / part).is_dir() for file in weight_files(base / part)[0]]
    files += [base / name for name in deciding] + sorted(base.glob("mask_head/*.safetensors"))
    total = hashlib.sha256(_listed(base, files))
    if adapter is not None:
        over = Path(adapter)
        laid = [over / name for name in _ADAPTER] + sorted(over.glob("mask_head/*.safetensors"))
        laid += sorted(over.glob("vae/*.safetensors"))
        total.update(_listed(over.parent, [over]) if over.is_file() else _listed(over, laid))
    return total.hexdigest()


def read_labels(directory: Path) -> dict[str, int]:
    """The number of every class name of a directory: `id2label` of model_index.json, whose names may be several with
    commas between them as ImageNet's are, or labels.json."""
    index, own = directory / "model_index.json", directory / LABELS_FILE
    found: Any = json.loads(index.read_text()).get("id2label") if index.is_file() else None
    if found is None and own.is_file():
        found = json.loads(own.read_text())
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"weights must name their classes in id2label of model_index.json or in {LABELS_FILE}, got neither in "
            f"{directory}; write there which number each class has."
        )
    return {name.strip(): int(number) for number, names in found.items() for name in str(names).split(",")}


def check_classes(directory: str | Path, diagnoses: Sequence[str]) -> None:
    """Refuse a plan of diagnoses that a class-conditional generator has not learnt."""
    known = read_labels(Path(directory))
    missing = [diagnosis for diagnosis in diagnoses if diagnosis not in known]
    if missing:
        raise ValueError(
            f"plan.diagnoses must be classes of the generator ({', '.join([*known][:12])}), got {', '.join(missing)}; "
            "fit them, or leave them out."
        )


def is_whole_generator(directory: str | Path) -> bool:
    """Whether fitted weights are a generator of their own (`"mode": "full"` in their card) and no adapter."""
    card = Path(directory) / "card.json"
    return card.is_file() and json.loads(card.read_text()).get("mode") == "full"


def text_encoder_digest(directory: str | Path) -> str:
    """SHA-256 over what decides how a generator's directory reads a prompt: text encoders and tokenizers."""
    base = Path(directory)
    files: list[Path] = []
    for number in ("", "_2") if (base / "text_encoder_2").is_dir() else ("",):
        files += weight_files(base / f"text_encoder{number}")[0] + [base / f"text_encoder{number}/config.json"]
        files += sorted((base / f"tokenizer{number}").iterdir())
    return hashlib.sha256(_listed(base, files)).hexdigest()


def canonical_metadata(path: Path) -> None:
    """Rewrite a safetensors file with its metadata sorted: the library writes it in an order that changes from one
    call to the next, so equal weights would have unequal digests."""
    stored = path.read_bytes()
    (length,) = struct.unpack("<Q", stored[:8])
    header = json.loads(stored[8 : 8 + length])
    if "__metadata__" in header:
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + stored[8 + length :])


def _listed(base: Path, files: list[Path]) -> bytes:
    """One line per file that is there: its name below base and the hash of its bytes."""
    lines = [f"{file.relative_to(base).as_posix()} {_file_digest(file)}\n" for file in files if file.is_file()]
    return "".join([*lines, "\n"]).encode()


def _file_digest(path: Path) -> str:
    """SHA-256 of a file. That of a large one is kept on this machine beside its size and time of change, because every
    actor asks for it and 24 GB take a minute to read."""
    known = path.stat()
    kept: Path | None = None
    if known.st_size >= LARGE:
        name = hashlib.sha256(f"{path.resolve()} {known.st_size} {known.st_mtime_ns}".encode()).hexdigest()
        kept = Path(tempfile.gettempdir()) / f"dermafactory-{getpass.getuser()}" / "digests" / name
        if kept.is_file():
            return kept.read_text()
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        staged = kept.with_name(f"{name}.{os.getpid()}")
        staged.write_text(found)
        staged.replace(kept)
    return found


def tree_digest(directory: str | Path, field: str = "weights") -> str:
    """SHA-256 over every safetensors, config.json and shape_prior.json below a directory, by name and content.

    Raises ValueError, which names the field, where there are none."""
    return hashlib.sha256(_listed(Path(directory), tree_files(directory, field))).hexdigest()


def tree_files(directory: str | Path, field: str = "weights") -> list[Path]:
    """The files that `tree_digest` reads, found without reading them; raises as it does."""
    base = Path(directory)
    weights = [*base.rglob("*.safetensors"), *base.rglob("config.json")]
    files = sorted([*weights, *base.rglob("shape_prior.json")])  # a gate judges by it
    if not weights:
        refuse_pickled(base)
        raise ValueError(f"{field} must be a directory with safetensors, got {directory}; fit them or name another.")
    return files
