"""What is kept and what it is worth as one thing is varied: DiffAug's experiments on theta and on prompts (2508.17844).

    theta_sweep     the same samples, each theta of the gate in turn: what it accepts, and a network taught with that
    prompt_banks    samples of each prompt bank, under the gate as it was

Each set teaches as `real_synthetic` of `lab/worth.py` does, beside its control of as many steps, and a cell that is
there is not run again: what was stopped goes on, and a set that two sweeps share is fitted once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from factory import records
from factory.lab.intervals import proportion
from factory.lab.lineage import near_copies
from factory.lab.worth import run_worth
from factory.models.sampler import NON_FINITE
from factory.quality.policy import decide
from factory.recipe import GateSection, WorthSection
from factory.storage import Store

THETA, BANKS = "lab/theta_sweep.json", "lab/prompt_banks.json"
SHOWN = (("classify", "auc"), ("segment", "dice"), ("segment", "false_negative_rate_small"))
HOW = (
    "Accepted: of the samples that came to their end, with Wilson intervals. The networks are those of the worth "
    "experiment, on real and accepted synthetic images, tested on real ones; the control repeats the real images for "
    "as many steps. Sets differ in size as the gate makes them."
)

Chosen = NDArray[np.bool_]


def theta_sweep(
    store: Store,
    real: pa.Table,
    samples: pa.Table,
    gate: GateSection,
    thetas: Sequence[float],
    section: WorthSection,
    *,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every theta in turn, for all sizes alike, with the gate's other rules as they are; written to lab/.

    real: corpus rows; samples: with their pixels, rejected ones too. A ValueError where what some theta accepts was not
    kept, or where nothing was drawn to its end.
    """
    made = samples.filter(pc.is_in(samples["outcome"], pa.array([records.ACCEPTED, records.REJECTED])))
    scores = made.select(["iou", *records.SCORES]).to_pylist()
    broken = np.array([reason == NON_FINITE for reason in made["reason"].to_pylist()], dtype=bool)  # nothing scored
    sets = {}
    for theta in thetas:
        flat = gate.model_copy(update={"min_iou": theta, "theta_by_area": [], "shift_tolerance": 0.0})
        accepted = [decide(row, flat)[0] == records.ACCEPTED for row in scores]
        sets[f"{theta:g}"] = np.array(accepted, dtype=bool) & ~broken
    _check_kept(made.filter(pa.array(~broken)), {name: chosen[~broken] for name, chosen in sets.items()})
    copies = near_copies(as_accepted(made), real, image_size=section.image_size)["copies"]
    arms = [(name, made, chosen) for name, chosen in sets.items()]
    result = _measured(store, "theta", real, arms, section, copies, progress) | {"calibrated": gate.calibrated}
    return _written(store, THETA, result, progress)


def prompt_banks(
    store: Store,
    real: pa.Table,
    samples: pa.Table,
    section: WorthSection,
    *,
    copies: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every bank of the plan in turn; written to lab/. A ValueError where the plan had no quota of banks."""
    made = samples.filter(pc.is_in(samples["outcome"], pa.array([records.ACCEPTED, records.REJECTED])))
    banks = sorted({bank for bank in made["bank"].to_pylist() if bank is not None})
    if not banks:
        raise ValueError(
            "samples must be planned with a quota of each prompt bank, got none; plan with --set "
            "'plan.banks=[minimal, standard, extended]' in a run of its own."
        )
    arms = []
    for bank in banks:
        own = made.filter(pc.equal(made["bank"], bank))
        arms.append((bank, own, np.array([outcome == records.ACCEPTED for outcome in own["outcome"].to_pylist()])))
    return _written(store, BANKS, _measured(store, "bank", real, arms, section, copies, progress), progress)


def as_accepted(samples: pa.Table) -> pa.Table:
    """The samples as if a gate had accepted them all."""
    place = samples.schema.get_field_index("outcome")
    return samples.set_column(place, "outcome", pa.array([records.ACCEPTED] * len(samples)))


def _check_kept(made: pa.Table, sets: Mapping[str, Chosen]) -> None:
    structs = made["image"].to_pylist()
    there = np.array([struct is not None and struct["bytes"] is not None for struct in structs], dtype=bool)
    ended = np.array(pc.equal(made["calls_run"], made["num_inference_steps"]).to_pylist(), dtype=bool)
    stopped = int((~ended).sum())
    lost = sum(int((chosen & ~there).sum()) for chosen in sets.values())
    if not len(made) or stopped or lost:
        raise ValueError(
            f"samples must be drawn to their end and kept whatever the gate said, got {len(made)} of which {stopped} "
            "were stopped early and some have no image; make them in a run of its own with --set gate.checkpoints=[] "
            "--set synthesize.keep_rejected=image."
        )


def _measured(
    store: Store,
    varied: str,
    real: pa.Table,
    arms: Sequence[tuple[str, pa.Table, Chosen]],
    section: WorthSection,
    copies: Mapping[str, Sequence[str]] | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    rows = []
    for name, made, chosen in arms:
        row = {"name": name} | _acceptance(made, chosen)
        if chosen.any():
            kept = as_accepted(made.filter(pa.array(chosen)))
            said = _saying(f"{varied} {name}", progress)
            worth = run_worth(store, real, kept, section, copies=copies, progress=said, path=None)
            row |= {"tasks": worth["tasks"], "counts": worth["counts"]}
        rows.append(row)
    return {"varied": varied, "rows": rows, "section": section.model_dump(), "how": HOW}


def _saying(name: str, progress: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: progress(f"{name}: {line}")


def _acceptance(made: pa.Table, chosen: Chosen) -> dict[str, Any]:
    """Of all, of each diagnosis, and of thirds by area."""
    diagnoses = np.array(made["diagnosis"].to_pylist())
    areas = np.array([np.nan if area is None else area for area in made["score_area"].to_pylist()], float)
    order = np.argsort(areas, kind="stable")[: int(np.isfinite(areas).sum())]
    thirds = zip(("small", "medium", "large"), np.array_split(order, 3), strict=True)
    return {
        "accepted": proportion(int(chosen.sum()), len(chosen)),
        "by_diagnosis": {
            str(name): proportion(int(chosen[diagnoses == name].sum()), int((diagnoses == name).sum()))
            for name in sorted({*diagnoses.tolist()})
        },
        "by_size": {name: proportion(int(chosen[part].sum()), len(part)) for name, part in thirds},
    }


def _written(store: Store, path: str, result: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    store.replace(path, (json.dumps(result, indent=2, sort_keys=True) + "\n").encode())
    for line in table_lines(result):
        progress(line)
    return result


def table_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The sweep as a table: what was accepted, and what a network was worth with it and with its control."""
    yield f"{result['varied']:10} accepted            {'  '.join(f'{metric} (control)' for _, metric in SHOWN)}"
    for row in result["rows"]:
        share = row["accepted"]
        cells = [f"{row['name']:10} {share['successes']:4} of {share['trials']:4} {_share(share['value'])}  "]
        for task, metric in SHOWN:
            arms = ((row.get("tasks") or {}).get(task) or {}).get("arms")
            if arms is None:
                cells.append("not measured")
            else:
                taught, control = (_value(arms[arm][metric]) for arm in ("real_synthetic", "real_repeated"))
                cells.append(f"{taught} ({control})")
        yield "  ".join(cells)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:6.1%}"


def _value(found: Mapping[str, Any]) -> str:
    return "-" if found.get("mean") is None else f"{found['mean']:.3f}"
