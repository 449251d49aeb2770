"""Which denoiser a directory of weights is, and which families a base can be fitted as."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from factory.models.denoiser import Denoiser
from factory.models.quantise import check_quantised
from factory.models.weights import check_directory, family_of

if TYPE_CHECKING:
    import torch

    from factory.models.kept_prompts import KeptPrompts

# The families of directories that each family loads.
BASES: dict[str, tuple[str, ...]] = {
    "flux": ("flux",), "joint": ("joint",), "inpaint": ("inpaint", "joint"),
    "class_conditional": ("class_conditional",),
}  # fmt: skip


def check_base(directory: str | Path, family: str, field: str = "synthesize.weights") -> str:
    """The family of a directory, if `family` can be loaded from it and it is whole (`weights.check_directory`); a
    ValueError if not."""
    found = family_of(directory)
    if found not in BASES[family]:
        raise ValueError(
            f"{field} must hold a base of {' or '.join(BASES[family])} for the family {family}, got one of {found} in "
            f"{directory}; set one to match the other."
        )
    check_directory(directory)
    return found


def load_denoiser(
    directory: str | Path,
    adapter: str | Path | None = None,
    family: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    base_dtype: str | None = None,
    prompts: KeptPrompts | None = None,
) -> Denoiser:
    """The denoiser of a diffusers directory with an adapter merged into it. family: what it is loaded as, where a
    directory serves more than one; by default what it draws as it is. dtype: what `to` will be called with, so that
    FLUX.1 is never held in float32; base_dtype: see `quantise`; prompts: read instead of its text encoders; both for
    FLUX.1 alone."""
    chosen = family_of(directory) if family is None else family
    check_base(directory, chosen)
    check_quantised(base_dtype, chosen, "synthesize.base_dtype")
    if chosen == "flux":
        import torch

        from factory.models.flux import FluxDenoiser

        return FluxDenoiser.load(
            directory, adapter, dtype=dtype or torch.float32, base_dtype=base_dtype, prompts=prompts
        )
    if chosen == "class_conditional":
        from factory.models.class_conditional import ClassConditionalDenoiser

        return ClassConditionalDenoiser.load(directory, adapter)
    if chosen == "inpaint":
        from factory.models.inpaint import InpaintDenoiser

        return InpaintDenoiser.load(directory, adapter)
    from factory.models.joint_arms import load_joint

    return load_joint(directory, adapter)


def vae_digest_of(directory: str | Path, adapter: str | Path | None = None, family: str | None = None) -> str:
    """The `vae_digest` of that denoiser, without the billions of parameters that it does not depend on."""
    if (family or family_of(directory)) == "flux":
        from diffusers import AutoencoderKL

        from factory.models.flux import vae_digest
        from factory.models.loading import load_part

        return vae_digest(load_part(AutoencoderKL, Path(directory) / "vae"))
    if (family or family_of(directory)) == "inpaint":
        from factory.models import codec
        from factory.models.inpaint import load_stats

        return codec.vae_digest(codec.load_codec(Path(directory) / "vae"), load_stats(Path(directory)))
    return load_denoiser(directory, adapter, family).vae_digest
