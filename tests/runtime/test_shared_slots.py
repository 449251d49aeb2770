"""Threads that wait for units draw for one another; what is drawn alone is drawn while nothing else is under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from factory.progress import Stopped
from factory.runtime.shared_slots import Fallen, SharedSlots


class Slots:
    """Three units at once; each takes as many steps as its work says, and fails if that is none."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.fallen: list[list[int]] = []
        self.most = self.under_way = 0
        self.shared = SharedSlots(self.stream, self.begun.append, lambda units, error: self.fallen.append(units))

    def stream(self, units: Iterator[tuple[int, int]]) -> Iterator[tuple[int, str]]:
        assert self.under_way == 0, "a stream was begun while another one runs"
        slots: list[list[int]] = []
        while True:
            while len(slots) < 3 and (unit := next(units, None)) is not None:
                slots.append(list(unit))
            self.under_way = len(slots)
            self.most = max(self.most, len(slots))
            if not slots:
                return
            for slot in slots:
                slot[1] -= 1
            if any(work < 0 for _, work in slots):
                self.under_way = 0
                raise KeyError("a mistake")
            for slot in [slot for slot in slots if slot[1] == 0]:
                slots.remove(slot)
                yield slot[0], f"unit {slot[0]}"


def test_many_threads_get_their_own_and_share_the_slots() -> None:
    slots = Slots()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda unit: slots.shared.draw(unit, 1 + unit % 5), range(500)))
    assert found == [f"unit {unit}" for unit in range(500)]
    assert sorted(slots.begun) == list(range(500)) and slots.shared.under_way == ()


def test_units_that_wait_fill_the_slots_together() -> None:
    slots = Slots()
    with ThreadPoolExecutor(5) as threads:
        with slots.shared._turn:  # none draws before all wait
            asked = [threads.submit(slots.shared.draw, unit, 2) for unit in range(5)]
            while len(slots.shared._waiting) < 5:
                time.sleep(0.001)
        assert [future.result(timeout=60) for future in asked] == [f"unit {unit}" for unit in range(5)]
    assert slots.most == 3


def test_an_error_ends_those_under_way_and_no_others() -> None:
    slots, told = Slots(), dict[int, str]()

    def asked(unit: int) -> None:
        try:
            told[unit] = slots.shared.draw(unit, 0 if unit % 10 == 3 else 2)
        except Fallen as error:
            told[unit] = repr(error.__cause__)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(asked, range(100)))
    fallen = {unit for unit, what in told.items() if what == "KeyError('a mistake')"}
    assert set(range(3, 100, 10)) <= fallen == {unit for units in slots.fallen for unit in units}
    assert all(told[unit] == f"unit {unit}" for unit in set(range(100)) - fallen) and len(fallen) <= 30


def test_what_is_drawn_alone_is_drawn_while_nothing_is_under_way_and_the_rest_goes_on() -> None:
    slots, seen = Slots(), list[tuple[int, ...]]()

    def alone(unit: int) -> str:
        if unit % 7:
            return slots.shared.draw(unit, 3)
        with slots.shared.alone():
            seen.append((slots.under_way, *slots.shared.under_way))
            return f"unit {unit}"

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(alone, range(210))) == [f"unit {unit}" for unit in range(210)]
    assert seen == [(0,)] * 30


def test_what_stops_a_run_is_raised_as_it_is_and_what_no_unit_is_to_blame_for_too() -> None:
    def stops(units: Iterator[tuple[int, int]]) -> Iterator[tuple[int, str]]:
        next(units)
        raise Stopped("enough")
        yield

    def broken(units: Iterator[tuple[int, int]]) -> Iterator[tuple[int, str]]:
        raise OSError("no weights")
        yield

    nobody = threading.Event()
    with pytest.raises(Stopped, match="enough"):
        SharedSlots(stops, lambda unit: None, lambda units, error: nobody.set()).draw(1, 1)
    with pytest.raises(OSError, match="no weights"):
        SharedSlots(broken, lambda unit: None, lambda units, error: nobody.set()).draw(1, 1)
    assert not nobody.is_set()
