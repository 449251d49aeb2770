"""DerMAE's generator (arXiv 2602.19848): latent diffusion by class, to balance a set.

The network is a U-Net or a DiT of diffusers (`class_networks`) on the latents of any VAE of `codec`. A prompt is the
name of a class, a diagnosis, and the empty prompt is the null class, which guidance (Eq. 8) steers away from. The
condition of a sample is the number of its class, so the sampler treats it as it treats a text's embedding.

A DiT's directory is one that `DiTPipeline` draws from: its class names are `id2label` of model_index.json, and since
that pipeline takes row 1000 for the null class, its tables are stored with 1,001 rows. A U-Net's directory has
`unet/`, `vae/`, `scheduler/` and `labels.json`. There is no mask in these latents, so masks are NaN: there are none.

Letters: B samples, C latent channels, h and w latent sides, H and W pixels, K classes. L = D = 1.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from factory import taxonomy
from factory.models import codec
from factory.models.class_lora import fuse, load_adapter
from factory.models.class_networks import Network, class_prediction, null_class, take_classes
from factory.models.codec import Codec
from factory.models.denoiser import Prediction, classifier_free_guidance
from factory.models.latents import LatentStats
from factory.models.loading import checked_directory, load_part
from factory.models.scheduled import Scheduled
from factory.models.starter import checked_scheduler
from factory.models.weights import LABELS_FILE, family_of, generator_digest, read_labels

STATS_FILE = "latent_stats.json"
PIPELINE_NULL = 1000  # the null class of `DiTPipeline`, whatever the number of classes


@dataclass
class ClassConditionalDenoiser(Scheduled):
    """The class_conditional family of `Denoiser`. labels: the number of every class name; a class may have several."""

    network: Network
    vae: Codec
    scheduler: DDIMScheduler
    labels: Mapping[str, int]
    stats: LatentStats = field(default_factory=LatentStats)
    family: str = "class_conditional"
    mask_source: str | None = None

    def __post_init__(self) -> None:
        checked_scheduler(self.scheduler)
        _check_labels(self.labels, null_class(self.network))
        self.channels: int = self.network.config.in_channels
        found = (self.vae.config.latent_channels, len(self.stats.image_mean))
        if found != (self.channels, self.channels):
            raise ValueError(
                f"vae and {STATS_FILE} must have the network's {self.channels} channels, got {found[0]} and {found[1]};"
                " use the VAE that the network was fitted on."
            )
        self.factor: int = codec.factor_of(self.vae)
        for module in self._modules().values():
            module.eval()

    @classmethod
    def load(cls, directory: str | Path, adapter: str | Path | None = None) -> ClassConditionalDenoiser:
        """From a directory that `save` or `DiTPipeline` wrote, and a LoRA over it, merged into the weights. Everything
        is float32 and nothing is fetched."""
        base = Path(directory)
        if (found := family_of(base)) != "class_conditional":
            raise ValueError(
                f"weights must hold a UNet2DModel or a DiT for the family class_conditional, got {found} in {base}; "
                "fit one with fit.lora.family=class_conditional."
            )
        kinds = {"transformer": DiTTransformer2DModel, "unet": UNet2DModel}
        part = next(name for name in kinds if (base / name / "config.json").is_file())
        checked_directory(base, (part, "vae", "scheduler"), "class-conditional")
        network = load_part(kinds[part], base / part)
        if adapter is not None:
            fuse(load_adapter(network, adapter))
        scheduler = DDIMScheduler.from_pretrained(base / "scheduler", local_files_only=True)
        channels = network.config.in_channels
        loaded = cls(
            network=network,
            vae=codec.load_codec(base / "vae"),
            scheduler=DDIMScheduler.from_config(scheduler.config, clip_sample=False),
            labels=read_labels(base),
            stats=LatentStats.load(base / STATS_FILE)
            if (base / STATS_FILE).is_file()
            else codec.image_stats(channels=channels),
        )
        loaded.digest = generator_digest(base, adapter)
        return loaded

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a directory that `load` reads and, of a DiT, `DiTPipeline` too. `dtype` is that of the stored network
        and VAE. Whitened latents are not the pipeline's: a DiT that has statistics is refused."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = {str(number): name for name, number in sorted(self.labels.items(), key=lambda item: item[1])}
        network, vae = (_stored(module, dtype) for module in (self.network, self.vae))
        if isinstance(network, DiTTransformer2DModel):
            if self.stats != codec.image_stats(channels=self.channels):
                raise ValueError(
                    f"{STATS_FILE} must be left out for a DiT, whose pipeline knows none, got statistics; scale its "
                    "latents by vae.config.scaling_factor."
                )
            _save_pipeline(folder, DiTPipeline(_for_pipeline(network), vae, self.scheduler), names)
        else:
            network.save_pretrained(folder / "unet", safe_serialization=True)
            vae.save_pretrained(folder / "vae", safe_serialization=True)
            self.scheduler.save_pretrained(folder / "scheduler")
            (folder / LABELS_FILE).write_text(json.dumps(names, indent=2) + "\n")
            self.stats.save(folder / STATS_FILE)
        for config in folder.glob("*/config.json"):  # diffusers notes where a part was once loaded from
            known = json.loads(config.read_text())
            config.write_text(json.dumps({k: v for k, v in known.items() if k != "_name_or_path"}, indent=2) + "\n")

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> ClassConditionalDenoiser:
        """The same denoiser on another device, its network in `dtype`; the VAE stays float32. Its digests stay those of
        the weights it was loaded from."""
        _ = self.digest, self.vae_digest
        for name, module in self._modules().items():
            module.to(device, torch.float32 if name == "vae" else dtype)
        self.__dict__.pop("alphas_cumprod", None)
        return self

    def _modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, "vae": self.vae}

    @property
    def null(self) -> int:
        """The number of the null class."""
        return null_class(self.network)

    @cached_property
    def digest(self) -> str:
        """Of the files it was loaded from, or of its tensors if it was made in memory."""
        known = [asdict(self.stats), self.prediction_type, sorted(self.labels.items())]
        return self._tensors_digest(known)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w). A DiT has the positions of one size and draws no other."""
        side = self.factor * (self.network.config.sample_size if self._is_dit else self._levels)
        if self._is_dit and (width, height) != (side, side):
            raise ValueError(f"size must be {side}x{side}, which this DiT was fitted at, got {width}x{height}; set it.")
        if width % side or height % side:
            raise ValueError(f"size must be a multiple of {side}, got {width}x{height}; round it.")
        return self.channels, height // self.factor, width // self.factor

    @property
    def _is_dit(self) -> bool:
        return isinstance(self.network, DiTTransformer2DModel)

    @property
    def _levels(self) -> int:
        """Latent cells per cell of a U-Net's lowest level."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w); the mask is left out, for a class has none."""
        return self.encode_image(image)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), the mode of the VAE's distribution."""
        return self.stats.whiten(codec.scaled_modes(self.vae, image))

    def condition(self, prompts: list[str]) -> Tensor:
        """Class names -> their numbers, (B, 1, 1) float32; the empty one is the null class. Raises ValueError that
        names the nearest class for any other word."""
        known = tuple(self.labels)
        numbers = [self.null if not name else self.labels[taxonomy.check(name, known, "class")] for name in prompts]
        return torch.tensor(numbers, dtype=torch.float32, device=self.network.device).reshape(-1, 1, 1)

    @torch.no_grad()
    def predict(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, guidance: Tensor, unconditional: Tensor
    ) -> Prediction:
        """One forward of twice the batch (Eq. 8); latents (B, C, h, w), timesteps (B,), results in float32."""
        return classifier_free_guidance(self._network, latents, timesteps, condition, guidance, unconditional)

    def _network(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return class_prediction(self.network, latents, timesteps, condition[:, 0, 0].round().long())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) -> image (B, 3, H, W) in [-1, 1], and a mask (B, 1, H, W) of NaN."""
        return codec.decoded(self.vae, self.stats.unwhiten(latents)).clamp(-1, 1), self.mask(latents)

    def mask(self, latents: Tensor) -> Tensor:
        """(B, 1, H, W) of NaN: a class draws no mask."""
        height, width = (self.factor * side for side in latents.shape[-2:])
        return latents.new_full((len(latents), 1, height, width), math.nan)

    def image_latents(self, latents: Tensor) -> Tensor:
        """All of them; `vae_digest` names this space."""
        return latents


def _check_labels(labels: Mapping[str, int], null: int) -> None:
    wrong = [name for name, number in labels.items() if not name or not 0 <= number < null]
    if wrong:
        raise ValueError(
            f"labels must be names of classes 0 to {null - 1}, got {wrong[0]!r} for {labels[wrong[0]]}; the last row "
            "of the class table is the null class."
        )


def _stored(module: Any, dtype: torch.dtype) -> Any:
    """A copy to store: in `dtype`, where it is not already (the library warns of every cast)."""
    copied = copy.deepcopy(module)
    return copied if module.dtype == dtype else copied.to(dtype)


def _for_pipeline(network: DiTTransformer2DModel) -> Network:
    """The DiT with its null class at row 1000, where `DiTPipeline` looks for it; the rows between draw as it does."""
    null = null_class(network)
    if null > PIPELINE_NULL:
        raise ValueError(f"a DiT must have at most {PIPELINE_NULL} classes for its pipeline, got {null}; use a U-Net.")
    return take_classes(network, [*range(null), *[null] * (PIPELINE_NULL + 1 - null)])


def _save_pipeline(folder: Path, pipeline: DiTPipeline, names: dict[str, str]) -> None:
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"id2label": names}, indent=2) + "\n"
    )  # it forgets them
