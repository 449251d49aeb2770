"""What an early estimate can tell of the final verdict, and so after which calls the gate should look at it.

Samples of the starter, asked for the looks of phantoms, are drawn to the end ungated; the gate scores the clean
estimate after each tenth of the calls and the finished latents. From these scores every policy can be replayed: the
full gate at its default, and with one of its thresholds moved to where it rejects 0.35 and 0.7 of these samples, by
`min_iou` (there no shift is forgiven, or small lesions would never be rejected) or by `min_area`.

For each set of checkpoints and each slack (how far below the threshold an early overlap may be; below zero: how far
above it must be) the least slack is chosen at which no more than 1% of what the full gate accepts is lost, by the
upper 95% limit (Clopper and Pearson, one-sided), which 299 accepted samples of which none is lost just reach.
`limit_reached` says whether these are enough; where they are not, the least slack at which none is lost stands. An
early area may be a tenth below `min_area` (`gate.checkpoint_area_slack`). Sets are compared by `net_saved`: the calls
that they save, less what looking costs, in the same unit (`look_cost`: a mask and a judgement over a whole denoise). A
choice made on one half of the samples is tried on the other (`held_out`).

    python benchmarks/checkpoint_choice.py --samples 1200      # half an hour on a quiet core
    python benchmarks/checkpoint_choice.py --samples 40        # a trial of a minute
    python benchmarks/checkpoint_choice.py --scores FILE       # the choice again, from the scores of a run before
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from phantom_plan import jobs_of, planned
from scipy import stats

from factory.models.families import load_denoiser
from factory.models.sampler import Sampler, checkpoint_calls, in_fixed_shape, rows_at_once
from factory.models.weights import STARTER
from factory.quality.policy import decide
from factory.quality.statistics import auc
from factory.recipe import GateSection
from factory.records import ACCEPTED
from factory.stages.score import LocalGate, ScoreSamples

RESULT = Path(__file__).resolve().parent / "results" / "checkpoint_choice.json"
CHECKPOINTS = tuple(round(0.1 * number, 1) for number in range(1, 10))
SLACKS = tuple(round(0.01 * number, 2) for number in range(-10, 41))
GATES = {f"{rule} {share}": (rule, share) for rule in ("min_iou", "min_area") for share in (0.35, 0.7)}
LOST = 0.01
MOST_CHECKPOINTS = 3
SIZE, SLOTS = 128, 16

Scores = dict[str, float | None]
Flags = NDArray[np.bool_]


class Drawn(NamedTuple):
    """Scores of N samples: of the finished one, and by checkpoint of the early estimate."""

    final: list[Scores]
    early: dict[float, list[Scores]]

    def rows(self, chosen: NDArray[np.intp]) -> Drawn:
        return Drawn([self.final[i] for i in chosen], {c: [v[i] for i in chosen] for c, v in self.early.items()})


def cost_of_a_look(denoiser: Any, gate: LocalGate, steps: int, rows: int = 8, rounds: int = 5) -> float:
    """A mask and a judgement of a sample over its whole denoise, in CPU seconds: the least of some rounds each."""
    latents, condition = torch.randn(rows, *denoiser.latent_shape(SIZE, SIZE)), denoiser.condition([""])
    times, guidance = torch.full((rows,), 500), torch.full((rows,), 2.0)

    def predict() -> None:
        denoiser.predict(latents, times, condition.expand(rows, -1, -1), guidance, condition)

    def look() -> None:
        masks = in_fixed_shape(denoiser.mask, latents, rows_at_once(*latents.shape[2:]))
        gate.submit([""] * rows, denoiser.image_latents(latents), masks, "checkpoint")

    def seconds(call: Callable[[], None]) -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    return min(seconds(look) for _ in range(rounds)) / (steps * min(seconds(predict) for _ in range(rounds)))


def drawn(denoiser: Any, gate: LocalGate, samples: int, steps: int) -> tuple[Drawn, float]:
    """Samples drawn to the end with every early score, and CPU seconds a sample."""
    known = [share for share in CHECKPOINTS if checkpoint_calls([share], steps)]
    sampler = Sampler(
        denoiser, width=SIZE, height=SIZE, slots=SLOTS, gate=gate, checkpoints=known, decode="none"
    )  # fmt: skip
    jobs = jobs_of(denoiser, planned("checkpoint choice", samples, steps), ungated=True)
    started, final, early = time.process_time(), list[Scores](), list[list[Scores]]()
    for sampled in sampler.run(jobs):
        assert sampled.verdict is not None
        final.append(sampled.verdict.scores)
        early.append([verdict.scores for verdict in sampled.early])
        if len(final) % 64 == 0:
            print(f"{len(final)} of {samples}", flush=True)
    by_checkpoint = {share: [scores[number] for scores in early] for number, share in enumerate(known)}
    return Drawn(final, by_checkpoint), (time.process_time() - started) / samples


def verdicts(scores: Sequence[Scores], section: GateSection, stage: str = "final") -> Flags:
    """Which are accepted, (N,)."""
    return np.array([decide(row, section, stage)[0] == ACCEPTED for row in scores])  # type: ignore[arg-type]


def moved(final: Sequence[Scores], rejected: float, rule: str) -> GateSection:
    """The policy with one threshold, `min_iou` or `min_area`, moved until the full gate rejects the asked share."""
    column = {"min_iou": "iou", "min_area": "score_area"}[rule]
    known = {"shift_tolerance": 0.0} if rule == "min_iou" else {}
    for value in np.unique([round(float(row[column] or 0.0), 4) for row in final]):
        found = GateSection().model_copy(update={rule: float(value), **known})
        if 1 - verdicts(final, found).mean() >= rejected:
            break
    return found


def upper_limit(lost: int, accepted: int) -> float:
    """Clopper and Pearson's one-sided upper 95% limit of a share."""
    return 1.0 if lost >= accepted else float(stats.beta.ppf(0.95, lost + 1, accepted - lost))


