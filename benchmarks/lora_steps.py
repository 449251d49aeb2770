"""LoRA steps per second of our loop against loops written after diffusers' example scripts, in one run.

The peers are `train_text_to_image_lora.py` (Stable Diffusion) and `train_dreambooth_lora_flux.py` (FLUX.1), rewritten
here to what they do in a step: as they ship, with the VAE and the text encoders in every step, for captioned data; and
the second with its own caching of latents and one prompt embedding reused. Accelerate, progress bars and trackers are
left out, in their favour. Both sides train the same LoRA on the same tiny random base, from the same PNGs, at the same
batch in float32; sizes are such that a forward of the VAE's encoder and of the text encoders costs in proportion to
the network's what it does at 512 px (`flops` in the result, beside the real ones). A step is timed from its start to
the next one's start, rounds alternate, and the median of all counts. What our cache costs before the first step is
in `cache_s`, for all images.

    python benchmarks/lora_steps.py --rounds 5 --steps 20
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from factory import phantom
from factory.fits.flux import FitFluxLora
from factory.fits.joint import EmbeddedExamples, encode_pairs, lesion_square
from factory.fits.loop import Worker, train
from factory.fits.objective import RowNoise
from factory.images import encode_mask, encode_png
from factory.models import flux_lora
from factory.models.joint import JointDenoiser
from factory.models.joint_loss import latent_loss
from factory.models.lora import add_lora
from factory.models.text_cache import TextEmbeddings
from factory.recipe import FluxSection, LoraSection

ROOT = Path(__file__).resolve().parent
RESULT = ROOT / "results" / "lora_steps.json"
GOALS = {"sd as it ships": 1.4, "flux as it ships": 1.4, "flux with its caches": 1.0}
# Teraflops of one forward at 512 px: SD2's U-Net and FLUX.1-dev with 512 T5 tokens, their VAE's encoder, their text
# encoders (counted on the meta device).
REAL = {"sd": (0.804, 1.117, 0.052), "flux": (21.5, 1.117, 4.9)}
RANK, RATE, CLIP = 4, 1e-4, 1.0
SIDE = {"sd": 64, "flux": 128}  # px
TOKENS = 32  # of T5

sys.path.insert(0, str(ROOT.parent / "tests" / "models"))
from tiny_flux import clip_tokenizer, t5_tokenizer  # type: ignore[import-not-found] # noqa: E402


class Clock:
    """Seconds from the start of each step to the start of the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


class Ticking:
    """An objective whose steps are timed."""

    def __init__(self, objective: Any, clock: Clock) -> None:
        self.objective, self.clock = objective, clock
        self.examples, self.build = objective.examples, objective.build

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        self.clock.tick()
        found: dict[str, Tensor] = self.objective.loss(model, batch, noise)
        return found


class FitPlain:
    """The example's objective in our loop: a plain U-Net, from latents and captions that were encoded before."""

    def __init__(self, base: Path, images: list[bytes], prompts: list[str]) -> None:
        self.denoiser = JointDenoiser.load(base)  # its codec and text encoder; the U-Net is loaded as it is
        self.base, side = base, SIDE["sd"]
        empty = encode_mask(np.zeros((side, side), bool))
        pairs = encode_pairs(self.denoiser, len(images), lambda k: lesion_square(images[k], empty, side), side)
        texts = TextEmbeddings(None, "", self.denoiser.condition, "")
        self.examples = EmbeddedExamples(pairs[0][:, :4], pairs[1], *texts.of(prompts))

    def build(self) -> nn.Module:
        return add_lora(_unet(self.base), RANK, whole=()).train()

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        latents = batch["latents"]
        return latent_loss(
            model, self.denoiser.scheduler, latents=latents, noise=noise.normal(*latents.shape[1:]).to(latents),
            timesteps=noise.integers(1000).to(latents.device), condition=batch["condition"],
        )  # fmt: skip


