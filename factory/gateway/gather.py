"""Requests that come within a few milliseconds share one call of the gate; under load batches grow by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from factory.gateway.pair import Pair


@dataclass(frozen=True)
class Judged:
    """The gate's answer on one pair, all by one version of the policy."""

    verdict: str
    reason: str | None
    iou: float | None
    theta: float
    scores: dict[str, float | None]
    found: np.ndarray  # (h, w) bool: the lesion that the segmenter sees
    model: dict[str, str]  # digests of VAE, gate and policy


Judge = Callable[[Sequence[Pair]], Awaitable[list[Judged]]]


class Gather:
    """Calls `judge` with what arrived within `wait_s`, at most `max_batch` pairs, at most `max_calls` at once.

    A caller that gives up leaves its neighbours' call as it is.
    """

    def __init__(self, judge: Judge, wait_s: float, max_batch: int, max_calls: int) -> None:
        self._judge, self._wait_s, self._max_batch = judge, wait_s, max_batch
        self._calls = asyncio.Semaphore(max_calls)
        self._waiting: list[tuple[Pair, asyncio.Future[Judged]]] = []
        self._full = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.sizes: Callable[[int], None] = lambda size: None  # told each call's size

    async def __call__(self, pair: Pair) -> Judged:
        answer: asyncio.Future[Judged] = asyncio.get_running_loop().create_future()
        self._waiting.append((pair, answer))
        if len(self._waiting) % self._max_batch == 1 or self._max_batch == 1:
            task = asyncio.create_task(self._call())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if len(self._waiting) >= self._max_batch:
            self._full.set()
        return await answer

    async def _call(self) -> None:
        if len(self._waiting) < self._max_batch:
            try:
                async with asyncio.timeout(self._wait_s):
                    await self._full.wait()
            except TimeoutError:
                pass
        async with self._calls:
            while self._waiting:
                batch, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
                if len(self._waiting) < self._max_batch:
                    self._full.clear()
                wanted = [(pair, answer) for pair, answer in batch if not answer.done()]
                if wanted:
                    await self._answer(wanted)

    async def _answer(self, batch: list[tuple[Pair, asyncio.Future[Judged]]]) -> None:
        self.sizes(len(batch))
        try:
            found = await self._judge([pair for pair, _ in batch])
            for (_, answer), judged in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(judged)
        except Exception as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