def net(one: dict[str, Any]) -> float:
    return float(one["net_saved"])


class Replay:
    """One policy over drawn samples: what each checkpoint says at each slack, each worked out once."""

    def __init__(self, found: Drawn, section: GateSection, steps: int, look_cost: float) -> None:
        self.accepted = verdicts(found.final, section)
        self.steps, self.look_cost = steps, look_cost
        self.stopped: dict[tuple[float, float], Flags] = {}
        for slack in SLACKS:
            policy = section.model_copy(update={"checkpoint_slack": slack})
            for share, scores in found.early.items():
                self.stopped[share, slack] = ~verdicts(scores, policy, "checkpoint")

    def outcome(self, checkpoints: Sequence[float], slack: float) -> dict[str, Any]:
        """What a set of checkpoints saves and loses."""
        calls, stopped = np.full(len(self.accepted), self.steps), np.zeros(len(self.accepted), bool)
        looks = 0
        for share in sorted(checkpoints):
            looks += int((~stopped).sum())
            here = self.stopped[share, slack] & ~stopped
            calls[here], stopped = max(1, round(share * self.steps)) + 1, stopped | here
        lost, accepted = int((stopped & self.accepted).sum()), int(self.accepted.sum())
        refused = ~self.accepted | stopped
        return {
            "checkpoints": list(checkpoints), "slack": slack, "lost": lost, "accepted": accepted,
            "lost_upper": upper_limit(lost, accepted),
            "calls_saved": (saved := float(1 - calls.mean() / self.steps)),
            "net_saved": saved - self.look_cost * looks / len(self.accepted),
            "f": float(calls[refused].mean() / self.steps) if refused.any() else 1.0,
        }  # fmt: skip

    def chosen(self, checkpoints: Sequence[float]) -> dict[str, Any]:
        """The least slack that loses no more than may be lost: by the limit, or none, or as few as there is."""
        found = [self.outcome(checkpoints, slack) for slack in SLACKS]
        sure = [one for one in found if one["lost_upper"] <= LOST]
        fewest = min(one["lost"] for one in found)
        best = max(sure or [one for one in found if one["lost"] == fewest], key=net)
        return best | {"limit_reached": bool(sure)}


