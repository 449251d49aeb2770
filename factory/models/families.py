"""Which denoiser a directory of weights is, and which families a base can be fitted as."""

from __future__ import annotations

from pathlib import Path

from factory.models.denoiser import Denoiser
from factory.models.weights import family_of

# The families of directories that each family loads.
BASES: dict[str, tuple[str, ...]] = {
    "flux": ("flux",), "joint": ("joint",), "class_conditional": ("class_conditional",),
}  # fmt: skip


def check_base(directory: str | Path, family: str, field: str = "synthesize.weights") -> str:
    """The family of a directory, if `family` can be loaded from it; a ValueError that names the field if not."""
    found = family_of(directory)
    if found not in BASES[family]:
        raise ValueError(
            f"{field} must hold a base of {' or '.join(BASES[family])} for the family {family}, got one of {found} in "
            f"{directory}; set one to match the other."
        )
    return found


def load_denoiser(directory: str | Path, adapter: str | Path | None = None, family: str | None = None) -> Denoiser:
    """The denoiser of a diffusers directory with an adapter merged into it. family: what it is loaded as, where a
    directory serves more than one; by default what it draws as it is."""
    chosen = family_of(directory) if family is None else family
    check_base(directory, chosen)
    if chosen == "flux":
        from factory.models.flux import FluxDenoiser

        return FluxDenoiser.load(directory, adapter)
    if chosen == "class_conditional":
        from factory.models.class_conditional import ClassConditionalDenoiser

        return ClassConditionalDenoiser.load(directory, adapter)
    from factory.models.joint import JointDenoiser

    return JointDenoiser.load(directory, adapter)


def vae_digest_of(directory: str | Path, adapter: str | Path | None = None, family: str | None = None) -> str:
    """The `vae_digest` of that denoiser, of FLUX.1 without the 12 billion parameters that it does not depend on."""
    if (family or family_of(directory)) == "flux":
        from diffusers import AutoencoderKL

        from factory.models.flux import vae_digest
        from factory.models.loading import load_part

        return vae_digest(load_part(AutoencoderKL, Path(directory) / "vae"))
    return load_denoiser(directory, adapter, family).vae_digest
