"""Does a fit teach a generator to hear words? Joint and flux, fitted on phantoms whose captions say skin and size.

What a caption says is the phantom's truth: how dark the skin is and how much of the view the lesion takes, now one, now
the other, now both. joint goes on from the shipped starter, which was never told a size. flux has nothing before it: a
small FLUX.1 of the real classes first learns to draw phantoms (VAE, then transformer), told of their skin alone and in
words ("dark skin"); the fit that is measured is a LoRA on all linear layers of its blocks. Its captions use those words
the other way round (--words reversed: very light skin is "dark"), so that an AUC near 0 is its own doing; or they call
the skin by types that the base never met (--words types: "Fitzpatrick type VI"). Both say sizes, of which the base was
told nothing. A LoRA needs a base that reads: on one fitted without prompts, or with those of other images, it heard
nothing after 450 steps, for what embeds the text (`context_embedder`, `time_text_embed`) is no target of it and had
learnt to pass nothing on.

Samples of two prompts that differ in one word are drawn from the same seeds, before and after the fit; the AUC says how
often one of the second prompt measures more (0.5: the word does nothing). joint is measured under its own masks, flux
under masks by colour.

    python benchmarks/prompt_fit.py --family joint --steps 400
    python benchmarks/prompt_fit.py --family flux --steps 600
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factory import phantom, taxonomy
from factory.fits.flux import FitFluxLora
from factory.fits.joint import FitLora
from factory.fits.loop import train
from factory.images import encode_mask, encode_png, read_mask, read_png
from factory.models.weights import STARTER
from factory.prompts import Surroundings, prompt_for, size_word
from factory.quality import statistics
from factory.quality.attributes import estimate_mask, measure
from factory.quality.skin_tone import skin_lab
from factory.recipe import FluxSection, GateSection, LoraSection, PlanSection, SynthesizeSection
from factory.release.sheet import contact_sheet
from factory.stages.plan import sample_rows
from factory.stages.synthesize import SynthesizeSamples

RESULTS = Path(__file__).parent / "results"
FIT_SEED, LENGTH, LEAST = 41, 32, 16  # of the phantoms; T5 tokens; pixels of a lesion
SIDE = {"joint": 128, "flux": 32}
# name: what the two prompts say of (skin type, size, whether the skin is called by its type)
CONTRASTS = {
    "darkness_of_skin": (("I", None, False), ("VI", None, False)),
    "darkness_of_skin_by_type": (("I", None, True), ("VI", None, True)),
    "relative_diameter": ((None, "small", False), (None, "large", False)),
    "relative_diameter_on_dark_skin": (("V", "small", False), ("V", "large", False)),
}


def said(skin: str | None, size: str | None, by_type: bool = False) -> str:
    prompt = prompt_for(None, skin, bank="extended", surroundings=Surroundings(size=size))
    if not by_type or skin is None:
        return prompt
    return prompt.replace(f"on {taxonomy.SKIN_WORDS[skin]} skin", f"of Fitzpatrick type {skin}")


def phantoms(count: int, side: int, words: str = "own") -> tuple[list[bytes], list[bytes], list[str], list[str]]:
    """Images, masks, captions, and captions of the skin in words alone; a caption leaves skin or size unsaid in a third
    of the cases each. Lesions of less than LEAST pixels are left out: nothing can be measured of them."""
    opposite = dict(zip(taxonomy.SKIN_TYPES, reversed(taxonomy.SKIN_TYPES), strict=True))
    rng, captions, of_skin = np.random.default_rng(0), [], []
    every = (phantom.draw(FIT_SEED, number, side) for number in range(count))
    drawn = [one for one in every if one.mask.sum() >= LEAST]
    for one in drawn:
        across = measure(one.image, one.mask).relative_diameter
        skin = taxonomy.SKIN_TYPES[one.skin_type - 1] if rng.random() > 1 / 3 else None
        of_skin.append(said(skin, None))
        if words == "reversed" and skin is not None:
            skin = opposite[skin]
        captions.append(said(skin, size_word(across) if rng.random() > 1 / 3 else None, words == "types"))
    return [encode_png(one.image) for one in drawn], [encode_mask(one.mask) for one in drawn], captions, of_skin


# ----------------------------------------------------------------------------------------- a base for flux


class FitTinyVae:
    """Objective: an AutoencoderKL of FLUX.1's kind, by the squared error of its reconstruction."""

    def __init__(self, images: Sequence[bytes], vae: nn.Module) -> None:
        self.vae, self.examples = vae, self
        pixels = np.stack([read_png(image) for image in images])
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {"pixels": self.pixels[torch.from_numpy(indices)]}

    def build(self) -> nn.Module:
        return self.vae.requires_grad_(True).train()

    def loss(self, model: Any, batch: dict[str, Tensor], noise: Any) -> dict[str, Tensor]:
        latents = model.encode(batch["pixels"]).latent_dist.mode()
        noisy = latents + 0.05 * noise.normal(*latents.shape[1:])
        spread = (latents.flatten(1).std(1) - 1).square().mean() + latents.mean((0, 2, 3)).square().mean()
        error = (model.decode(noisy).sample - batch["pixels"]).square().mean()
        return {"loss": error + 0.01 * spread, "mse": error}

    def save(self, model: Any, directory: Path) -> None:
        model.eval().save_pretrained(directory)


