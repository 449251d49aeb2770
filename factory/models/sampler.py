"""The sampler: continuous batching over a fixed number of slots, with the gate in the loop.

Every slot has its own step of its own schedule. A sample that is finished or rejected leaves and the next one takes
its slot, so the accelerator never waits for a batch's last sample. What a sample becomes depends on its job alone:

- noise comes from the job's own seed, on the CPU;
- the network, the mask head and the decoder only ever see one shape each, idle rows padded, and a row's result does
  not depend on its neighbours (`slot_invariant` checks that on the hardware at hand; where it fails, `drain`);
- a checkpoint's verdict takes effect exactly one call after the checkpoint, whenever it arrives.

    call 13      call 14 (checkpoint)              call 15
    --o------------o--> clean estimate -> gate ------o--> verdict applied: rejected samples leave, 15 calls run

Letters: S slots, C latent channels, h and w latent sides, L tokens, D token width, H and W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from factory.models.denoiser import Denoiser, InContext, Prediction
from factory.models.solvers import Schedule, schedule
from factory.records import ACCEPTED, REJECTED

Stage = Literal["checkpoint", "final"]
NON_FINITE = "non_finite"
CELLS_AT_ONCE = 1024  # of latents: beyond it a small network on a CPU gains nothing by more rows, and pays for padding
MOST_DECODED = 4


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one sample: `accepted`, or `rejected` with a reason; scores are facts either way."""

    outcome: str
    reason: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)


class Gate(Protocol):
    """The judge. `submit` should not wait; `result` may. A row's verdict must not depend on the rows beside it."""

    def submit(self, ids: list[str], image_latents: Tensor, masks: Tensor | None, stage: Stage) -> Any:
        """Hand over clean image latents (n, C', h, w) and the mask probabilities (n, 1, H, W) that were sampled with
        them or planned, None for a generator that has neither; get a ticket."""
        ...

    def result(self, ticket: Any) -> list[Verdict]:
        """The n verdicts of a ticket, in order."""
        ...


@dataclass(frozen=True, eq=False)
class SampleJob:
    """One sample to draw. `ungated` ones (the audit share) are judged and never stopped. `unit` only matters where
    the sampler drains between units. `context` is what a denoiser that draws into an image reads beside the latents,
    `mask` where it is to draw, which the gate compares with what it finds. `stop_after` ends it after that many calls,
    as a verdict would, to draw again what was stopped; None runs all of them."""

    sample_id: str
    seed: int
    condition: Tensor  # (L, D)
    guidance: float
    num_inference_steps: int
    ungated: bool = False
    unit: int = 0
    context: Tensor | None = None  # (K, h, w)
    mask: Tensor | None = None  # (1, H, W), planned
    stop_after: int | None = None


@dataclass(frozen=True, eq=False)
class Sampled:
    """What became of a job. `latents` (C, h, w) are the last ones, clean only when every call was run. `verdict` is
    the one that decided (an ungated sample's: the final one), `early` those of its checkpoints. `image` (3, H, W) in
    [-1, 1] and `mask` probability (1, H, W) are there when it was decoded. All on the CPU in float32."""

    sample_id: str
    latents: Tensor
    calls_run: int
    verdict: Verdict | None
    early: tuple[Verdict, ...] = ()
    image: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class Counters:
    """What was spent: network calls at full shape, rows of them that carried a sample, and samples by their end."""

    calls: int = 0
    rows_run: int = 0
    rows_paid: int = 0
    decoded: int = 0
    stopped_early: int = 0

    @property
    def occupancy(self) -> float:
        """Share of the rows paid for that carried a sample."""
        return self.rows_run / self.rows_paid if self.rows_paid else 0.0


