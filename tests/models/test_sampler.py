"""The sampler: the right trajectories, the same bytes whatever is beside them, and the gate's word kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from factory.models.denoiser import Prediction, clean_estimate
from factory.models.joint import JointDenoiser
from factory.models.sampler import (
    Sampled,
    SampleJob,
    Sampler,
    Verdict,
    checkpoint_calls,
    rows_at_once,
    slot_invariant,
)
from factory.models.solvers import schedule

Make = Callable[..., JointDenoiser]
GOOD = Verdict("accepted", None, {"iou": 0.9})
BAD = Verdict("rejected", "low_iou", {"iou": 0.1})


@dataclass
class ScriptedGate:
    """Rejects the ids named for a stage. Its tickets are answered once each, in any order, and never early: it
    remembers how many network calls had been made when each was submitted and when each was answered."""

    checkpoint: Sequence[str] = ()
    final: Sequence[str] = ()
    clock: Callable[[], int] = lambda: 0
    seen: list[tuple[str, str, int]] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    shapes: set[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def submit(self, ids: list[str], image_latents: Tensor, masks: Tensor, stage: str) -> Any:
        self.seen += [(name, stage, self.clock()) for name in ids]
        self.shapes.add((tuple(image_latents.shape[1:]), tuple(masks.shape[1:])))
        assert len(ids) == len(image_latents) == len(masks)
        return ids, stage, self.clock()

    def result(self, ticket: Any) -> list[Verdict]:
        ids, stage, submitted = ticket
        self.waits.append(self.clock() - submitted)
        refused = self.checkpoint if stage == "checkpoint" else self.final
        return [BAD if name in refused else GOOD for name in ids]


def _job(denoiser: Any, name: str, steps: int = 5, guidance: float = 2.0, **more: Any) -> SampleJob:
    seed = int.from_bytes(name.encode(), "big") % 2**63
    return SampleJob(name, seed, denoiser.condition([f"a {name}"])[0], guidance, steps, **more)


def _sampler(denoiser: Any, slots: int = 4, **more: Any) -> Sampler:
    return Sampler(denoiser, **{"width": 16, "height": 16, "slots": slots, "decode_batch": 2, **more})


def _drawn(sampler: Sampler, jobs: Sequence[SampleJob] | Iterator[SampleJob]) -> dict[str, Sampled]:
    found = list(sampler.run(jobs))
    assert len({sampled.sample_id for sampled in found}) == len(found)
    return {sampled.sample_id: sampled for sampled in found}


def _bytes(sampled: Sampled) -> tuple[bytes, ...]:
    assert sampled.image is not None and sampled.mask is not None
    return tuple(value.numpy().tobytes() for value in (sampled.latents, sampled.image, sampled.mask))


# ---- the same bytes


def test_a_sample_is_byte_equal_whatever_its_slot_its_neighbours_the_order_and_the_refills(tiny: JointDenoiser) -> None:
    jobs = [_job(tiny, f"{index}", steps=3 + index % 4, guidance=1.0 + index % 3) for index in range(9)]
    wanted = {name: _bytes(found) for name, found in _drawn(_sampler(tiny), jobs).items()}
    assert len(set(wanted.values())) == 9
    alone = {job.sample_id: _bytes(_drawn(_sampler(tiny), [job])[job.sample_id]) for job in jobs}
    assert alone == wanted
    backwards = _drawn(_sampler(tiny), iter(jobs[::-1]))
    assert {name: _bytes(found) for name, found in backwards.items()} == wanted
    gate = ScriptedGate(checkpoint=["0", "3", "4"])  # the others now meet different neighbours
    gated = _drawn(_sampler(tiny, gate=gate, checkpoints=(0.3,)), jobs)
    kept = {name: _bytes(found) for name, found in gated.items() if found.image is not None}
    assert kept == {name: wanted[name] for name in kept} and set("1256") <= set(kept)


def test_the_probe_finds_this_machine_slot_invariant(tiny: JointDenoiser) -> None:
    assert slot_invariant(tiny, width=16, height=16, slots=4, decode_batch=2)


class Leaky:
    """A denoiser whose rows see the row above them, as on hardware where a row's bits depend on its place."""

    def __init__(self, denoiser: JointDenoiser) -> None:
        self.inner = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def predict(self, latents: Tensor, *rest: Tensor) -> Prediction:
        found = self.inner.predict(latents, *rest)
        return Prediction(found.guided + 1e-3 * latents.roll(1, 0), found.conditional)