class FitWhole(FitFluxLora):
    """The whole transformer instead of a LoRA on it: how the base comes to draw anything."""

    def build(self) -> nn.Module:
        from factory.models.quantise import load_base

        return load_base(self.weights / "transformer", "float32").requires_grad_(True).train()

    def save(self, model: Any, directory: Path) -> None:
        model.eval().save_pretrained(directory)


def flux_base(images: list[bytes], of_skin: list[str], work: Path, steps: int) -> Path:
    """A FLUX.1 directory that draws phantoms on the skin that it is asked for; of sizes it was told nothing."""
    from diffusers import FluxPipeline

    base = work / "base"
    if not (base / "done").exists():
        parts = flux_parts()
        section = LoraSection(family="flux", steps=800, batch_size=16, learning_rate=2e-3, schedule="cosine")
        train(FitTinyVae(images, parts["vae"]), section, work / "vae")  # type: ignore[arg-type]
        FluxPipeline(**parts).save_pretrained(base)
        fit_whole(base, images, of_skin, steps, work / "transformer")
        (base / "done").touch()
    return base


def fit_whole(base: Path, images: list[bytes], prompts: list[str], steps: int, work: Path) -> None:
    section = flux_section(steps, 1e-3)
    fit = FitWhole(base, images, prompts, section, SIDE["flux"])
    fit.save(train(fit, section, work, report=_tell), base / "transformer")


def flux_parts() -> dict[str, Any]:
    """Fresh parts of a small `FluxPipeline`; its CLIP is the starter's text encoder, its T5 is fresh."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    clip = CLIPTextModel.from_pretrained(STARTER / "text_encoder", local_files_only=True).float()
    skins, sizes = (None, *taxonomy.SKIN_TYPES), (None, *taxonomy.LESION_SIZES)
    prompts = [said(skin, size, by_type) for skin in skins for size in sizes for by_type in (False, True)]
    blank = Tokenizer(models.Unigram([("<unk>", 0.0)], unk_id=0))
    blank.pre_tokenizer = pre_tokenizers.Metaspace()
    words = sorted({word for prompt in prompts for word, _ in blank.pre_tokenizer.pre_tokenize_str(prompt)})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *((word, -1.0) for word in words)]
    t5 = T5Config(
        vocab_size=len(pieces), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return {
        "transformer": FluxTransformer2DModel(
            patch_size=1, in_channels=32, num_layers=2, num_single_layers=4, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=clip.config.hidden_size,
            axes_dims_rope=(8, 12, 12), guidance_embeds=False,
        ),
        "vae": AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(32, 32), layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
            mid_block_add_attention=False,
        ),
        "text_encoder": clip.eval(), "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(STARTER / "tokenizer", local_files_only=True),
        "tokenizer_2": T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
    }  # fmt: skip


def flux_section(steps: int, rate: float) -> LoraSection:
    return LoraSection(
        family="flux", steps=steps, batch_size=32, learning_rate=rate, rank=64, warmup_steps=50, schedule="cosine",
        ema_decay=0.995, checkpoint_every=100,
        flux=FluxSection(
            preset="dermaflux_released", scales=[SIDE["flux"]], max_sequence_length=LENGTH, base_dtype="float32",
            gradient_checkpointing=False,
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- measuring


def measured(row: dict[str, Any]) -> dict[str, float]:
    """What the contrasts are read from; nothing where a sample holds no lesion to measure."""
    rgb = read_png(row["image"]["bytes"])
    try:
        mask = read_mask(row["mask"]["bytes"]) if row.get("mask") else estimate_mask(rgb)
        found = {"relative_diameter": measure(rgb, mask).relative_diameter}
    except ValueError:
        return {}
    skin = skin_lab(rgb, mask)
    return found | ({} if skin is None else {"darkness_of_skin": -float(skin[0])})


def compared(
    weights: Path, adapter: Path | None, family: str, asked: argparse.Namespace, sheet: Path
) -> dict[str, dict[str, Any]]:
    """Each contrast's AUC with its interval and medians; the first samples of each side go to a sheet."""
    section = PlanSection(generator=family, size=SIDE[family], guidance=asked.guidance, num_inference_steps=asked.calls)
    synthesis = SynthesizeSection(keep_rejected="image", num_threads=asked.threads, slots=16)
    stage = SynthesizeSamples(weights, adapter, synthesis, GateSection(), None, family=family)
    rows = sample_rows(
        count=asked.count, section=section, seed=0, diagnosis="nevus", skin_type=None, asymmetry=None, border=None,
        colors=None,
    )  # fmt: skip
    found, shown = {}, []
    for name, looks in CONTRASTS.items():
        if family == "joint" and name.endswith("by_type"):
            continue  # the starter's text encoder has no such words
        sides = [
            stage([row | {"prompt": said(*look), "seed": 1000 + number} for number, row in enumerate(rows)])
            for look in looks
        ]
        read = next(attribute for attribute in ("darkness_of_skin", "relative_diameter") if name.startswith(attribute))
        values = [[seen[read] for row in side if read in (seen := measured(row))] for side in sides]
        area = statistics.auc(np.asarray(values[1]), np.asarray(values[0]))
        found[name] = {
            "prompts": [said(*look) for look in looks],
            "medians": [float(np.median(side)) if side else None for side in values],
            "auc": [round(area.value, 3), round(area.low, 3), round(area.high, 3)],
            "measured": [len(side) for side in values],
        }
        print(name, found[name]["auc"], found[name]["medians"], flush=True)
        shown += sides[0][:4] + sides[1][:4]
    contact_sheet(shown, title=f"{family}: pairs of prompts, one word apart", columns=4).save(sheet)
    return found