def best_of(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The set that saves most among those that lose few enough by the limit, else as counted, else of all."""
    sure = [one for one in found if one["limit_reached"]]
    counted = [one for one in found if one["lost"] <= LOST * one["accepted"]]
    return max(sure or counted or found, key=net)


def sets(known: Sequence[float]) -> list[tuple[float, ...]]:
    return [chosen for size in range(1, MOST_CHECKPOINTS + 1) for chosen in itertools.combinations(known, size)]


def told(found: Drawn, accepted: Flags, score: str) -> dict[str, Any]:
    """The chance that an early score of a sample that the full gate accepts is above that of one it rejects."""
    known = {}
    for share, scores in found.early.items():
        values = np.array([row[score] or 0.0 for row in scores])
        if 0 < accepted.sum() < len(accepted):
            known[str(share)] = [round(value, 4) for value in auc(values[accepted], values[~accepted])[:3]]
    return known


def examined(found: Drawn, section: GateSection, steps: int, look_cost: float) -> dict[str, Any]:
    """One policy: what its early scores tell, the best sets of each size, and today's default."""
    whole, halves = Replay(found, section, steps, look_cost), np.array_split(np.arange(len(found.final)), 2)
    first, second = (Replay(found.rows(half), section, steps, look_cost) for half in halves)
    known, best = sorted(found.early), {}
    for size in range(1, MOST_CHECKPOINTS + 1):
        of_size = [whole.chosen(chosen) for chosen in sets(known) if len(chosen) == size]
        if of_size:
            best[str(size)] = best_of(of_size)
    one_half = [first.chosen(chosen) for chosen in sets(known)]
    half = best_of(one_half)
    default = GateSection()
    today = [share for share in default.checkpoints if share in known]
    by_slack = [whole.outcome(today, slack) for slack in (-0.05, 0.0, 0.05, 0.25)] if today else []
    return {
        "rejected": float(1 - whole.accepted.mean()), "section": section.model_dump(),
        "auc": {score: told(found, whole.accepted, score) for score in ("score_latent_iou", "score_area")},
        "single": [whole.chosen([share]) for share in known],
        "best": best,
        "default": whole.outcome(today, default.checkpoint_slack) if today else None,
        "default_at_other_slacks": by_slack,
        "held_out": {"chosen": half, "found": second.outcome(half["checkpoints"], half["slack"])},
    }  # fmt: skip


def gate_of(policy: dict[str, Any]) -> dict[str, Any]:
    """The policy with its best checkpoints, as `synthesis_throughput.py` takes it."""
    best = best_of(list(policy["best"].values()))
    chosen = {"checkpoints": best["checkpoints"], "checkpoint_slack": best["slack"]}
    return {**chosen, "section": policy["section"] | chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scores", type=Path, help="where the scores are kept, or read from if they are there")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    denoiser = load_denoiser(STARTER)
    gate = LocalGate(ScoreSamples(STARTER / "gate", denoiser.vae_digest, GateSection(), asked.threads))
    if asked.scores and asked.scores.exists():
        kept = json.loads(asked.scores.read_text())
        found = Drawn(kept["final"], {float(share): rows for share, rows in kept["early"].items()})
        cost, steps = kept["cpu_s_per_sample"], kept["steps"]
    else:
        (found, cost), steps = drawn(denoiser, gate, asked.samples, asked.steps), asked.steps
        if asked.scores:
            kept = {"steps": steps, "cpu_s_per_sample": cost, "final": found.final, "early": found.early}
            asked.scores.write_text(json.dumps(kept))
    look_cost = cost_of_a_look(denoiser, gate, steps)
    policies = {"default": examined(found, GateSection(), steps, look_cost)}
    for name, (rule, share) in GATES.items():
        policies[name] = examined(found, moved(found.final, share, rule), steps, look_cost)
    result = {
        "samples": len(found.final), "steps": steps, "size": SIZE, "cpu_s_per_sample": cost and round(cost, 3),
        "look_cost": round(look_cost, 4), "lost_at_most": LOST, "policies": policies,
        "gates": {name: gate_of(policies[name]) for name in GATES},
    }  # fmt: skip
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, policy in policies.items():
        print(f"{name}: rejected {policy['rejected']:.3f}; AUC by checkpoint {policy['auc']['score_latent_iou']}")
        for one in (*policy["best"].values(), policy["default"]):
            print("   ", one)


if __name__ == "__main__":
    main()
