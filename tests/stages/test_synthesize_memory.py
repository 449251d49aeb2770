"""What does not fit into memory is drawn again with half the slots, and what does not fit with one slot has failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from factory import records
from factory.models.device_errors import is_out_of_memory
from factory.models.sampler import Sampled
from factory.recipe import GateSection, SynthesizeSection
from factory.stages.synthesize import SynthesizeSamples

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class Crowded(SynthesizeSamples):
    """Has memory for `room` slots; more is refused in the midst of the work, as the allocator at hand would."""

    room, error = 2, torch.OutOfMemoryError("CUDA out of memory.")

    def draw(self, rows: Sequence[dict[str, Any]]) -> Iterator[Sampled]:
        for number, sampled in enumerate(super().draw(rows)):
            if number == 1 and self.slots > self.room:
                raise self.error
            yield sampled


def planned(unit: int, count: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"{unit}-{k}", "unit": unit, "index": k, "prompt": "a nevus", "seed": k, "width": 16,
            "height": 16, "guidance": 2.0, "num_inference_steps": 2, "audit": False, "generator": "joint",
        }
        for k in range(count)
    ]  # fmt: skip


def stage(weights: Any, room: int, error: BaseException, slots: int = 8) -> Crowded:
    made = Crowded(weights.generator, None, SynthesizeSection(slots=slots), GateSection(), None, gpu=False)
    made.room, made.error = room, error
    return made


@pytest.mark.parametrize("error", [Crowded.error, MemoryError(), RuntimeError(CPU)])
def test_a_unit_is_drawn_again_with_half_the_slots_and_later_units_keep_them(
    tiny_weights: Any, error: BaseException
) -> None:
    crowded = stage(tiny_weights, 3, error)
    first, second = crowded(planned(0)), crowded(planned(1))
    assert [row["batch_shape"] for row in first + second] == [2] * 10  # 8 and 4 were too many
    assert {row["outcome"] for row in first + second} == {records.ACCEPTED}
    roomy = SynthesizeSamples(tiny_weights.generator, None, SynthesizeSection(slots=2), GateSection(), None, gpu=False)
    assert roomy(planned(0)) == first  # as if 2 had been asked for from the beginning


def test_what_does_not_fit_with_one_slot_has_failed(tiny_weights: Any) -> None:
    crowded = stage(tiny_weights, 0, MemoryError(), slots=3)
    rows = crowded(planned(0))
    records.rows_to_table("samples", rows)
    assert {(row["outcome"], row["reason"], row["batch_shape"]) for row in rows} == {("failed", "out_of_memory", 1)}
    assert [row["sample_id"] for row in rows] == [f"0-{k}" for k in range(5)] and all("image" not in r for r in rows)
    crowded.room = 1
    assert {row["outcome"] for row in crowded(planned(1))} == {records.ACCEPTED}


def test_any_other_error_is_raised_at_once(tiny_weights: Any) -> None:
    crowded = stage(tiny_weights, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        crowded(planned(0))
    assert crowded.slots == 8 and crowded([]) == []


def test_errors_of_the_real_allocators_are_known() -> None:
    for allocate in (lambda: torch.empty(10**14), lambda: bytearray(10**14)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
