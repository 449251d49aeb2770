"""The transformers captioner against the bare `generate` loop, images per second at the same batch, in one run.

A tiny random Qwen2-VL on one thread: the model costs little, so what the captioner adds weighs most here. Both sides
read the same images, prepare them with the same processor and decode the same number of tokens; they take turns, and
the better of several rounds counts for each. The captioner is used as the pipeline uses it, by `ask` on a unit.

    python benchmarks/caption_transformers.py --images 96 --batch 8 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factory.models.captioners.protocol import Request
from factory.models.captioners.transformers_vlm import TransformersCaptioner

ROOT = Path(__file__).resolve().parent
RESULT = ROOT / "results" / "caption_transformers.json"
GOAL = 0.9


def bare(captioner: TransformersCaptioner, requests: list[Request], batch: int) -> list[str]:
    """What a script would do: chat template, processor, generate, decode; batches as they come."""
    processor, texts = captioner.processor, []
    for start in range(0, len(requests), batch):
        chunk = requests[start : start + batch]
        said = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.prompt}]}]
            for request in chunk
        ]
        prompts = [processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in said]
        images = [[Image.fromarray(request.image)] for request in chunk]
        inputs = processor(images=images, text=prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(captioner.device)
        with torch.inference_mode():
            made = captioner.model.generate(**inputs, **captioner.generation())
        texts += processor.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory; without one a tiny random Qwen2-VL is made")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        captioner = TransformersCaptioner(asked.model or _tiny(Path(folder)), asked.tokens, asked.batch, device)
        result = measured(captioner, asked.images, asked.batch, asked.rounds) | {"device": device}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["ratio"] >= GOAL else 1)


def measured(captioner: TransformersCaptioner, count: int, batch: int, rounds: int) -> dict[str, Any]:
    """Images per second of both, their ratio, and whether they said the same."""
    rng = np.random.default_rng(0)
    prompts = ["describe the mole " * (1 + k % 4) for k in range(count)]
    requests = [Request(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8), prompt) for prompt in prompts]
    seconds: dict[str, list[float]] = {"bare": [], "captioner": []}
    same = 0.0
    for turn in range(rounds + 1):  # the first warms up and is not counted
        spent_bare, plain = _timed(lambda: bare(captioner, requests, batch))
        spent, answers = _timed(lambda: [answer.text for answer in captioner.ask(requests)])
        same = float(np.mean([a == b for a, b in zip(plain, answers, strict=True)]))
        if turn:
            seconds["bare"].append(spent_bare)
            seconds["captioner"].append(spent)
    rates = {name: count / min(spent) for name, spent in seconds.items()}
    ratios = [b / c for b, c in zip(seconds["bare"], seconds["captioner"], strict=True)]
    return {
        "images": count, "batch": batch, "rounds": rounds, "images_per_s": rates, "same_text": same,
        "ratio": rates["captioner"] / rates["bare"], "median_ratio_of_turns": float(np.median(ratios)),
    }  # fmt: skip


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = call()
    return time.perf_counter() - start, made


def _tiny(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT.parent / "tests" / "models"))
    from tiny_vlm import save_qwen  # type: ignore[import-not-found]

    made: Path = save_qwen(folder / "model")
    return made


if __name__ == "__main__":
    main()