def _unet(base: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base / "unet", local_files_only=True)


class Captioned(Dataset):  # type: ignore[type-arg]
    """PNGs as the text-to-image script reads them: decoded, scaled, cropped, flipped and tokenized at every turn."""

    def __init__(self, images: list[bytes], prompts: list[str], tokenizer: Any, side: int) -> None:
        self.images = images
        self.prompts, self.ids = prompts, tokenizer and _ids(tokenizer, prompts)
        self.prepare = transforms.Compose(
            [
                transforms.Resize(side), transforms.RandomCrop(side), transforms.RandomHorizontalFlip(),
                transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        pixels = self.prepare(Image.open(io.BytesIO(self.images[row])).convert("RGB"))
        return {"pixels": pixels, "prompt": self.prompts[row], **({} if self.ids is None else {"ids": self.ids[row]})}


class Prepared(Captioned):
    """PNGs as the dreambooth script reads them: all prepared when the data set is made."""

    def __init__(self, images: list[bytes], prompts: list[str], side: int) -> None:
        super().__init__(images, prompts, None, side)
        self.rows = [super(Prepared, self).__getitem__(row) for row in range(len(images))]

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row]


def _ids(tokenizer: Any, prompts: list[str]) -> Tensor:
    length = tokenizer.model_max_length
    found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = found.input_ids
    return ids


def turns(data: Dataset[Any], batch: int, steps: int) -> Iterator[tuple[int, Any]]:
    """Steps with their place in the epoch, over shuffled epochs without a part batch."""
    done = 0
    while done < steps:
        for place, found in enumerate(DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)):
            yield place, found
            done += 1
            if done == steps:
                return


def peer_sd(pipeline: Any, base: Path, data: Dataset[Any], batch: int, steps: int, clock: Clock) -> None:
    """The text-to-image script's step."""
    unet = add_lora(_unet(base), RANK, whole=()).to(pipeline.device).train()
    learn, noising = _optimizer(unet, steps), pipeline.scheduler
    for _, found in turns(data, batch, steps):
        clock.tick()
        with torch.no_grad():
            latents = pipeline.vae.encode(found["pixels"].to(unet.device)).latent_dist.sample()
            states = pipeline.text_encoder(found["ids"].to(unet.device))[0]
        latents = latents * pipeline.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(latents),), device=latents.device)
        said = unet(noising.add_noise(latents, noise, times), times, states).sample
        learn(F.mse_loss(said.float(), noising.get_velocity(latents, noise, times).float()))


def peer_flux(
    pipeline: Any, data: Dataset[Any], batch: int, steps: int, clock: Clock, cached: bool, targets: list[str]
) -> None:
    """The dreambooth script's step; cached: with `--cache_latents` and one prompt for all."""
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    network = flux_lora.add_lora(deepcopy(pipeline.transformer), RANK, targets).train()
    learn, vae, device = _optimizer(network, steps), pipeline.vae, pipeline.device
    levels = deepcopy(pipeline.scheduler)
    known: list[Any] = []
    with torch.no_grad():
        if cached:
            loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
            known = [vae.encode(found["pixels"].to(device)).latent_dist for found in loader]
            reused = pipeline.encode_prompt(["a lesion"] * batch, None, max_sequence_length=TOKENS)
    for place, found in turns(data, batch, steps):
        clock.tick()
        with torch.no_grad():
            texts = reused if cached else pipeline.encode_prompt(found["prompt"], None, max_sequence_length=TOKENS)
            latents = (known[place] if cached else vae.encode(found["pixels"].to(device)).latent_dist).sample()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        noise, (states, pooled, places) = torch.randn_like(latents), texts
        share = compute_density_for_timestep_sampling(
            "none", len(latents), logit_mean=0.0, logit_std=1.0, mode_scale=1.29
        )
        rows = (share * 1000).long()
        times, sigma = levels.timesteps[rows].to(device), levels.sigmas[rows].reshape(-1, 1, 1, 1).to(latents)
        count, channels, height, width = latents.shape
        said = network(
            hidden_states=pipeline._pack_latents((1 - sigma) * latents + sigma * noise, count, channels, height, width),
            timestep=times / 1000, guidance=torch.ones(count, device=device), pooled_projections=pooled,
            encoder_hidden_states=states, txt_ids=places,
            img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, latents.dtype),
            return_dict=False,
        )[0]  # fmt: skip
        said = pipeline._unpack_latents(said, height, width, vae_scale_factor=1)
        weight = compute_loss_weighting_for_sd3("none", sigma)
        learn((weight.float() * (said.float() - (noise - latents).float()) ** 2).reshape(count, -1).mean(1).mean())


