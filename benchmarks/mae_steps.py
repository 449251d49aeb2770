"""MAE steps per second of our loop against a plain re-implementation of the reference loop at the same size.

The peer is written after He et al.'s pre-training script, in float32: patches embedded, positions added, random masking
by argsort with a gather, class token and transformer blocks on the visible patches, the light decoder on all, the loss
on masked patches, AdamW (0.9, 0.95), clipped gradients, a loss that is read at every step as the script logs it. Its
images are in memory as tensors; each is cropped and flipped by torchvision's transforms in the loop's own process, as a
DataLoader without workers does. Both take turns over rounds; medians over all steps but a round's first.

`wait_share` is the share of a step spent waiting for its rows. The peer's loader holds them decoded. `ours` streams a
sealed table's parts from disk and decodes every row anew, as a corpus that no memory holds; `kept` decodes each once.
Last, a smaller encoder takes the same steps in bfloat16 and in float32: whether the loss stays finite, and equal.

    python benchmarks/mae_steps.py [--size 64] [--batch 32] [--steps 30] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block, PatchEmbed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from factory import phantom, records
from factory.fits.loop import train
from factory.fits.mae import mae_objective
from factory.images import encode_png
from factory.models.mae import sincos_positions
from factory.recipe import MaeSection
from factory.run import Run
from factory.tables import Table

WIDTH, DEPTH, HEADS = 192, 12, 3  # vit_tiny
PATCH, RATIO, DECODER = 8, 0.75, (64, 2, 2)  # width, depth, heads
RATE, DECAY, CLIP = 1.5e-3, 0.05, 1.0
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
GOAL = 1.0


class Reference(nn.Module):
    """The script's model, line for line in its order, of timm's blocks."""

    def __init__(self, size: int) -> None:
        super().__init__()
        side, (width, depth, heads) = size // PATCH, DECODER
        self.patch_embed = PatchEmbed(size, PATCH, 3, WIDTH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        zero = torch.zeros(1, WIDTH)
        self.pos_embed = nn.Parameter(torch.cat([zero, sincos_positions(side, WIDTH)])[None], requires_grad=False)
        self.blocks = nn.ModuleList([Block(WIDTH, HEADS, 4, qkv_bias=True) for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder_embed = nn.Linear(WIDTH, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        zero = torch.zeros(1, width)
        self.decoder_pos = nn.Parameter(torch.cat([zero, sincos_positions(side, width)])[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(width, heads, 4, qkv_bias=True) for _ in range(depth)])
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(width), nn.Linear(width, PATCH**2 * 3)

    def random_masking(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, width = x.shape
        keep = int(length * (1 - RATIO))
        ids_shuffle = torch.argsort(torch.rand(batch, length), dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        kept = torch.gather(x, 1, ids_shuffle[:, :keep].unsqueeze(-1).repeat(1, 1, width))
        mask = torch.ones(batch, length)
        mask[:, :keep] = 0
        return kept, torch.gather(mask, 1, ids_restore), ids_restore

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed[:, 1:]  # (B, L, D)
        x, mask, restore = self.random_masking(x)  # (B, K, D)
        x = torch.cat(((self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        tokens = self.mask_token.repeat(len(x), restore.shape[1] + 1 - x.shape[1], 1)
        whole = torch.cat([x[:, 1:], tokens], dim=1)
        whole = torch.gather(whole, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], whole], dim=1) + self.decoder_pos
        for block in self.decoder_blocks:
            x = block(x)
        predicted = self.decoder_pred(self.decoder_norm(x))[:, 1:]  # (B, L, p*p*3)
        side = images.shape[2] // PATCH
        target = torch.einsum("nchpwq->nhwpqc", images.reshape(len(images), 3, side, PATCH, side, PATCH))
        target = target.reshape(len(images), side**2, PATCH**2 * 3)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        loss = ((predicted - (target - mean) / (variance + 1e-6) ** 0.5) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()


class InMemory(Dataset[Tensor]):
    """Decoded images, cropped and flipped when asked for."""

    def __init__(self, pixels: np.ndarray, count: int) -> None:
        self.pixels, self.count = torch.from_numpy(pixels).permute(0, 3, 1, 2), count
        size = pixels.shape[1]
        self.transform = v2.Compose([
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Tensor:
        found: Tensor = self.transform(self.pixels[row % len(self.pixels)])
        return found


def peer(pixels: np.ndarray, asked: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of it those that were waited for rows."""
    torch.manual_seed(0)
    model = Reference(asked.size).train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    loader = DataLoader(InMemory(pixels, asked.steps * asked.batch), asked.batch, shuffle=True, drop_last=True)
    spent, waited = [], []
    rows, started = iter(loader), time.perf_counter()
    for _ in range(asked.steps):
        images = next(rows)
        waited.append(time.perf_counter() - started)
        loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        loss.item()
        spent.append(time.perf_counter() - started)
        started = time.perf_counter()
    return spent[1:], waited[1:]