@dataclass(eq=False)
class _Slot:
    """A job under way."""

    job: SampleJob
    schedule: Schedule
    checkpoints: frozenset[int]
    calls: int = 0
    early: tuple[Verdict, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether its last call is run."""
        return self.calls == len(self.schedule) or self.calls == self.job.stop_after


class Sampler:
    """Draws jobs of one image size with a fixed batch shape. See the module's docstring."""

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        width: int,
        height: int,
        slots: int,
        gate: Gate | None = None,
        solver: str = "ddim",
        checkpoints: Sequence[float] = (0.7,),
        decode: Literal["accepted", "all", "none"] = "accepted",
        decode_batch: int | None = None,
        drain: bool = False,
        shift: float | None = None,
    ) -> None:
        """`checkpoints` are shares of a job's calls; one whose verdict would come too late to save a call is left
        out. Without a gate nothing is judged and all that is finite is kept. `decode_batch` is also the shape in
        which masks are made for the gate, few rows at a time; None: 4 or what `rows_at_once` says on a CPU, at most
        `slots`.
        `drain` lets slots run empty before another unit begins. `shift` is the denoiser's own at this size unless
        it is given."""
        if slots < 1 or (decode_batch is not None and decode_batch < 1):
            raise ValueError(f"slots and decode_batch must be at least 1, got {slots} and {decode_batch}; raise them.")
        self.denoiser, self.gate, self.solver = denoiser, gate, solver
        self.shift = denoiser.shift(width, height) if shift is None else shift
        self.checkpoints, self.decode, self.drain = tuple(checkpoints), decode, drain
        self.counters = Counters()
        self._schedules: dict[int, Schedule] = {}
        self._unconditional = denoiser.condition([""])  # (1, L, D)
        device = self._unconditional.device
        self._slots: list[_Slot | None] = [None] * slots
        self._latents = torch.zeros(slots, *denoiser.latent_shape(width, height), device=device)  # (S, C, h, w)
        few = rows_at_once(*self._latents.shape[2:]) if device.type == "cpu" else MOST_DECODED
        self.decode_batch = min(few, slots) if decode_batch is None else decode_batch
        self._previous = torch.zeros_like(self._latents)
        self._condition = self._unconditional.repeat(slots, 1, 1)  # (S, L, D)
        self._guidance = torch.ones(slots, device=device)
        self._in_context: InContext | None = denoiser if isinstance(denoiser, InContext) else None
        channels = self._in_context.context_channels if self._in_context else 0
        self._context = self._latents.new_zeros(slots, channels, *self._latents.shape[2:])  # (S, K, h, w)
        self._unit: int | None = None
        self._checking: tuple[Any, list[tuple[int, _Slot]]] | None = None  # the checkpoint ticket of the last step
        self._judged: deque[tuple[Any, list[tuple[_Slot, Tensor]]]] = deque()  # final tickets
        self._to_decode: list[Sampled] = []

    def run(self, jobs: Iterable[SampleJob]) -> Iterator[Sampled]:
        """Draw every job and yield each once, in the order of their ends (not of the jobs)."""
        waiting = _Waiting(iter(jobs))
        try:
            while self._fill(waiting) or self._judged:
                finals = len(self._judged)
                if self._active():
                    yield from self._step()
                for _ in range(finals):  # those that ended before this step: the gate had its time for them
                    yield from self._settle(*self._judged.popleft())
                drained = self.drain and not self._active()
                yield from self._decoded(1 if drained else self.decode_batch)
            yield from self._decoded(1)
        finally:
            self._reset()

    def _reset(self) -> None:
        """Forget what is under way, as when a run is left or fails."""
        for index in self._active():
            self._free(index)
        self._unit, self._checking, self._to_decode = None, None, []
        self._judged.clear()

    def _active(self) -> list[int]:
        return [index for index, slot in enumerate(self._slots) if slot is not None]

    def _fill(self, waiting: _Waiting) -> bool:
        """Give free slots to the next jobs, lowest slot first. True if any slot is busy then."""
        for index, slot in enumerate(self._slots):
            if slot is None and (job := waiting.peek()) is not None:
                if self.drain and job.unit != self._unit and (self._active() or self._judged):
                    break
                self._unit = job.unit
                self._place(index, waiting.take())
        return bool(self._active())

    def _place(self, index: int, job: SampleJob) -> None:
        if (job.context is None) != (self._in_context is None):
            rule, got = ("left out for", "one") if self._in_context is None else ("given to", "none")
            raise ValueError(
                f"context must be {rule} a generator of family {self.denoiser.family}, got {got} in {job.sample_id}; "
                "make the job with its denoiser's `context`, if it has that."
            )
        if job.stop_after is not None and not 1 <= job.stop_after <= job.num_inference_steps:
            raise ValueError(
                f"stop_after must be from 1 to num_inference_steps ({job.num_inference_steps}), got {job.stop_after} "
                f"in {job.sample_id}; leave it out to run every call."
            )
        steps = job.num_inference_steps
        if steps not in self._schedules:
            kind, levels = self.denoiser.prediction_type, self.denoiser.alphas_cumprod.double().cpu().numpy()
            self._schedules[steps] = schedule(kind, levels, steps, self.solver, self.shift)
        self._slots[index] = _Slot(job, self._schedules[steps], checkpoint_calls(self.checkpoints, steps))
        self._latents[index] = initial_noise(job.seed, tuple(self._latents.shape[1:])).to(self._latents.device)
        self._previous[index] = 0.0
        self._condition[index] = job.condition.to(self._condition)
        self._guidance[index] = job.guidance
        if job.context is not None:
            self._context[index] = job.context.to(self._context)

    def _free(self, index: int) -> None:
        """Empty a slot: padding is finite and costs no memory of who was there."""
        self._slots[index] = None
        self._latents[index] = 0.0
        self._previous[index] = 0.0
        self._condition[index] = self._unconditional[0]
        self._guidance[index] = 1.0
        self._context[index] = 0.0

    def _step(self) -> Iterator[Sampled]:
        """One call for all slots; then verdicts of the last step's checkpoints, then new checkpoints, then ends."""
        timesteps, keep, new, old = self._tables()
        prediction = self._predict(timesteps)
        conditional = self.denoiser.clean(self._latents, timesteps, prediction.conditional)
        guided = self.denoiser.clean(self._latents, timesteps, prediction.guided)
        self._latents = keep * self._latents + new * guided + old * self._previous
        self._previous = guided
        self._count()
        yield from self._leave_broken()
        yield from self._apply_checkpoints()
        self._submit_checkpoints(conditional)
        yield from self._finish()

    def _predict(self, timesteps: Tensor) -> Prediction:
        rows = (self._latents, timesteps, self._condition, self._guidance, self._unconditional)
        if self._in_context is None:
            return self.denoiser.predict(*rows)
        return self._in_context.predict(*rows, context=self._context)

    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Timesteps (S,) and the solver's three numbers (S, 1, 1, 1), by slot."""
        idle = (0.0, 1.0, 0.0, 0.0)
        rows = [idle if slot is None else tuple(c[slot.calls] for c in slot.schedule) for slot in self._slots]
        table = torch.tensor(rows, dtype=torch.float64)
        device, flow = self._latents.device, self.denoiser.prediction_type == "flow"
        timesteps = table[:, 0].to(device, torch.float32 if flow else torch.long)
        keep, new, old = table[:, 1:].float().to(device).T.reshape(3, -1, 1, 1, 1)
        return timesteps, keep, new, old

    def _count(self) -> None:
        active = self._active()
        for index in active:
            self._slots[index].calls += 1  # type: ignore[union-attr]
        self.counters.calls += 1
        self.counters.rows_run += len(active)
        self.counters.rows_paid += len(self._slots)

    def _take(self, index: int) -> tuple[_Slot, Tensor]:
        """Empty a slot and return who was there with a copy of its latents."""
        slot, latents = self._slots[index], self._latents[index].clone()
        assert slot is not None
        self._free(index)
        return slot, latents

    def _leave_broken(self) -> Iterator[Sampled]:
        finite = torch.isfinite(self._latents).flatten(1).all(1).tolist()
        for index in self._active():
            if not finite[index]:
                yield from self._stop(index, Verdict(REJECTED, NON_FINITE))

    def _apply_checkpoints(self) -> Iterator[Sampled]:
        """Verdicts that were asked for after the call before this one."""
        if self._checking is None:
            return
        assert self.gate is not None
        (ticket, checked), self._checking = self._checking, None
        for (index, slot), verdict in zip(checked, self.gate.result(ticket), strict=True):
            if self._slots[index] is not slot:  # it broke in between
                continue
            slot.early += (verdict,)
            if verdict.outcome != ACCEPTED and not slot.job.ungated:
                yield from self._stop(index, verdict)

    def _stop(self, index: int, verdict: Verdict) -> Iterator[Sampled]:
        slot, latents = self._take(index)
        self.counters.stopped_early += slot.calls < len(slot.schedule)
        yield Sampled(slot.job.sample_id, latents.cpu(), slot.calls, verdict, slot.early)

    def _submit_checkpoints(self, conditional: Tensor) -> None:
        if self.gate is None:
            return
        due = [(i, s) for i, s in enumerate(self._slots) if s is not None and s.calls in s.checkpoints]
        if due:
            jobs, rows = [slot.job for _, slot in due], [index for index, _ in due]
            self._checking = (self._submit(jobs, conditional[rows], "checkpoint"), due)

    def _submit(self, jobs: list[SampleJob], latents: Tensor, stage: Stage) -> Any:
        assert self.gate is not None
        ids, masks = [job.sample_id for job in jobs], self._masks(jobs, latents)
        return self.gate.submit(ids, self.denoiser.image_latents(latents), masks, stage)

    def _masks(self, jobs: list[SampleJob], latents: Tensor) -> Tensor | None:
        """What the gate compares with what it finds, (n, 1, H, W): sampled with the image, planned, or None."""
        if self.denoiser.mask_source == "joint":
            return in_fixed_shape(self.denoiser.mask, latents, self.decode_batch)
        if self.denoiser.mask_source != "planned":
            return None
        planned = [job.mask for job in jobs if job.mask is not None]
        if len(planned) != len(jobs):
            raise ValueError("mask must be given with every job of a generator that draws into one, got none; plan it.")
        return torch.stack(planned)

    def _finish(self) -> Iterator[Sampled]:
        """Slots whose every call is run are free at once; their samples meet the final gate."""
        over = [i for i in self._active() if (s := self._slots[i]) is not None and s.is_over]
        ended = [self._take(index) for index in over]
        if not ended:
            return
        if self.gate is None:
            yield from self._settle(None, ended)
            return
        jobs, latents = [slot.job for slot, _ in ended], torch.stack([latents for _, latents in ended])
        self._judged.append((self._submit(jobs, latents, "final"), ended))

    def _settle(self, ticket: Any, ended: list[tuple[_Slot, Tensor]]) -> Iterator[Sampled]:
        """Final verdicts: what is to be decoded waits for a full decode batch, the rest leaves."""
        verdicts: Sequence[Verdict | None] = [None] * len(ended)
        if self.gate is not None:
            verdicts = self.gate.result(ticket)
        for (slot, latents), verdict in zip(ended, verdicts, strict=True):
            sampled = Sampled(slot.job.sample_id, latents, slot.calls, verdict, slot.early)
            kept = verdict is None or verdict.outcome == ACCEPTED or slot.job.ungated
            if self.decode == "all" or (self.decode == "accepted" and kept):
                self._to_decode.append(sampled)
            else:
                yield replace(sampled, latents=latents.cpu())

    def _decoded(self, at_least: int) -> Iterator[Sampled]:
        """Decode waiting samples in batches of one shape, as long as `at_least` wait."""
        while len(self._to_decode) >= at_least:
            batch, self._to_decode = self._to_decode[: self.decode_batch], self._to_decode[self.decode_batch :]
            latents = torch.stack([sampled.latents for sampled in batch])
            images, masks = self.denoiser.decode(_padded(latents, self.decode_batch))
            self.counters.decoded += len(batch)
            for sampled, image, mask in zip(batch, images.cpu(), masks.cpu(), strict=False):
                yield replace(sampled, latents=sampled.latents.cpu(), image=image, mask=mask)


