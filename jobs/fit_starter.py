"""Fits the starter: the small weights that ship with the package, from phantoms alone.

VAE, latents, mask head, U-Net with text encoder, gate. Each stage goes on from its newest checkpoint, so the job can
be stopped and submitted again; two cores want some hours. The logs that the shipped weights were made with are in
factory/starter/logs/.

    python jobs/fit_starter.py --work runs/starter --out factory/starter
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch

from factory import phantom, taxonomy
from factory.fits.gate import FitGate
from factory.fits.joint import FitMaskHead, FitStarter, LatentExamples, encode_pairs, tokens_of
from factory.fits.loop import train
from factory.fits.vae import FitVae
from factory.models.joint import JointDenoiser, build_starter
from factory.models.latents import LatentStats, MaskHead
from factory.models.starter import load_vae
from factory.models.weights import tree_digest
from factory.progress import ProgressLine
from factory.prompts import Attributes, caption_for, prompt_for
from factory.recipe import FitSection, GateFitSection

SIZE = 128
SEED = 1
CAPTION_FORMS = 4  # how a phantom may be captioned: in full, or with less said

VAE = FitSection(
    steps=3600, batch_size=8, learning_rate=2e-3, warmup_steps=100, schedule="cosine", weight_decay=1e-5,
    ema_decay=0.995, checkpoint_every=100,
)  # fmt: skip
VAE_BROAD = VAE.model_copy(update={"steps": 1800, "learning_rate": 1.2e-3, "warmup_steps": 30})
VAE_LOG = VAE_BROAD.model_copy(update={"steps": 3600, "ema_decay": 0.99})
HEAD = FitSection(
    steps=300, batch_size=16, learning_rate=2e-3, warmup_steps=20, schedule="cosine", checkpoint_every=100
)
JOINT = FitSection(
    steps=4500, batch_size=32, learning_rate=6e-4, warmup_steps=100, schedule="cosine", weight_decay=1e-3,
    ema_decay=0.999, checkpoint_every=100,
)  # fmt: skip
GATE = GateFitSection(
    steps=10000, batch_size=16, learning_rate=2e-3, warmup_steps=100, schedule="cosine", weight_decay=1e-3,
    ema_decay=0.998, checkpoint_every=250, phantoms=4000, views=3, estimator_pairs=4800,
)  # fmt: skip
FITS = {"vae": VAE, "vae-broad": VAE_BROAD, "vae-log": VAE_LOG, "head": HEAD, "joint": JOINT, "gate": GATE}


def caption_of(drawn: phantom.Phantom, rng: np.random.Generator) -> str:
    """A caption of a phantom's true looks; sometimes a shorter one, so that every prompt the grammar has is known."""
    skin = taxonomy.SKIN_TYPES[drawn.skin_type - 1]
    form = rng.integers(CAPTION_FORMS)
    if form == 0:
        return prompt_for(drawn.diagnosis, skin)
    looks = Attributes(drawn.asymmetry, drawn.border_irregularity, drawn.colors)
    return caption_for(looks, drawn.diagnosis, skin if form > 1 else None, label_in_prompt=form != 3)


def captions(count: int) -> list[str]:
    rng = np.random.default_rng([SEED, 5])
    return [caption_of(drawn, rng) for drawn in phantom.draw_many(SEED, range(count), 32)]


def base_of(work: Path, vocabulary: list[str]) -> JointDenoiser:
    """The starter before its U-Net is fitted: fitted VAE, statistics and head where they are there already."""
    torch.manual_seed(0)
    denoiser = build_starter(vocabulary, vocab_size=768, vae=load_vae(work / "vae"))
    if (work / "latent_stats.json").exists():
        denoiser.stats = LatentStats.load(work / "latent_stats.json")
    if (work / "mask_head").exists():
        denoiser.mask_head = MaskHead.load(work / "mask_head")
    return denoiser


