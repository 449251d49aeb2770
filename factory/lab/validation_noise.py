"""From how much noise a gate can still tell good masks from bad ones: DiffAug validates at t = 200 of 1,000 alone.

Pairs with planted faults are noised to one level, the network is asked once, and its clean estimate (Eq. 11) goes to
the gate. Levels are log signal-to-noise ratios, for a t means another level in every family: t = 200 of Stable
Diffusion's schedule is 1.12, which on a flow's scale is 0.364 and not 0.2; beside each level stands what it is in the
network's own. Two roads lead to a verdict: the estimate's latents as they are, and the picture that they decode to,
encoded again.

Each level is one file under lab/validation_noise, named by a digest of all that decides it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factory import phantom, records
from factory.lab.intervals import proportion
from factory.models.denoiser import Denoiser, InContext, log_snr
from factory.models.sampler import initial_noise
from factory.quality.faults import MARGIN, MIX, Planted, cases_of, plant
from factory.quality.statistics import auc
from factory.records import ACCEPTED
from factory.stages.score import ScoreSamples
from factory.storage import Store

CELLS, SUMMARY = "lab/validation_noise", "lab/validation_noise.json"
SEED, BATCH = 1499, 8
VERSION = 1  # part of every digest; raised when the code changes what a cell would hold
ROADS = ("latents", "pixels")


@dataclass(frozen=True)
class Level:
    """timestep: on the network's own scale; alpha_bar: as `clean_estimate` names it; log_snr: what it comes to, which
    is the nearest that the schedule has to what was asked."""

    timestep: float
    alpha_bar: float
    log_snr: float


def level_of(denoiser: Denoiser, wanted: float) -> Level:
    """The level of a network whose log signal-to-noise ratio is nearest to `wanted`."""
    levels = denoiser.alphas_cumprod.double().cpu()
    if denoiser.prediction_type == "flow":
        share = float(1 / (1 + np.exp(wanted / 2)))
        return Level(share * len(levels), share, wanted)
    ratios = log_snr(denoiser.prediction_type, levels)
    nearest = int((ratios - wanted).abs().argmin())
    return Level(float(nearest), float(levels[nearest]), float(ratios[nearest]))


def validation_noise(
    store: Store,
    denoiser: Denoiser,
    score: ScoreSamples,
    log_snrs: Sequence[float],
    count: int,
    size: int,
    *,
    gate_digest: str,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every level in turn, cells that are there again used; written to lab/. A ValueError for a generator whose samples
    have no mask of their own, which a gate has nothing to compare with."""
    if denoiser.mask_source not in ("joint", "planned"):
        raise ValueError(
            f"plan.generator must draw masks or into them, got {denoiser.family}, whose samples are judged by what is "
            "found alone; choose joint or inpaint."
        )
    cases = cases_of(MIX, SEED, count)
    pairs = [plant(SEED, k, *case, size, MARGIN, phantom.DEFAULT) for k, case in enumerate(cases)]
    rows = []
    for wanted in sorted(log_snrs, reverse=True):
        level = level_of(denoiser, wanted)
        named = [VERSION, denoiser.digest, gate_digest, score.section.model_dump_json(), level.timestep, count, size]
        path = f"{CELLS}/{records.digest(*named)[:16]}.json"
        if not store.exists(path):
            found = _measured(denoiser, score, pairs, level)
            store.put_if_absent(path, (json.dumps(found, indent=2, sort_keys=True) + "\n").encode())
        rows.append(json.loads(store.read(path)))
        progress(_sentence(rows[-1]))
    result = {
        "rows": rows, "generator": denoiser.family, "prediction_type": denoiser.prediction_type, "pairs": count,
        "size": size, "gate": score.section.model_dump(),
    }  # fmt: skip
    store.replace(SUMMARY, (json.dumps(result, indent=2, sort_keys=True) + "\n").encode())
    return result


@torch.inference_mode()
def _measured(denoiser: Denoiser, score: ScoreSamples, pairs: Sequence[Planted], level: Level) -> dict[str, Any]:
    stated: dict[str, list[float]] = {road: [] for road in ROADS}
    accepted: dict[str, list[bool]] = {road: [] for road in ROADS}
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        images = torch.from_numpy(np.stack([pair.image for pair in part])).permute(0, 3, 1, 2).float() / 127.5 - 1
        masks = torch.from_numpy(np.stack([pair.mask for pair in part]))[:, None].float()
        estimate = _estimate(denoiser, images, masks, level, start)
        decoded = denoiser.decode(estimate)[0]
        roads = zip(ROADS, (estimate, denoiser.encode(decoded, masks)), strict=True)
        for road, latents in roads:
            judged = score(denoiser.image_latents(latents).float().numpy(), masks[:, 0].numpy() > 0.5)
            stated[road] += [row["scores"]["iou"] for row in judged]
            accepted[road] += [row["outcome"] == ACCEPTED for row in judged]
    good = np.array([pair.good for pair in pairs])
    same = int(np.equal(accepted["latents"], accepted["pixels"]).sum())
    return {
        "log_snr": level.log_snr, "timestep": level.timestep, "level": level.alpha_bar,
        **{road: _rates(good, np.array(stated[road]), np.array(accepted[road])) for road in ROADS},
        "same_verdict": proportion(same, len(pairs)),
    }  # fmt: skip


def _estimate(denoiser: Denoiser, images: Tensor, masks: Tensor, level: Level, first: int) -> Tensor:
    """The clean estimate of one call, unguided and without a prompt, (B, C, h, w)."""
    clean = denoiser.encode(images, masks)
    noise = torch.stack([initial_noise(SEED + first + k, tuple(clean.shape[1:])) for k in range(len(clean))])
    flow, share = denoiser.prediction_type == "flow", level.alpha_bar
    signal, spread = (1 - share, share) if flow else (share**0.5, (1 - share) ** 0.5)
    timesteps = torch.full((len(clean),), level.timestep).to(torch.float32 if flow else torch.long)
    nothing = denoiser.condition([""])
    noisy, more = signal * clean + spread * noise, {}
    if isinstance(denoiser, InContext):
        more = {"context": denoiser.context(images, masks)}
    condition, guidance = nothing.expand(len(clean), -1, -1), torch.ones(len(clean))
    found = denoiser.predict(noisy, timesteps, condition, guidance, nothing, **more)
    return denoiser.clean(noisy, timesteps, found.conditional)


def _rates(good: np.ndarray, stated: np.ndarray, accepted: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(stated)
    above, below = stated[good & known], stated[~good & known]
    ranked = auc(above, below)[:3] if len(above) and len(below) else (np.nan,) * 3
    return {
        "precision": proportion(int((good & accepted).sum()), int(accepted.sum())),
        "recall": proportion(int((good & accepted).sum()), int(good.sum())),
        "auc": [float(value) if np.isfinite(value) else None for value in ranked],
    }


def _sentence(row: dict[str, Any]) -> str:
    said = []
    for road in ROADS:
        shares = [row[road][name]["value"] for name in ("precision", "recall")]
        precision, recall = ("-" if share is None else f"{share:.3f}" for share in shares)
        ranked = "-" if row[road]["auc"][0] is None else f"{row[road]['auc'][0]:.3f}"
        said.append(f"{road} AUC {ranked}, precision {precision}, recall {recall}")
    return (
        f"log SNR {row['log_snr']:6.2f} (t {row['timestep']:.0f}): {'; '.join(said)}; the same verdict in "
        f"{row['same_verdict']['value']:.1%}"
    )