PART = 32  # images of a part, of which two windows are held


def table_of(encoded: list[bytes], folder: Path) -> Table:
    """A sealed corpus of these images on disk."""
    corpus = Run(folder).table("corpus")
    for part in range(0, len(encoded), PART):
        rows: list[dict[str, object]] = [
            {"row_id": f"r{part + n}", "split": "train", "outcome": records.ACCEPTED,
             "image": records.image_struct(one, f"{part + n}.png")}
            for n, one in enumerate(encoded[part : part + PART])
        ]  # fmt: skip
        corpus.commit(part // PART, records.rows_to_table("corpus", rows))
    corpus.seal(-(-len(encoded) // PART), {"of": "benchmark"}, {})
    return corpus


def ours(corpus: Table, keep_gib: float, asked: argparse.Namespace) -> tuple[list[float], list[float]]:
    """The same of our loop, which logs every step here."""
    section = MaeSection(
        encoder="vit_tiny_patch16_224", patch_size=PATCH, image_size=asked.size, mask_ratio=RATIO, steps=asked.steps,
        batch_size=asked.batch, decoder_width=DECODER[0], decoder_depth=DECODER[1], learning_rate=RATE,
        weight_decay=DECAY, clip_norm=CLIP, warmup_steps=0, checkpoint_every=asked.steps, keep_gib=keep_gib,
        shuffle_rows=2 * PART,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        train(mae_objective(section, corpus), section, Path(place), log_every=1)
        rows = [json.loads(line) for line in (Path(place) / "metrics.jsonl").read_text().splitlines()]
    return [row["step_s"] for row in rows[1:]], [row["data_wait_s"] for row in rows[1:]]


def precisions(corpus: Table, asked: argparse.Namespace) -> dict[str, float]:
    """The mean loss of the last fifty steps in either precision; a loss that is not finite ends the fit."""
    found: dict[str, float] = {"steps": asked.precision_steps}
    for precision in ("float32", "bfloat16"):
        section = MaeSection(
            encoder="test_vit", patch_size=PATCH, image_size=asked.size, steps=asked.precision_steps, batch_size=16,
            precision=precision, warmup_steps=asked.precision_steps // 10, checkpoint_every=asked.precision_steps,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            train(mae_objective(section, corpus), section, Path(place), log_every=1)
            rows = [json.loads(line) for line in (Path(place) / "metrics.jsonl").read_text().splitlines()]
        found[precision] = statistics.fmean(row["loss"] for row in rows[-50:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision-steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mae_steps.json"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    drawn = [phantom.draw(3, number, asked.size).image for number in range(asked.images)]
    pixels, folder = np.stack(drawn), tempfile.TemporaryDirectory()
    corpus = table_of([encode_png(one) for one in drawn], Path(folder.name) / "run")
    sides: dict[str, Any] = {
        "ours": lambda: ours(corpus, 0.0, asked), "kept": lambda: ours(corpus, 4.0, asked),
        "reference": lambda: peer(pixels, asked),
    }  # fmt: skip
    found: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in sides}
    for turn in range(asked.rounds + 1):
        for name in [*sides, *sides][turn % 3 : turn % 3 + 3]:
            measured = sides[name]()
            if turn:  # the first round warms up
                found[name].append(measured)
    result: dict[str, Any] = {name: getattr(asked, name) for name in ("size", "images", "batch", "steps", "rounds")}
    for name, rounds in found.items():
        steps, waits = ([value for one in rounds for value in one[part]] for part in (0, 1))
        result[name] = {
            "step_s": statistics.median(steps), "wait_s": statistics.median(waits),
            "wait_share": sum(waits) / sum(steps),
            "by_round_s": [round(statistics.median(one[0]), 4) for one in rounds],
        }  # fmt: skip
    result |= {
        "threads": asked.threads, "ratio": result["reference"]["step_s"] / result["ours"]["step_s"], "goal": GOAL,
        "params": {"reference": sum(value.numel() for value in Reference(asked.size).parameters())},
        "precisions": precisions(corpus, asked),
    }  # fmt: skip
    folder.cleanup()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["ratio"] >= GOAL else 1)


if __name__ == "__main__":
    main()
