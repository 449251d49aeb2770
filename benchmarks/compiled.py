"""What `synthesize.compile` gains: a call of the starter's network at full slots, compiled against as it is.

Both are timed in turns in one process, by its CPU seconds, and the middle of the ratios counts. Compiling is timed in
three further processes: the first has an empty cache, as a new machine has, the second has what the first left there,
and the third an empty one again: it must draw the same bytes as the first. `most_apart` is how far sums that are
rounded in another order lead away after a whole sample, of unit scale.

    python benchmarks/compiled.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from factory.models.families import load_denoiser
from factory.models.sampler import SampleJob, Sampler

ROOT = Path(__file__).resolve().parent
RESULT = ROOT / "results" / "compiled.json"
STARTER = ROOT.parent / "factory" / "starter"
SIDE, CALLS = 128, 20


def loaded(threads: int, compiled: bool) -> Any:
    torch.set_num_threads(threads)
    denoiser = load_denoiser(STARTER)
    if compiled:
        denoiser.compile()
    return denoiser


def call(denoiser: Any, slots: int) -> float:
    """CPU seconds of one call."""
    torch.manual_seed(0)
    latents, timesteps = torch.randn(slots, *denoiser.latent_shape(SIDE, SIDE)), torch.full((slots,), 500)
    condition, free = denoiser.condition(["a nevus"] * slots), denoiser.condition([""])
    started = time.process_time()
    denoiser.predict(latents, timesteps, condition, torch.full((slots,), 2.0), free)
    return time.process_time() - started


def drawn(denoiser: Any, slots: int) -> torch.Tensor:
    """The latents (slots, C, h, w) of as many samples as there are slots."""
    condition = denoiser.condition(["a melanoma"])[0]
    jobs = [SampleJob(f"{k:03}", k, condition, 2.0, CALLS) for k in range(slots)]
    sampler = Sampler(denoiser, width=SIDE, height=SIDE, slots=slots, decode="none")
    return torch.stack([done.latents for done in sorted(sampler.run(jobs), key=lambda done: done.sample_id)])


def compile_only(slots: int, threads: int) -> None:
    """Prints how long the first call takes, and the digest of what is drawn."""
    import hashlib

    denoiser, started = loaded(threads, compiled=True), time.monotonic()
    call(denoiser, slots)
    seconds = time.monotonic() - started
    print(json.dumps([seconds, hashlib.sha256(drawn(denoiser, slots).numpy().tobytes()).hexdigest()]))


def compiling(slots: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        run = [sys.executable, __file__, "--slots", str(slots), "--threads", str(threads), "--compile-only"]
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        found = [
            json.loads(subprocess.run(run, env=env, capture_output=True, check=True, text=True).stdout.splitlines()[-1])
            for _ in range(2)
        ]
    with tempfile.TemporaryDirectory() as another:
        alone = subprocess.run(
            run, env=env | {"TORCHINDUCTOR_CACHE_DIR": another}, capture_output=True, check=True, text=True
        )
    (cold, one), (warm, _) = found
    other = json.loads(alone.stdout.splitlines()[-1])[1]
    return {"seconds_cold": round(cold, 1), "seconds_warm": round(warm, 1), "same_bytes_in_both": one == other}


def measure(slots: int, threads: int, rounds: int) -> dict[str, Any]:
    plain, compiled = (loaded(threads, compiled=kind) for kind in (False, True))
    for denoiser in (plain, compiled):
        call(denoiser, slots)
    spent = [(call(plain, slots), call(compiled, slots)) for _ in range(rounds)]
    ratios = sorted(one / other for one, other in spent)
    apart = float((drawn(plain, slots) - drawn(compiled, slots)).abs().max())
    return {
        "slots": slots, "threads": threads, "rounds": rounds, "times_as_fast": round(median(ratios), 3),
        "of_rounds": [round(ratios[0], 3), round(ratios[-1], 3)],
        "call_cpu_s": [round(median(times), 4) for times in zip(*spent, strict=True)],
        "most_apart": apart, **compiling(slots, threads),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--compile-only", action="store_true", help="one process of those that time compiling")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    if asked.compile_only:
        return compile_only(asked.slots, asked.threads)
    result = {"torch": torch.__version__, **measure(asked.slots, asked.threads, asked.rounds)}
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