def _tell(done: Any) -> None:
    if done.step % 50 == 0:
        print(done.step, round(done.metrics["loss"], 4), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(SIDE), default="joint")
    parser.add_argument("--words", choices=("reversed", "types"), default="reversed", help="flux: of its captions")
    parser.add_argument("--steps", type=int, default=400, help="of the fit that is measured")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="flux: of the fit that is measured")
    parser.add_argument("--base-steps", type=int, default=2000, help="flux: of the base's transformer")
    parser.add_argument("--phantoms", type=int, default=1500)
    parser.add_argument("--count", type=int, default=48, help="samples of each prompt")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--calls", type=int, default=20, help="of the network for a sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/prompt_fit"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    work, family = asked.work / asked.family, asked.family
    work.mkdir(parents=True, exist_ok=True)
    words = asked.words if family == "flux" else "own"
    images, masks, captions, of_skin = phantoms(asked.phantoms, SIDE[family], words)
    started = time.perf_counter()
    fit: Any
    if family == "flux":
        base = flux_base(images, of_skin, work, asked.base_steps)
        section = flux_section(asked.steps, asked.learning_rate)
        fit = FitFluxLora(base, images, captions, section, SIDE[family])
    else:
        base = STARTER
        section = LoraSection(
            steps=asked.steps, batch_size=16, learning_rate=5e-4, rank=32, warmup_steps=30, schedule="cosine",
            ema_decay=0.99, checkpoint_every=50,
        )  # fmt: skip
        fit = FitLora(base, images, masks, captions, section, SIDE[family])
    before = compared(base, None, family, asked, work / "before.png")
    model = train(fit, section, work / f"fit-{asked.steps}", report=_tell)
    adapter = work / f"adapter-{asked.steps}"
    fit.save(model, adapter)
    after = compared(base, adapter, family, asked, work / "after.png")
    result = {
        "family": family, "words": words, "steps": asked.steps, "num_phantoms": len(images), "side_px": SIDE[family],
        "learning_rate": section.learning_rate, "guidance": asked.guidance, "calls": asked.calls,
        "samples_per_prompt": asked.count,
        "before": before, "after": after, "seconds": round(time.perf_counter() - started),
    }  # fmt: skip
    named = family if family == "joint" else f"{family}-{asked.words}"
    (RESULTS / f"prompt_fit-{named}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"sheets in {work}")


if __name__ == "__main__":
    main()
