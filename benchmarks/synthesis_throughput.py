"""Accepted samples per second of our sampler against diffusers' pipeline, which generates everything and then filters.

The peer is `StableDiffusionPipeline` over the same modules of the starter, as it comes: one fixed batch, DDIM, guidance
by twice the batch, every call of every sample; everything is decoded and then judged by the same gate in this process.
Ours refills its slots, rejects at checkpoints, and decodes what is accepted. Both draw the same samples from the same
noise at the same batch, in float32, with prompts embedded before at one length; they take turns, a batch of the peer
and then as many results of each of ours, so that what else the machine does falls on all alike.

Samples are rejected by the real gate: `checkpoint_choice.py` has moved one threshold, `min_iou` or `min_area`, on
samples of its own to where the full gate rejects the asked share, and chosen the checkpoints and their slack there. A
lesion's size shows early, the overlap late. Beside them the same sampler with a gate that decides by a hash of the id
after call 6 and costs nothing, at the same shares: what the engine alone reaches.

    bound = (1 + d) / ((1 - p) + p f + (1 - p) d)

p: the share that the full gate rejects; f: the share of calls that a rejected sample still pays; d: a decode over a
whole denoise. All three are measured in the run. `ratio` is of whole runs, the last samples' idle rows included, and
by CPU seconds too, which other processes disturb less. Intervals are a bootstrap over turns: of the machine's noise,
for the samples that these are.

    python benchmarks/synthesis_throughput.py --samples 320        # 20 minutes on a quiet core
    python benchmarks/synthesis_throughput.py --samples 16         # a trial of a minute
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from phantom_plan import jobs_of, planned
from torch import Tensor

from factory.models.families import load_denoiser
from factory.models.sampler import Sampled, SampleJob, Sampler, Verdict, initial_noise
from factory.models.weights import STARTER
from factory.quality.statistics import bootstrap
from factory.recipe import GateSection
from factory.records import ACCEPTED
from factory.stages.score import LocalGate, ScoreSamples

ROOT = Path(__file__).resolve().parent
RESULT, CHOICE = ROOT / "results" / "synthesis_throughput.json", ROOT / "results" / "checkpoint_choice.json"
GATES = ("min_iou 0.35", "min_iou 0.7", "min_area 0.35", "min_area 0.7")
HASHED = {"hash 0.35": 0.35, "hash 0.7": 0.7}
HASH_CHECKPOINT = 0.3
GOALS = {"0.35": 1.15, "0.7": 1.4}
SHARE_OF_BOUND = 0.95
SIZE = 128

sys.path.insert(0, str(ROOT.parent / "tests" / "models"))
from costless import GateByName  # type: ignore[import-not-found] # noqa: E402


@dataclass
class Spent:
    """Wall and CPU seconds of each turn, and what was done in it (rows of the network)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, since: tuple[float, float], rows: int = 0) -> None:
        self.wall.append(time.perf_counter() - since[0])
        self.cpu.append(time.process_time() - since[1])
        self.rows.append(rows)


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class Peer:
    """The plain pipeline: a batch at a time, in three parts that are timed apart."""

    def __init__(self, denoiser: Any, gates: dict[str, Any]) -> None:
        self.denoiser, self.gates = denoiser, gates
        self.pipeline = StableDiffusionPipeline(
            vae=denoiser.vae, unet=denoiser.unet, text_encoder=denoiser.text_encoder, tokenizer=denoiser.tokenizer,
            scheduler=denoiser.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)
        self.empty = denoiser.condition([""])
        self.denoise, self.decode, self.gate = Spent(), Spent(), Spent()
        self.verdicts: dict[str, dict[str, Verdict]] = {name: {} for name in gates}
        self.latents: dict[str, Tensor] = {}

    @torch.no_grad()
    def draw(self, jobs: Sequence[SampleJob]) -> None:
        """One batch; the gate is paid once, whatever thresholds its scores are then held against."""
        steps, guidance = jobs[0].num_inference_steps, jobs[0].guidance
        shape, started = self.denoiser.latent_shape(SIZE, SIZE), clock()
        latents = self.pipeline(
            prompt_embeds=torch.stack([job.condition for job in jobs]),
            negative_prompt_embeds=self.empty.expand(len(jobs), -1, -1),
            latents=torch.stack([initial_noise(job.seed, shape) for job in jobs]),
            guidance_scale=guidance, num_inference_steps=steps, output_type="latent",
        ).images  # fmt: skip
        self.denoise.add(started, len(jobs) * steps)
        started = clock()
        _, masks = self.denoiser.decode(latents)
        self.decode.add(started)
        ids = [job.sample_id for job in jobs]
        for number, (name, gate) in enumerate(self.gates.items()):
            started = clock()
            found = gate.result(gate.submit(ids, self.denoiser.image_latents(latents), masks, "final"))
            if number == 0:
                self.gate.add(started)
            self.verdicts[name] |= dict(zip(ids, found, strict=True))
        self.latents |= dict(zip(ids, latents, strict=True))

    def seconds(self, kind: str, gated: bool) -> np.ndarray:
        parts = [self.denoise, self.decode, *([self.gate] if gated else [])]
        return np.sum([getattr(part, kind) for part in parts], axis=0)