def fit_vae(work: Path) -> None:
    """First on phantoms as they are, then on phantoms broadened far beyond skin, then for PSNR itself."""
    stages = [
        ("vae", "vae-near", FitVae(SEED)),
        ("vae-broad", "vae-broad", FitVae(SEED + 100, broad=True, start=work / "vae-near")),
        ("vae-log", "vae", FitVae(SEED + 200, broad=True, by_log=True, start=work / "vae-broad")),
    ]
    for fit, out, objective in stages:
        if not (work / out).exists():
            objective.save(train(objective, FITS[fit], work / f"{fit}-fit"), work / out)


def encode(work: Path, count: int) -> list[str]:
    """Latents, masks and captions of `count` phantoms, kept on disk. Returns the captions."""
    stored = work / "captions.json"
    if stored.exists():
        return list(json.loads(stored.read_text()))
    rng, said, line = np.random.default_rng([SEED, 5]), [], ProgressLine("encode", count)

    def pair(index: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = phantom.draw(SEED, index, SIZE)
        said.append(caption_of(drawn, rng))
        line.add({"accepted": 1, "rejected": 0, "failed": 0})
        return drawn.image, drawn.mask

    latents, masks = encode_pairs(base_of(work, captions(2000)), count, pair, SIZE)
    LatentStats.measure(torch.from_numpy(latents[:4000]).float(), whiten_image=True).save(work / "latent_stats.json")
    np.save(work / "latents.npy", latents)
    np.save(work / "masks.npy", masks)
    stored.write_text(json.dumps(said))
    line.end()
    return said


def examples(work: Path, said: list[str], vocabulary: list[str]) -> LatentExamples:
    denoiser = base_of(work, vocabulary)
    latents = np.load(work / "latents.npy")
    for start in range(0, len(latents), 512):  # whitened in place, a block at a time
        block = torch.from_numpy(latents[start : start + 512]).float()
        latents[start : start + 512] = denoiser.stats.whiten(block).half().numpy()
    return LatentExamples(latents, np.load(work / "masks.npy"), tokens_of(denoiser, said))


def fit_head(work: Path, rows: LatentExamples, vocabulary: list[str]) -> None:
    if not (work / "mask_head").exists():
        objective = FitMaskHead(partial(base_of, work, vocabulary), rows)
        objective.save(train(objective, HEAD, work / "head-fit"), work / "mask_head")


def fit_joint(work: Path, rows: LatentExamples, vocabulary: list[str], out: Path) -> None:
    objective = FitStarter(partial(base_of, work, vocabulary), rows)
    objective.save(train(objective, JOINT, work / "joint-fit"), out)


def fit_gate(work: Path, out: Path) -> None:
    objective = FitGate(out, GATE, SIZE)
    objective.save(train(objective, GATE, work / "gate-fit"), out / "gate")


def write_card(work: Path, out: Path, count: int) -> None:
    """What the starter is, and the logs it was made with."""
    (out / "logs").mkdir(exist_ok=True)
    for name in FITS:
        shutil.copy(work / f"{name}-fit" / "metrics.jsonl", out / "logs" / f"{name}.jsonl")
    card = {
        "name": "starter", "licence": "Apache-2.0", "data": f"{count} phantoms, seed {SEED}, {SIZE} px",
        "digest": tree_digest(out), "bytes": sum(f.stat().st_size for f in out.rglob("*.safetensors")),
        "fits": {name: section.model_dump() for name, section in FITS.items()},
    }  # fmt: skip
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/starter"))
    parser.add_argument("--out", type=Path, default=Path("factory/starter"))
    parser.add_argument("--phantoms", type=int, default=10_000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    fit_vae(args.work)
    said = encode(args.work, args.phantoms)
    vocabulary = said[:4000]
    rows = examples(args.work, said, vocabulary)
    fit_head(args.work, rows, vocabulary)
    fit_joint(args.work, rows, vocabulary, args.out)
    fit_gate(args.work, args.out)
    write_card(args.work, args.out, args.phantoms)


if __name__ == "__main__":
    main()
