"""Units drawn one after another without a pause are what they are alone, and the slots stay full between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from factory import records
from factory.images import read_mask, read_png
from factory.models.sampler import Verdict
from factory.quality.edges import MAX_CONTRAST, edge_contrast
from factory.recipe import GateSection, SynthesizeSection
from factory.records import ACCEPTED, REJECTED
from factory.stages import synthesize
from factory.stages.synthesize import SynthesizeSamples

CALLS, ROWS, SLOTS = 4, 5, 4


class ByName:
    """Stops every third sample of a unit after half of its calls."""

    def submit(self, ids: list[str], image_latents: Any, masks: Any, stage: Any) -> list[str]:
        return ids

    def result(self, ticket: list[str]) -> list[Verdict]:
        return [Verdict(REJECTED, "iou") if int(name[-1]) % 3 == 2 else Verdict(ACCEPTED) for name in ticket]


def planned(unit: int, width: int = 16) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"{unit}-{k}", "unit": unit, "index": k, "prompt": f"nevus {k % 2}", "seed": 10 * unit + k,
            "width": width, "height": 16, "guidance": 2.0, "num_inference_steps": CALLS, "audit": False,
            "generator": "joint",
        }
        for k in range(ROWS)
    ]  # fmt: skip


def stage(weights: Any) -> SynthesizeSamples:
    section = SynthesizeSection(slots=SLOTS, num_threads=1)
    return SynthesizeSamples(weights.generator, None, section, GateSection(checkpoints=[0.5]), ByName(), gpu=False)


def occupancy(made: SynthesizeSamples) -> float:
    return made._samplers[16, 16].counters.occupancy


@pytest.mark.parametrize("invariant", [True, False])
def test_units_of_a_stream_are_what_calls_give_and_are_asked_for_as_slots_become_free(
    tiny_weights: Any, monkeypatch: pytest.MonkeyPatch, invariant: bool
) -> None:
    if not invariant:
        monkeypatch.setattr(synthesize, "slot_invariant", lambda *denoiser, **shape: False)
    alone, together, asked = stage(tiny_weights), stage(tiny_weights), list[int]()
    wanted = {unit: alone(planned(unit)) for unit in range(4)}

    def units() -> Iterator[tuple[int, Sequence[dict[str, Any]]]]:
        for unit in range(4):
            asked.append(unit)
            yield unit, planned(unit)

    found = {}
    for unit, drawn in together.stream(units()):
        found[unit] = together.finished(drawn)
        assert len(asked) <= len(found) + 2  # those under way, and one that is looked at beforehand
    assert found == wanted
    assert {row["outcome"] for rows in found.values() for row in rows} == {ACCEPTED, REJECTED}
    assert {row["calls_run"] for rows in found.values() for row in rows} == {CALLS, CALLS // 2 + 1}
    assert (occupancy(together) > occupancy(alone) + 0.1) == invariant


def test_what_is_decoded_is_judged_by_the_contrast_of_its_masks_contour_where_a_bound_is_given(
    tiny_weights: Any,
) -> None:
    rows = [row | {"audit": number == 0} for number, row in enumerate(planned(0, 32))]
    free = stage(tiny_weights)(rows)
    table = records.rows_to_table("samples", free)
    for row, stored in zip(free, table["score_edge_contrast"].to_pylist(), strict=True):
        shown = row.get("image")
        wanted = None if shown is None else edge_contrast(read_png(shown["bytes"]), read_mask(row["mask"]["bytes"]))
        assert row.get("score_edge_contrast") == wanted
        assert stored == (None if wanted is None else pytest.approx(wanted, rel=1e-6))
    assert sum(row.get("score_edge_contrast") is not None for row in free) >= 2

    strict = stage(tiny_weights)
    strict.gate_section = strict.gate_section.model_copy(update={"min_edge_contrast": 2 * MAX_CONTRAST})
    for row, before in zip(strict(rows), free, strict=True):
        assert row.get("score_edge_contrast") == before.get("score_edge_contrast")
        if before.get("score_edge_contrast") is None:
            assert (row["outcome"], row["reason"]) == (before["outcome"], before["reason"])
        else:
            assert (row["outcome"], row["reason"]) == (REJECTED, "faint_edge")
            assert (row["image"] is None) == (not row["audit"])


def test_units_of_another_size_come_after_and_are_probed_for_themselves(
    tiny_weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = []

    def remembers(denoiser: Any, *, width: int, height: int, slots: int) -> bool:
        probed.append((width, height, slots))
        return True

    monkeypatch.setattr(synthesize, "slot_invariant", remembers)
    made = stage(tiny_weights)
    units = [(0, planned(0)), (1, planned(1, 32)), (2, planned(2, 32))]
    assert [unit for unit, _ in made.stream(iter(units))] == [0, 1, 2]
    assert [unit for unit, _ in made.stream(iter([(3, planned(3))]))] == [3]
    assert probed == [(16, 16, SLOTS), (32, 16, SLOTS)]
    made.halve()
    ((_, drawn),) = made.stream(iter([(4, planned(4))]))
    made.slots = SLOTS  # whatever becomes of the stage by then, a row says at what shape it was drawn
    assert {row["batch_shape"] for row in made.finished(drawn)} == {SLOTS // 2}
    assert probed[2:] == [(16, 16, SLOTS // 2)]


def test_a_unit_that_comes_while_others_are_drawn_takes_the_slots_that_are_free(tiny_weights: Any) -> None:
    """The units have none for a while, as a queue that is filled by other threads."""
    made, asked = stage(tiny_weights), list[int]()

    class Late:
        def __iter__(self) -> Late:
            return self

        def __next__(self) -> tuple[int, Sequence[dict[str, Any]]]:
            asked.append(len(asked))
            if len(asked) in (2, 3, 5) or len(asked) > 6:
                raise StopIteration
            return len(asked), planned(len(asked))

    found = [(unit, made.finished(drawn)) for unit, drawn in made.stream(Late())]
    assert [unit for unit, _ in found] == [1, 4, 6]
    assert all(rows == stage(tiny_weights)(planned(unit)) for unit, rows in found)
    assert made._samplers[16, 16].counters.calls < 3 * stage_calls(tiny_weights)


def stage_calls(weights: Any) -> int:
    alone = stage(weights)
    alone(planned(1))
    return alone._samplers[16, 16].counters.calls


def test_a_stream_that_is_left_leaves_nothing_behind(tiny_weights: Any) -> None:
    made = stage(tiny_weights)
    left = made.stream((unit, planned(unit)) for unit in range(3))
    next(left)
    left.close()
    assert made(planned(7)) == stage(tiny_weights)(planned(7))


def test_embedded_prompts_are_kept_for_units_to_come_as_far_as_memory_goes(
    tiny_weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, embedded = stage(tiny_weights), list[list[str]]()
    embed = made.denoiser.condition

    def counted(prompts: list[str]) -> Any:
        embedded.append(prompts)
        return embed(prompts)

    monkeypatch.setattr(made.denoiser, "condition", counted)
    of_one = embed(["nevus 0"])[0].nbytes
    monkeypatch.setattr(synthesize, "KEPT_BYTES", 3 * of_one)
    for prompts in ("ab", "bc", "a", "d", "b", "abcd"):
        rows = [row | {"prompt": prompt} for row, prompt in zip(planned(0), prompts, strict=False)]
        jobs = made.jobs(rows)
        wanted = embed(list(prompts))
        assert all(job.condition.equal(one) for job, one in zip(jobs, wanted, strict=True))
    assert embedded == [["a", "b"], ["c"], ["d"], ["b"], ["c"]]
    assert list(made._conditions) == ["a", "b", "c", "d"]  # a unit's own are there, however many