class Ours:
    """A sampler that is asked for so many results a turn and stands still between turns."""

    def __init__(self, denoiser: Any, gate: Any, checkpoints: Sequence[float], jobs: Sequence[SampleJob], slots: int):
        self.sampler = Sampler(
            denoiser, width=SIZE, height=SIZE, slots=slots, gate=gate, checkpoints=checkpoints, decode="accepted"
        )
        self.run: Iterator[Sampled] = self.sampler.run(jobs)
        self.spent, self.found = Spent(), list[Sampled]()

    def turn(self, results: int | None) -> None:
        """Draw until so many more samples have ended, or all with None."""
        before, started = self.sampler.counters.rows_run, clock()
        for sampled in self.run:
            self.found.append(sampled)
            if results is not None and (results := results - 1) == 0:
                break
        self.spent.add(started, self.sampler.counters.rows_run - before)

    def rejected(self, steps: int) -> tuple[float, float]:
        """The share that it rejected, and the share of calls that a rejected sample paid."""
        refused = [sampled.calls_run / steps for sampled in self.found if not accepted(sampled.verdict)]
        return len(refused) / len(self.found), float(np.mean(refused)) if refused else 1.0


def accepted(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.outcome == ACCEPTED


def compared(peer: Peer, ours: Ours, verdicts: dict[str, Verdict], steps: int, gated: bool) -> dict[str, Any]:
    """One arm beside the peer. `verdicts` are those that the peer's samples got."""
    wanted = {name for name, verdict in verdicts.items() if accepted(verdict)}
    kept = {sampled.sample_id for sampled in ours.found if accepted(sampled.verdict)}
    p = 1 - len(wanted) / len(verdicts)
    rejected, f = ours.rejected(steps)
    d = sum(peer.decode.cpu) / sum(peer.denoise.cpu)
    bound = (1 + d) / ((1 - p) + p * f + (1 - p) * d)
    per_row = [len(wanted) / sum(peer.denoise.rows), len(kept) / sum(ours.spent.rows)]

    def ratio(peers: np.ndarray, peer_rows: np.ndarray, own: np.ndarray, own_rows: np.ndarray) -> float:
        return float(per_row[1] * own_rows.sum() / own.sum() / (per_row[0] * peer_rows.sum() / peers.sum()))

    found: dict[str, Any] = {"p": p, "f": f, "d": d, "bound": bound}
    turns = min(len(peer.denoise.rows), len(ours.spent.rows))
    for kind in ("wall", "cpu"):
        arrays = [
            gathered(values, turns)
            for values in (
                peer.seconds(kind, gated), peer.denoise.rows, getattr(ours.spent, kind), ours.spent.rows,
            )
        ]  # fmt: skip
        found[f"ratio_{kind}"] = list(bootstrap(ratio, np.arange(turns), *arrays)[:3])
        found[f"share_of_bound_{kind}"] = [value / bound for value in found[f"ratio_{kind}"]]
    counters = ours.sampler.counters
    return found | {
        "occupancy": counters.occupancy, "share_of_bound_cpu_if_slots_stayed_full":
        found["share_of_bound_cpu"][0] / counters.occupancy, "rejected_by_ours": rejected,
        "accepted": len(kept), "accepted_by_peer": len(wanted), "lost": len(wanted - kept), "new": len(kept - wanted),
        "stopped_early": counters.stopped_early, "decoded": counters.decoded,
        "accepted_per_s": len(kept) / sum(ours.spent.wall),
        "accepted_per_s_of_peer": len(wanted) / float(peer.seconds("wall", gated).sum()),
    }  # fmt: skip


def gathered(values: Sequence[float] | np.ndarray, turns: int) -> np.ndarray:
    """The values by turn; what comes after the last turn belongs to it."""
    array = np.asarray(values, np.float64)
    return np.append(array[: turns - 1], array[turns - 1 :].sum())


def measure(samples: int, slots: int, steps: int, choice: dict[str, Any]) -> dict[str, Any]:
    denoiser = load_denoiser(STARTER)
    score = ScoreSamples(STARTER / "gate", denoiser.vae_digest, GateSection(), torch.get_num_threads())
    jobs = jobs_of(denoiser, planned("throughput", samples, steps))
    gates = {name: _gate(score, choice["gates"][name]) for name in GATES}
    hashed = {name: GateByName(share) for name, share in HASHED.items()}
    arms = {name: Ours(denoiser, gates[name], choice["gates"][name]["checkpoints"], jobs, slots) for name in GATES}
    arms |= {name: Ours(denoiser, hashed[name], (HASH_CHECKPOINT,), jobs, slots) for name in HASHED}
    peer = Peer(denoiser, gates)
    Peer(denoiser, gates).draw(jobs[:slots])  # the first call of each shape is slow
    Ours(denoiser, gates[GATES[0]], (HASH_CHECKPOINT,), jobs[:2], slots).turn(None)
    batches = [jobs[start : start + slots] for start in range(0, samples, slots)]
    for number, batch in enumerate(batches):
        peer.draw(batch)
        for arm in arms.values():
            arm.turn(slots if number + 1 < len(batches) else None)
        print(f"turn {number + 1} of {len(batches)}", file=sys.stderr, flush=True)
    found = {}
    for name, arm in arms.items():
        real = name in GATES
        verdicts = peer.verdicts[name] if real else _hashed(hashed[name], jobs)
        found[name] = compared(peer, arm, verdicts, steps, real)
    return {
        "samples": samples, "slots": slots, "steps": steps, "size": SIZE, "threads": torch.get_num_threads(),
        "gate": {name: choice["gates"][name] for name in GATES},
        "gate_over_denoise": sum(peer.gate.cpu) / sum(peer.denoise.cpu),
        "largest_difference_of_latents": _difference(peer, arms[GATES[0]]), "arms": found,
    }  # fmt: skip


def _gate(score: ScoreSamples, chosen: dict[str, Any]) -> LocalGate:
    """The gate at a share: one segmenter in memory, a policy of its own."""
    judge = copy.copy(score)
    judge.section = GateSection(**chosen["section"])
    return LocalGate(judge)


def _hashed(gate: GateByName, jobs: Sequence[SampleJob]) -> dict[str, Verdict]:
    ids = [job.sample_id for job in jobs]
    return dict(zip(ids, gate.submit(ids, torch.empty(0), None, "final"), strict=True))


def _difference(peer: Peer, ours: Ours) -> float:
    """Of the samples that both drew to the end: the largest of a latent's values, which are of unit variance."""
    both = [sampled for sampled in ours.found if accepted(sampled.verdict)]
    return max((float((sampled.latents - peer.latents[sampled.sample_id]).abs().max()) for sampled in both), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choice", type=Path, default=CHOICE, help="what checkpoint_choice.py wrote")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    result = measure(asked.samples, asked.slots, asked.steps, json.loads(asked.choice.read_text()))
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, arm in result["arms"].items():
        goal = f" (goal: {GOALS[name.split()[1]]})"
        print(
            f"{name}: {arm['ratio_wall'][0]:.3f} of the pipeline by the clock, {arm['ratio_cpu'][0]:.3f} by CPU "
            f"seconds{goal}; bound {arm['bound']:.3f}, {arm['share_of_bound_cpu'][0]:.3f} of it by CPU seconds "
            f"(goal: {SHARE_OF_BOUND}); occupancy {arm['occupancy']:.3f}"
        )


if __name__ == "__main__":
    main()