class _Waiting:
    """An iterator of jobs whose next one can be looked at."""

    def __init__(self, jobs: Iterator[SampleJob]) -> None:
        self._jobs = jobs
        self._next: SampleJob | None = None

    def peek(self) -> SampleJob | None:
        if self._next is None:
            self._next = next(self._jobs, None)
        return self._next

    def take(self) -> SampleJob:
        job, self._next = self.peek(), None
        assert job is not None
        return job


def initial_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """A sample's first latents: standard normal, from its seed alone, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def checkpoint_calls(shares: Sequence[float], num_inference_steps: int) -> frozenset[int]:
    """After which calls a sample is judged. The verdict applies one call later, so it must leave a call to save."""
    calls = {max(1, round(share * num_inference_steps)) for share in shares}
    return frozenset(call for call in calls if call + 1 < num_inference_steps)


def rows_at_once(height: int, width: int, most: int = MOST_DECODED) -> int:
    """The fixed number of rows of latents (h, w) that a small network takes at once on a CPU: a function of their size
    alone. The gate meets one sample or two at most steps, and rows of padding cost what rows of samples cost."""
    return max(1, min(most, CELLS_AT_ONCE // (height * width)))


def in_fixed_shape(network: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """`network` over rows (n, ...) in batches of exactly `size`, the last one padded with zeros."""
    return torch.cat([network(_padded(chunk, size))[: len(chunk)] for chunk in rows.split(size)])


def _padded(rows: Tensor, size: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def slot_invariant(denoiser: Denoiser, *, width: int, height: int, slots: int, decode_batch: int | None = None) -> bool:
    """Whether a sample is byte-equal in the first, middle and last slot, among other neighbours, on this hardware.
    Two calls for each; where it fails, sample with `drain=True`."""
    found = []
    for place in sorted({0, slots // 2, slots - 1}):
        shape = denoiser.latent_shape(width, height)
        crowd = [_probe(denoiser, f"crowd-{i}", 1000 * (place + 1) + i, shape) for i in range(slots)]
        crowd[place] = _probe(denoiser, "probe", 7, shape)
        sampler = Sampler(denoiser, width=width, height=height, slots=slots, decode_batch=decode_batch)
        drawn = {sampled.sample_id: sampled for sampled in sampler.run(crowd)}["probe"]
        found.append([_bytes(drawn.latents), _bytes(drawn.image), _bytes(drawn.mask)])
    return all(other == found[0] for other in found)


def _probe(denoiser: Denoiser, name: str, seed: int, shape: tuple[int, int, int]) -> SampleJob:
    # The empty prompt is the one that every family knows; the rows differ by their noise.
    condition, context = denoiser.condition([""])[0], None
    if isinstance(denoiser, InContext):  # noise that is the job's own
        context = initial_noise(seed + 1, (denoiser.context_channels, *shape[1:]))
    return SampleJob(name, seed, condition, guidance=2.0, num_inference_steps=2, context=context)


def _bytes(value: Tensor | None) -> bytes:
    return b"" if value is None else value.contiguous().numpy().tobytes()
