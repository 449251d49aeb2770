"""Weights on disk: which files of a generator's directory count, and their digest. No torch, so a driver that only
needs a fingerprint stays light."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

STARTER = Path(__file__).resolve().parent.parent / "starter"
WEIGHTED_PARTS: tuple[str, ...] = ("unet", "vae", "text_encoder")
FLUX_PARTS: tuple[str, ...] = ("transformer", "vae", "text_encoder", "text_encoder_2")
_DECIDING = ("latent_stats.json", "scheduler/scheduler_config.json")
_FLUX_DECIDING = ("transformer/config.json", "vae/config.json")  # guidance embedding, scaling and shift
_ADAPTER = ("pytorch_lora_weights.safetensors", "dual_io.safetensors", "latent_stats.json")


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors files that are loaded from a part's folder, and their variant (`fp16`, or None).

    Pickled weights are never read.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if ".fp16" not in file.name]
    if not files:
        raise ValueError(
            f"{folder} must hold safetensors, got none; save the pipeline with safe_serialization=True or name another "
            "directory. Pickled weights are not loaded."
        )
    return (plain, None) if plain else (files, "fp16")


def is_flux(directory: str | Path) -> bool:
    """Whether a diffusers directory holds a transformer that denoises, as FLUX.1 does, and not a U-Net."""
    return (Path(directory) / "transformer").is_dir()


def generator_digest(directory: str | Path, adapter: str | Path | None = None) -> str:
    """SHA-256 (64 hex digits) over the files that decide what a generator draws, adapter (a directory or one file)
    included, by name and content."""
    base = Path(directory)
    parts, deciding = (FLUX_PARTS, _DECIDING + _FLUX_DECIDING) if is_flux(base) else (WEIGHTED_PARTS, _DECIDING)
    files = [file for part in parts for file in weight_files(base / part)[0]]
    files += [base / name for name in deciding] + sorted(base.glob("mask_head/*.safetensors"))
    total = hashlib.sha256(_listed(base, files))
    if adapter is not None:
        over = Path(adapter)
        laid = [over / name for name in _ADAPTER] + sorted(over.glob("mask_head/*.safetensors"))
        total.update(_listed(over.parent, [over]) if over.is_file() else _listed(over, laid))
    return total.hexdigest()


def text_encoder_digest(directory: str | Path) -> str:
    """SHA-256 over what decides how a generator's directory reads a prompt: text encoders and tokenizers."""
    base = Path(directory)
    files: list[Path] = []
    for number in ("", "_2") if is_flux(base) else ("",):
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
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_digest(directory: str | Path, field: str = "weights") -> str:
    """SHA-256 over every safetensors and config.json below a directory, by name and content.

    Raises ValueError, which names the field, where there are none."""
    return hashlib.sha256(_listed(Path(directory), tree_files(directory, field))).hexdigest()


def tree_files(directory: str | Path, field: str = "weights") -> list[Path]:
    """The files that `tree_digest` reads, found without reading them; raises as it does."""
    base = Path(directory)
    files = sorted([*base.rglob("*.safetensors"), *base.rglob("config.json")])
    if not files:
        raise ValueError(f"{field} must be a directory with safetensors, got {directory}; fit them or name another.")
    return files