def test_the_probe_notices_rows_that_see_their_neighbours(tiny: JointDenoiser) -> None:
    assert not slot_invariant(Leaky(tiny), width=16, height=16, slots=4)


def test_draining_keeps_a_unit_reproducible_even_then(tiny: JointDenoiser) -> None:
    leaky = Leaky(tiny)
    jobs = [_job(leaky, f"{index}", steps=3 + index % 3, unit=index // 5) for index in range(10)]
    gate = ScriptedGate(checkpoint=["2"], final=["6"])
    together = _drawn(_sampler(leaky, slots=3, gate=gate, drain=True, checkpoints=(0.3,)), jobs)
    apart = _drawn(_sampler(leaky, slots=3, gate=gate, drain=True, checkpoints=(0.3,)), jobs[5:])
    for name, found in apart.items():
        assert torch.equal(found.latents, together[name].latents)
        assert found.image is None or _bytes(found) == _bytes(together[name])
    mixed = _drawn(_sampler(leaky, slots=3, gate=gate, checkpoints=(0.3,)), jobs)
    assert any(not torch.equal(mixed[name].latents, apart[name].latents) for name in apart)


def test_noise_comes_from_the_seed_alone(tiny: JointDenoiser) -> None:
    one, other = _job(tiny, "a"), _job(tiny, "b")
    twin = SampleJob("twin", one.seed, one.condition, one.guidance, one.num_inference_steps)
    found = _drawn(_sampler(tiny), [one, other, twin])
    assert torch.equal(found["a"].latents, found["twin"].latents)
    assert not torch.equal(found["a"].latents, found["b"].latents)


# ---- the right trajectories


EPSILON, V = {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}
V_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


# Steps divide 1000: elsewhere the library's DDIM steps to timesteps that are not the next ones of its own list.
@pytest.mark.parametrize("steps", [1, 8, 20])
@pytest.mark.parametrize(
    ("solver", "library", "config"),
    [
        ("ddim", DDIMScheduler, EPSILON),
        ("ddim", DDIMScheduler, V),
        ("ddim", DDIMScheduler, V_ZERO_SNR),
        ("dpm++2m", DPMSolverMultistepScheduler, EPSILON),
        ("dpm++2m", DPMSolverMultistepScheduler, V),
    ],
)
def test_slots_follow_the_loops_of_the_librarys_own_schedulers(
    make_tiny: Make, solver: str, library: Any, config: dict[str, Any], steps: int
) -> None:
    denoiser = make_tiny(scheduler=config)
    job = _job(denoiser, "x", steps=steps)
    sampler = _sampler(denoiser, solver=solver, decode="none")
    found = _drawn(sampler, [_job(denoiser, "neighbour", steps=3), job])["x"].latents
    torch.testing.assert_close(found, _loop(denoiser, job, library, steps), rtol=1e-4, atol=1e-4)


def test_the_second_order_solver_starts_at_true_zero_snr_where_the_library_starts_near_it(make_tiny: Make) -> None:
    # The library puts alpha bar 2 ** -24 for zero, so its signal at the first step is 1 / 4096 and not nothing.
    denoiser = make_tiny(scheduler=V_ZERO_SNR)
    job = _job(denoiser, "x", steps=20)
    found = _drawn(_sampler(denoiser, solver="dpm++2m", decode="none"), [job])["x"].latents
    difference = (found - _loop(denoiser, job, DPMSolverMultistepScheduler, 20)).abs().max().item()
    assert difference < 3e-3 < found.std().item() / 100


@torch.no_grad()
def _loop(denoiser: JointDenoiser, job: SampleJob, library: Any, steps: int) -> Tensor:
    """One sample at batch 1, stepped by the library."""
    scheduler = library.from_config(denoiser.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(job.seed))
    empty = denoiser.condition([""])
    for timestep in scheduler.timesteps:
        both = [denoiser.unet(latents, timestep, c).sample for c in (empty, job.condition[None])]
        latents = scheduler.step(both[0] + job.guidance * (both[1] - both[0]), timestep, latents).prev_sample
    return latents[0]


class Straight:
    """A flow denoiser of closed form, v = 0.5 z + 0.1 s + condition, on the protocol's scale of 1000."""

    family, prediction_type, digest, vae_digest = "straight", "flow", "0", "0"
    alphas_cumprod = torch.linspace(1, 0, 1000)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 2, height, width

    def condition(self, prompts: list[str]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts]).reshape(-1, 1, 1)

    def velocity(self, latents: Tensor, s: Tensor, condition: Tensor) -> Tensor:
        return 0.5 * latents + 0.1 * s.reshape(-1, 1, 1, 1) + 0.01 * condition.reshape(-1, 1, 1, 1)

    def predict(self, z: Tensor, t: Tensor, c: Tensor, guidance: Tensor, unconditional: Tensor) -> Prediction:
        free, bound = self.velocity(z, t / 1000, unconditional), self.velocity(z, t / 1000, c)
        return Prediction(free + guidance.reshape(-1, 1, 1, 1) * (bound - free), bound)

    def clean(self, latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        return clean_estimate("flow", latents, prediction, timesteps / 1000)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_stepped_as_the_librarys_euler_scheduler_steps_it(shift: float) -> None:
    flow = Straight()
    job = SampleJob("x", 5, flow.condition(["four"])[0], 2.0, 7)
    sampler = Sampler(flow, width=3, height=2, slots=3, decode="none", shift=shift)  # type: ignore[arg-type]
    found = _drawn(sampler, [job])["x"].latents
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7).tolist())
    z = torch.randn(1, 2, 2, 3, generator=torch.Generator().manual_seed(5))
    for t in scheduler.timesteps:
        v = flow.predict(z, t[None], job.condition[None], torch.tensor([2.0]), flow.condition([""])).guided
        z = scheduler.step(v, t, z).prev_sample
    torch.testing.assert_close(found, z[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("zero_snr", [True, False])
def test_an_exact_clean_estimate_is_reached_exactly_and_every_step_stays_on_its_noise_level(
    solver: str, zero_snr: bool
) -> None:
    # With d = z0 at every call, z must be signal * z0 + noise * eps at each level, whatever the solver.
    alphas = np.linspace(0.999, 0.0 if zero_snr else 0.01, 1000)
    table = schedule("v_prediction", alphas, 10, solver)
    assert table.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    level = alphas[table.timesteps.astype(int)]
    z0, eps = 2.0, -3.0
    z = np.sqrt(level[0]) * z0 + np.sqrt(1 - level[0]) * eps
    for step, following in enumerate([*level[1:], 1.0]):
        z = table.keep[step] * z + table.new[step] * z0 + table.old[step] * z0
        assert z == pytest.approx(np.sqrt(following) * z0 + np.sqrt(1 - following) * eps, abs=1e-9)
    assert z == pytest.approx(z0, abs=1e-12)


# ---- the gate's word


def test_a_rejected_sample_leaves_one_call_after_its_checkpoint_and_its_slot_is_taken(tiny: JointDenoiser) -> None:
    gate = ScriptedGate(checkpoint=["0", "1"])
    sampler = _sampler(tiny, slots=2, gate=gate, checkpoints=(0.5,))
    gate.clock = lambda: sampler.counters.calls
    found = _drawn(sampler, [_job(tiny, f"{index}", steps=10) for index in range(4)])
    assert {name: sampled.calls_run for name, sampled in found.items()} == {"0": 6, "1": 6, "2": 10, "3": 10}
    assert found["0"].verdict == BAD and found["0"].image is None and found["0"].early == (BAD,)
    assert found["2"].verdict == GOOD and found["2"].image is not None and found["2"].early == (GOOD,)
    assert sampler.counters.calls == 6 + 10  # and not the 20 of drawing all four to the end
    assert sampler.counters.rows_run == 6 + 6 + 10 + 10
    assert sampler.counters.occupancy == 1.0 and sampler.counters.stopped_early == 2 and sampler.counters.decoded == 2
    assert [entry for entry in gate.seen if entry[1] == "checkpoint"] == [
        ("0", "checkpoint", 5), ("1", "checkpoint", 5), ("2", "checkpoint", 11), ("3", "checkpoint", 11),
    ]  # fmt: skip


def test_a_job_that_is_to_stop_has_the_latents_of_one_that_was_stopped_there(tiny: JointDenoiser) -> None:
    jobs = [_job(tiny, name, steps=8) for name in "abc"]
    gated = _drawn(_sampler(tiny, 2, gate=ScriptedGate(checkpoint=["b"]), checkpoints=(0.5,)), jobs)["b"]
    again = _drawn(_sampler(tiny, 2), [replace(jobs[1], stop_after=gated.calls_run)])["b"]
    assert again.calls_run == gated.calls_run == 5 and torch.equal(again.latents, gated.latents)
    whole = _drawn(_sampler(tiny, 2), [jobs[1]])["b"]
    assert _bytes(_drawn(_sampler(tiny, 2), [replace(jobs[1], stop_after=8)])["b"]) == _bytes(whole)
    assert not torch.equal(again.latents, whole.latents)
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"stop_after must be from 1 to num_inference_steps .8., got {wrong} in b"):
            _drawn(_sampler(tiny, 2), [replace(jobs[1], stop_after=wrong)])


def test_a_verdict_is_asked_for_exactly_one_call_after_its_checkpoint(tiny: JointDenoiser) -> None:
    gate = ScriptedGate()
    sampler = _sampler(tiny, slots=3, gate=gate, checkpoints=(0.25, 0.5))
    gate.clock = lambda: sampler.counters.calls
    _drawn(sampler, [_job(tiny, f"{index}", steps=8 + index) for index in range(6)])
    assert set(gate.waits[:-1]) == {1} and gate.waits[-1] in (0, 1)  # after the last sample there is no further call
    assert gate.shapes == {((4, 8, 8), (1, 16, 16))}


def test_the_gate_reads_the_clean_estimate_of_the_conditional_prediction(tiny: JointDenoiser) -> None:
    class Keep(ScriptedGate):
        def submit(self, ids: list[str], image_latents: Tensor, masks: Tensor, stage: str) -> Any:
            kept.append((stage, image_latents.clone(), masks.clone()))
            return super().submit(ids, image_latents, masks, stage)

    kept: list[tuple[str, Tensor, Tensor]] = []
    job = _job(tiny, "x", steps=4, guidance=5.0)
    found = _drawn(_sampler(tiny, gate=Keep(), checkpoints=(0.25,)), [job])["x"]
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(job.seed))
    with torch.no_grad():  # at zero SNR the clean estimate is minus the prediction
        estimate = -tiny.unet(noise, torch.tensor([999]), job.condition[None]).sample
    torch.testing.assert_close(kept[0][1], estimate[:, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(kept[0][2], tiny.mask(estimate), rtol=0, atol=1e-5)
    assert torch.equal(kept[1][1][0], found.latents[:4])


def test_an_audit_sample_is_judged_but_never_stopped(tiny: JointDenoiser) -> None:
    gate = ScriptedGate(checkpoint=["audit"], final=["audit", "other"])
    jobs = [_job(tiny, "audit", steps=6, ungated=True), _job(tiny, "other", steps=6)]
    found = _drawn(_sampler(tiny, gate=gate, checkpoints=(0.5,)), jobs)
    assert found["audit"].calls_run == 6 and found["audit"].image is not None
    assert found["audit"].early == (BAD,) and found["audit"].verdict == BAD
    assert found["other"].image is None and found["other"].verdict == BAD and found["other"].early == (GOOD,)


def test_what_is_decoded_follows_the_callers_word(tiny: JointDenoiser) -> None:
    jobs = [_job(tiny, name, steps=2) for name in "ab"]
    for decode, wanted in (("accepted", {"b"}), ("all", {"a", "b"}), ("none", set())):
        found = _drawn(_sampler(tiny, gate=ScriptedGate(final=["a"]), decode=decode), jobs)
        assert {name for name, sampled in found.items() if sampled.image is not None} == wanted


def test_without_a_gate_all_that_is_finite_is_kept(tiny: JointDenoiser) -> None:
    found = _drawn(_sampler(tiny, slots=2), [_job(tiny, name, steps=2) for name in "abc"])
    assert all(sampled.verdict is None and sampled.image is not None for sampled in found.values())


def test_a_sample_that_breaks_is_rejected_as_non_finite_and_harms_nobody(tiny: JointDenoiser) -> None:
    fine = [_job(tiny, name, steps=4) for name in "abc"]
    wanted = {name: _bytes(found) for name, found in _drawn(_sampler(tiny, slots=2), fine).items()}
    broken = SampleJob("broken", 1, torch.full((12, 16), torch.nan), 2.0, 4, ungated=True)
    found = _drawn(_sampler(tiny, slots=2, gate=ScriptedGate()), [broken, *fine])
    assert found["broken"].verdict == Verdict("rejected", "non_finite") and found["broken"].calls_run == 1
    assert {name: _bytes(found[name]) for name in "abc"} == wanted


def test_a_run_that_is_left_or_fails_leaves_nothing_behind(tiny: JointDenoiser) -> None:
    class Deaf(ScriptedGate):
        def result(self, ticket: Any) -> list[Verdict]:
            raise ConnectionError("the gate is gone")

    jobs = [_job(tiny, name, steps=3) for name in "abcd"]
    wanted = {name: _bytes(found) for name, found in _drawn(_sampler(tiny, slots=2), jobs).items()}
    sampler = _sampler(tiny, slots=2)
    run = sampler.run(jobs)
    next(run)
    run.close()  # type: ignore[attr-defined]
    sampler.gate = Deaf()
    with pytest.raises(ConnectionError):
        list(sampler.run(jobs))
    sampler.gate = None
    assert {name: _bytes(found) for name, found in _drawn(sampler, jobs).items()} == wanted


def test_what_judges_and_decodes_few_samples_is_not_padded_at_the_starters_size(tiny: JointDenoiser) -> None:
    assert [rows_at_once(side, side) for side in (64, 32, 16, 8)] == [1, 1, 4, 4]
    assert [rows_at_once(side, side, most=16) for side in (64, 32, 16, 8)] == [1, 1, 4, 16]
    assert _sampler(tiny, decode_batch=None).decode_batch == 4  # 8 x 8 latents on a CPU
    sizes: list[int] = []
    hook = tiny.mask_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    _drawn(_sampler(tiny, gate=ScriptedGate(), width=64, height=64, decode_batch=None), [_job(tiny, "x", steps=4)])
    hook.remove()
    assert set(sizes) == {1}  # 32 x 32 latents


def test_checkpoints_that_could_save_no_call_are_left_out() -> None:
    assert checkpoint_calls((0.7,), 20) == {14}
    assert checkpoint_calls((0.5, 0.7, 0.95, 1.0), 20) == {10, 14}
    assert checkpoint_calls((0.0,), 20) == {1}
    assert checkpoint_calls((0.7,), 3) == frozenset()


def test_jobs_are_taken_only_when_a_slot_is_free(tiny: JointDenoiser) -> None:
    taken = itertools.count()
    number = 0

    def jobs() -> Iterator[SampleJob]:
        nonlocal number
        for index in range(6):
            number = next(taken) + 1
            yield _job(tiny, f"{index}", steps=2)

    run = _sampler(tiny, slots=2, decode="none").run(jobs())
    next(run)
    assert number <= 3


def test_wrong_requests_are_refused(tiny: JointDenoiser) -> None:
    with pytest.raises(ValueError, match="slots and decode_batch must be at least 1, got 0 and 2"):
        _sampler(tiny, slots=0)
    with pytest.raises(ValueError, match="num_inference_steps must be from 1 to 1000, got 1001"):
        _drawn(_sampler(tiny), [_job(tiny, "x", steps=1001)])
    with pytest.raises(ValueError, match="solver must be one of ddim, dpm\\+\\+2m, got 'euler'"):
        schedule("epsilon", np.ones(1000), 5, "euler")