def _optimizer(network: nn.Module, steps: int) -> Callable[[Tensor], None]:
    """Backward, clipping, AdamW and its schedule, as both scripts end a step."""
    trained = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-4)
    schedule = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=steps)

    def learn(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.detach().item()  # both scripts log it at every step

    return learn


def save_sd(folder: Path) -> Path:
    """A random base of SD2's layout, and at its proportions."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from tiny_sd import build_pipeline  # type: ignore[import-not-found]
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        block_out_channels=(32, 40, 64, 64), layers_per_block=2, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipeline = build_pipeline(vae=vae.eval())
    words, width = clip_tokenizer(), 64
    pipeline.register_modules(
        unet=UNet2DConditionModel(
            sample_size=SIDE["sd"] // 8, in_channels=4, out_channels=4, block_out_channels=(64, 128, 256),
            layers_per_block=2, cross_attention_dim=width, attention_head_dim=(2, 4, 8), norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), use_linear_projection=True,
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=width, intermediate_size=4 * width, num_attention_heads=4,
                num_hidden_layers=3, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        ).eval(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def save_flux(folder: Path) -> Path:
    """A random base of FLUX.1-dev's layout, and at its proportions."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from tiny_flux import transformer
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    words, pieces = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        projection_dim=24, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(pieces), d_model=128, d_kv=32, d_ff=512, num_layers=6, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
    )  # fmt: skip
    sizes = {"num_layers": 3, "num_single_layers": 6, "attention_head_dim": 32, "num_attention_heads": 4}
    network = transformer(joint_attention_dim=128, axes_dims_rope=(8, 12, 12), **sizes)
    FluxPipeline(
        transformer=network, vae=vae, text_encoder=CLIPTextModel(clip), text_encoder_2=T5EncoderModel(t5),
        tokenizer=words, tokenizer_2=pieces,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def flops(family: str, pipeline: Any) -> dict[str, Any]:
    """Of one forward of the network; the VAE's and the text encoders' as shares of it, here and at real sizes."""

    def count(call: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return float(counter.get_total_flops())

    side, device = SIDE[family], pipeline.device
    vae = count(lambda: pipeline.vae.encode(torch.zeros(1, 3, side, side, device=device)))
    latents = torch.zeros(1, 4, side // 8, side // 8, device=device)
    if family == "sd":
        text = count(lambda: pipeline.encode_prompt("a", device, 1, False))
        states = pipeline.encode_prompt("a", device, 1, False)[0]
        network = count(lambda: pipeline.unet(latents, torch.ones(1, device=device), states))
    else:
        from factory.models.flux import FluxDenoiser, velocity

        text = count(lambda: pipeline.encode_prompt("a", None, max_sequence_length=TOKENS))
        parts = {
            name: part
            for name, part in pipeline.components.items()
            if name not in ("image_encoder", "feature_extractor")
        }
        states = FluxDenoiser(**parts, max_sequence_length=TOKENS).condition(["a"])
        one = torch.ones(1, device=device)
        network = count(lambda: velocity(pipeline.transformer, latents, one / 2, states, one))
    real = REAL[family]
    return {
        "network": network, "vae_share": vae / network, "text_share": text / network,
        "real_vae_share": real[1] / real[0], "real_text_share": real[2] / real[0],
    }  # fmt: skip


def compared(sides: dict[str, Callable[[Clock], None]], rounds: int) -> dict[str, float]:
    """Median seconds of a step of each, over rounds in which they take turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            clock = Clock()
            sides[name](clock)
            if turn:
                seconds[name] += clock.steps()
    return {name: statistics.median(found) for name, found in seconds.items()}


def measured_sd(folder: Path, images: list[bytes], prompts: list[str], asked: argparse.Namespace) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    base = save_sd(folder / "sd")
    pipeline = StableDiffusionPipeline.from_pretrained(base).to(asked.device)
    started = time.perf_counter()
    objective = FitPlain(base, images, prompts)
    spent = time.perf_counter() - started
    data = Captioned(images, prompts, pipeline.tokenizer, SIDE["sd"])
    found = compared(
        {
            "ours": lambda clock: ours(objective, asked, clock, folder),
            "as it ships": lambda clock: peer_sd(pipeline, base, data, asked.batch, asked.steps, clock),
        },
        asked.rounds,
    )
    return {"step_s": found, "cache_s": spent, "flops": flops("sd", pipeline)}


def measured_flux(folder: Path, images: list[bytes], prompts: list[str], asked: argparse.Namespace) -> dict[str, Any]:
    from diffusers import FluxPipeline

    base = save_flux(folder / "flux")
    pipeline = FluxPipeline.from_pretrained(base).to(asked.device)
    pipeline.set_progress_bar_config(disable=True)
    own = FluxSection(preset=None, max_sequence_length=TOKENS, base_dtype="float32", gradient_checkpointing=False)
    section = LoraSection(family="flux", rank=RANK, caption_dropout=0.0, flux=own)
    started = time.perf_counter()
    objective = FitFluxLora(base, images, prompts, section, SIDE["flux"])
    spent = time.perf_counter() - started
    targets = list(flux_lora.TARGETS[objective.preset.targets])
    data = Prepared(images, prompts, SIDE["flux"])

    def peer(cached: bool) -> Callable[[Clock], None]:
        return lambda clock: peer_flux(pipeline, data, asked.batch, asked.steps, clock, cached, targets)

    sides = {
        "ours": lambda clock: ours(objective, asked, clock, folder),
        "as it ships": peer(False),
        "with its caches": peer(True),
    }
    found = compared(sides, asked.rounds)
    return {"step_s": found, "cache_s": spent, "flops": flops("flux", pipeline)}


def ours(objective: Any, asked: argparse.Namespace, clock: Clock, folder: Path) -> None:
    """Our loop from its first step; its one checkpoint is after the last."""
    section = LoraSection(
        steps=asked.steps, batch_size=asked.batch, learning_rate=RATE, warmup_steps=0, clip_norm=CLIP,
        checkpoint_every=asked.steps,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        worker = Worker(device=torch.device(asked.device))
        train(Ticking(objective, clock), section, Path(scratch), worker=worker)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    asked.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    images = [encode_png(phantom.draw(3, number, 128).image) for number in range(asked.images)]
    prompts = [f"a dermoscopic image of lesion number {number}" for number in range(asked.images)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        families = {
            "sd": measured_sd(folder, images, prompts, asked), "flux": measured_flux(folder, images, prompts, asked),
        }  # fmt: skip
    ratios = {
        f"{family} {side}": found["step_s"][side] / found["step_s"]["ours"]
        for family, found in families.items()
        for side in found["step_s"]
        if side != "ours"
    }
    result = {
        "images": asked.images, "batch": asked.batch, "steps": asked.steps, "rounds": asked.rounds,
        "device": asked.device, "threads": asked.threads, "ratio": ratios, "goal": GOALS, **families,
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if all(ratios[name] >= goal for name, goal in GOALS.items()) else 1)


if __name__ == "__main__":
    main()
