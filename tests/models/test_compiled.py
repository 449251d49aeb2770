"""Networks that torch compiles: nearly the same numbers, a closed set of shapes, the same bytes in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_flux
import torch
from diffusers import FluxTransformer2DModel
from torch._dynamo.exc import FailOnRecompileLimitHit

from factory.models.compiled import _repeated, compile_network
from factory.models.flux import FluxDenoiser
from factory.models.sampler import SampleJob, Sampler, slot_invariant
from factory.models.starter import build_unet
from factory.recipe import GateSection, SynthesizeSection, load
from factory.stages.synthesize import SynthesizeSamples

DRAW = """
import sys, torch
from factory.models.starter import build_unet
from factory.recipe import GateSection, SynthesizeSection
from factory.stages.synthesize import SynthesizeSamples
from factory.models.sampler import SampleJob
stage = SynthesizeSamples(sys.argv[1], None, SynthesizeSection(slots=3, compile=True), GateSection(), None, gpu=False)
stage.prepare((32, 32))
condition = stage.denoiser.condition(["a nevus"])[0]
(drawn,) = stage._sampler((32, 32)).run([SampleJob("a", 3, condition, 2.0, 4)])
sys.stdout.buffer.write(drawn.latents.numpy().tobytes())
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def draw(denoiser: Any, side: int, slots: int = 3) -> torch.Tensor:
    condition = denoiser.condition(["a nevus"])[0]
    jobs = [SampleJob(f"{k}", k, condition, 2.0, 3 + k) for k in range(slots + 1)]
    drawn = Sampler(denoiser, width=side, height=side, slots=slots, decode="none").run(jobs)
    return torch.stack([sampled.latents for sampled in sorted(drawn, key=lambda sampled: sampled.sample_id)])


@pytest.mark.parametrize(
    ("family", "sides", "made"),
    [("joint", (32, 64), 2), ("flux", (32,), 3)],  # FLUX.1 repeats two kinds of blocks, one of them begins otherwise
)
def test_it_draws_nearly_the_same_and_each_shape_is_compiled_once(
    family: str,
    sides: tuple[int, ...],
    made: int,
    make_tiny: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("factory.models.compiled.REPEATED", 0.5)  # what surrounds a tiny network's blocks is large
    if family == "flux":
        tiny_flux.save_pipeline(tmp_path)
        denoiser: Any = FluxDenoiser.load(tmp_path, max_sequence_length=tiny_flux.LENGTH)
    else:
        denoiser = make_tiny()
    plain, digest = [draw(denoiser, side) for side in sides], denoiser.digest
    denoiser.compile()
    before = graphs()
    compiled = [draw(denoiser, side) for side in sides]
    assert graphs() - before == made
    for one, other in zip(plain, compiled, strict=True):
        assert 0 < (one - other).abs().max() < 1e-3
    assert torch.equal(draw(denoiser, sides[0]), compiled[0]) and graphs() - before == made
    assert slot_invariant(denoiser, width=sides[0], height=sides[0], slots=3) and denoiser.digest == digest


def test_a_shape_beyond_the_closed_set_is_an_error_and_not_a_silent_return_to_the_slow_path(
    make_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.models.compiled.GRAPHS", 1)
    denoiser = make_tiny()
    denoiser.compile()
    with ThreadPoolExecutor(1) as other:  # units are drawn in threads, and so is what they compile
        other.submit(draw, denoiser, 32).result()
        with pytest.raises(FailOnRecompileLimitHit, match="fullgraph"):
            other.submit(draw, denoiser, 64).result()


def test_every_process_that_compiles_draws_the_same_bytes(tiny_weights: Any, tmp_path: Path) -> None:
    run, drawn = [sys.executable, "-c", DRAW, str(tiny_weights.generator)], []
    for number in range(2):  # without each other's kernels
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / str(number))}
        drawn.append(subprocess.run(run, capture_output=True, check=True, env=env).stdout)
    one, other = drawn
    assert len(one) == 4 * 8 * 16 * 16 and one == other


def test_without_a_compiler_it_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="compile must have a C\\+\\+ compiler for a CPU, got none; install g\\+\\+"):
        compile_network(torch.nn.Linear(2, 2))


def test_it_is_off_unless_it_is_asked_for(tiny_weights: Any) -> None:
    assert not SynthesizeSection().compile and load(None, ["synthesize.compile=true"]).synthesize.compile
    stage = SynthesizeSamples(tiny_weights.generator, None, SynthesizeSection(), GateSection(), None, gpu=False)
    assert stage.denoiser.unet._compiled_call_impl is None


def test_blocks_are_compiled_in_place_of_the_whole_where_they_are_nearly_all_of_it() -> None:
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=2, num_single_layers=4)  # FLUX.1 has 19 and 38 of this width
        unet = build_unet(cross_attention_dim=8)
    assert len(_repeated(flux)) == 6 and not _repeated(unet)
