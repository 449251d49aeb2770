"""Synthesize: a unit's planned rows in, the same rows with image, mask, scores and outcome out.

Every planned sample comes back: accepted with its pixels, rejected with the gate's reason, or failed with the error
that stopped it. Nothing in a row depends on the clock, the host or the other samples of its unit.

What does not fit into memory is drawn again with half the slots, and so is all that comes after it: every row says the
batch shape that it was drawn at. What does not fit with one slot has failed.

A generator that draws into an image has a `mask` and a `background` in every row (see `stages/backgrounds.py`). What
it changed outside the mask is measured, then the background is put back there. Of whatever was decoded with a mask it
is measured how far the mask's contour lies on an edge of the image.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factory import records
from factory.images import RGB, encode_mask, encode_png, read_mask, read_png, resized
from factory.models.denoiser import Denoiser, InContext
from factory.models.device_errors import is_out_of_memory
from factory.models.families import load_denoiser
from factory.models.kept_prompts import KeptPrompts
from factory.models.placement import gpu_at_hand, placement
from factory.models.sampler import Gate, Sampled, SampleJob, Sampler, in_fixed_shape, slot_invariant
from factory.quality.edges import edge_contrast
from factory.quality.paste import background_psnr, pasted
from factory.quality.policy import decide
from factory.recipe import GateSection, SynthesizeSection

Row = dict[str, Any]
CONTEXT_BATCH = 4  # backgrounds are encoded at one shape, so that a sample never depends on its neighbours
KEPT_BYTES = 2**29  # of embedded prompts: 64 of FLUX.1's at 512 tokens, all that a small model meets
OUT_OF_MEMORY = "out_of_memory"
OF_PIXELS = ("score_background_psnr", "score_edge_contrast")  # scores that need a decoded image


@dataclass(frozen=True)
class DrawnUnit:
    """A unit's rows, what was drawn of each by sample_id, and at how many slots."""

    rows: Sequence[Row]
    sampled: Mapping[str, Sampled]
    slots: int


class SynthesizeSamples:
    """Generator and sampler, loaded once; a call carries out one unit, `stream` one after another without a pause.

    weights: a diffusers directory; adapter: a LoRA directory or None; gate: the judge, or None for no judgement;
    family: the plan's generator, None for what the weights draw as they are; gpu: whether to draw on one, None for
    where there is one; prompts: those that were embedded before, None to load what embeds them.
    """

    def __init__(
        self,
        weights: str | Path,
        adapter: str | Path | None,
        section: SynthesizeSection,
        gate_section: GateSection,
        gate: Gate | None,
        gate_digest: str = "",
        family: str | None = None,
        gpu: bool | None = None,
        prompts: KeptPrompts | None = None,
    ) -> None:
        torch.set_num_threads(section.num_threads)
        self.family, self.prompts = family, prompts
        where = placement(section.dtype, gpu_at_hand(gpu))
        self.device, self.dtype, self.base_dtype = where.device, getattr(torch, where.dtype), section.base_dtype
        self.denoiser = self.load_denoiser(weights, adapter).to(self.device, self.dtype)
        if section.compile:
            self.denoiser.compile()
        self.section, self.gate_section, self.gate, self.gate_digest = section, gate_section, gate, gate_digest
        self.slots = section.slots
        self._samplers: dict[tuple[int, int], Sampler] = {}
        self._probed: set[tuple[int, int]] = set()
        self._conditions: dict[str, torch.Tensor] = {}

    def load_denoiser(self, weights: str | Path, adapter: str | Path | None) -> Denoiser:
        """The generator, loaded as the stage's family; a stage of another one overrides this."""
        return load_denoiser(
            weights, adapter, self.family, dtype=self.dtype, base_dtype=self.base_dtype, prompts=self.prompts
        )

    def prepare(self, size: tuple[int, int]) -> None:
        """Makes ready for samples of a size (width, height), with as many slots as fit: what is compiled is compiled
        now, and not while a unit is timed."""
        while True:
            try:
                self._sampler(size, together=True)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                return
            if not self.halve():
                return

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of one size; the result is in their order."""
        while rows:
            if (drawn := self._fitting(rows)) is not None:
                return self.finished(drawn)
            if not self.halve():
                return self.failed(rows, OUT_OF_MEMORY)
        return []

    def stream(self, units: Iterator[tuple[int, Sequence[Row]]]) -> Iterator[tuple[int, DrawnUnit]]:
        """Units with their rows, each drawn as a call would draw it, when its last sample has ended: that is not always
        in the order of the units. They are asked for as slots become free, and may have none then and one later. Slots
        run empty only where the size changes; and between any two units where a sample would depend on its neighbours,
        which is probed once for each size. An error ends the stream, and what was under way is then missing."""
        following = next(units, None)
        while following is not None:
            same = _OfOneSize(following, units, self.jobs)
            for sampled in self._sampler(same.size, together=True).run(same):
                if (ended := same.add(sampled)) is not None:
                    unit, rows, done = ended
                    yield unit, DrawnUnit(rows, done, self.slots)
            following = same.left or next(units, None)

    def finished(self, drawn: DrawnUnit) -> list[Row]:
        """What was drawn as it is kept, images encoded. Other threads may draw meanwhile."""
        return [self._finished(row, drawn.sampled[row["sample_id"]], drawn.slots) for row in drawn.rows]

    def failed(self, rows: Sequence[Row], reason: str) -> list[Row]:
        """The rows as they are kept when nothing could be made of them."""
        return [self._row(row, self.slots) | {"outcome": records.FAILED, "reason": reason} for row in rows]

    def halve(self) -> bool:
        """Half the slots from now on; False if there was but one."""
        self._samplers.clear()
        self._probed.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halved = self.slots > 1
        self.slots = max(1, self.slots // 2)
        return halved

    def _fitting(self, rows: Sequence[Row]) -> DrawnUnit | None:
        """What was drawn, or None if it did not fit into memory. What had been drawn by then is let go: the rows of a
        unit have one shape."""
        try:
            return DrawnUnit(rows, {sampled.sample_id: sampled for sampled in self.draw(rows)}, self.slots)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None  # not in the handler, whose error would keep the tensors alive

    def draw(self, rows: Sequence[Row]) -> Iterator[Sampled]:
        """The rows' samples in the order of their ends."""
        return self._sampler(_size(rows[0])).run(self.jobs(rows))

    def replayed(self, row: Row, calls_run: int) -> tuple[Row, torch.Tensor]:
        """A planned row as far as `calls_run` calls, and its latents then, (C, h, w). For a stage without a gate."""
        (job,) = self.jobs([row])
        (sampled,) = self._sampler(_size(row)).run([replace(job, stop_after=calls_run)])
        return self._finished(row, sampled, self.slots), sampled.latents

    def _sampler(self, size: tuple[int, int], together: bool = False) -> Sampler:
        """The sampler of an image size (width, height); one for several units together is probed first."""
        if size not in self._samplers:
            self._samplers[size] = Sampler(
                self.denoiser,
                width=size[0],
                height=size[1],
                slots=self.slots,
                gate=self.gate,
                solver=self.section.solver,
                checkpoints=self.gate_section.checkpoints,
                decode="all" if self.section.keep_rejected == "image" else "accepted",
            )
        sampler = self._samplers[size]
        if together and size not in self._probed:
            self._probed.add(size)
            sampler.drain = not slot_invariant(self.denoiser, width=size[0], height=size[1], slots=self.slots)
        return sampler

    def jobs(self, rows: Sequence[Row]) -> list[SampleJob]:
        """What the sampler is to draw, a job for each planned row."""
        conditions = self._embedded({row["prompt"] for row in rows})
        return [
            SampleJob(
                row["sample_id"], row["seed"], conditions[row["prompt"]], row["guidance"],
                row["num_inference_steps"], ungated=bool(row["audit"]), unit=row["unit"], **planned,
            )
            for row, planned in zip(rows, self._planned(rows), strict=True)
        ]  # fmt: skip

    def _embedded(self, prompts: set[str]) -> dict[str, torch.Tensor]:
        """Prompts (L, D) by their text. They are kept for the units to come, those that were used last, as far as
        `KEPT_BYTES` go: a million samples may have as many prompts, of megabytes each."""
        unseen = sorted(prompts - set(self._conditions))
        if unseen:
            self._conditions.update(zip(unseen, self.denoiser.condition(unseen).cpu(), strict=True))
        found = {prompt: self._conditions.pop(prompt) for prompt in sorted(prompts)}
        self._conditions.update(found)
        of_one = max(1, next(iter(found.values())).nbytes)
        for prompt in list(self._conditions)[: -max(len(found), KEPT_BYTES // of_one)]:
            del self._conditions[prompt]
        return found

    def _planned(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Context and mask of each row, for a generator that draws into an image; nothing for the others."""
        denoiser = self.denoiser
        if not isinstance(denoiser, InContext):
            return [{} for _ in rows]
        pixels = torch.stack([torch.from_numpy(background_of(row)).permute(2, 0, 1) for row in rows])
        masks = torch.stack([torch.from_numpy(read_mask(row["mask"]["bytes"]).copy())[None] for row in rows]).float()
        both = torch.cat([pixels.float() / 127.5 - 1, masks], dim=1)  # (n, 4, H, W)
        contexts = in_fixed_shape(lambda part: denoiser.context(part[:, :3], part[:, 3:]), both, CONTEXT_BATCH)
        return [{"context": context, "mask": mask} for context, mask in zip(contexts.cpu(), masks, strict=True)]

    def _row(self, row: Row, slots: int) -> Row:
        """What is true of the row whatever became of it. The plan's own mask, if any, is the sample's only once it is
        drawn."""
        kept = {name: value for name, value in row.items() if name not in ("mask", "background")}
        return kept | {
            "batch_shape": slots, "num_threads": self.section.num_threads,
            "weights_digest": self.denoiser.digest, "gate_digest": self.gate_digest,
        }  # fmt: skip

    def _finished(self, row: Row, sampled: Sampled, slots: int) -> Row:
        done = self._row(row, slots) | {"calls_run": sampled.calls_run, "outcome": records.ACCEPTED, "reason": None}
        verdict = sampled.verdict
        if verdict is not None:  # the last checkpoint's IoU stays beside the final one
            scores = {**(sampled.early[-1].scores if sampled.early else {}), **verdict.scores}
            known = {name: score for name, score in scores.items() if name in ("iou", *records.SCORES)}
            done |= {**known, "outcome": verdict.outcome, "reason": verdict.reason}
        done = self._drawn(row, sampled, done)
        if self.section.keep_rejected == "latents" and done["outcome"] == records.REJECTED:
            done["latents"] = sampled.latents.half().numpy().tobytes()
        return done

    def _drawn(self, row: Row, sampled: Sampled, done: Row) -> Row:
        """With its pixels, where it was decoded."""
        if sampled.image is None or sampled.mask is None:
            return done
        rgb = ((sampled.image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        if self.denoiser.mask_source == "planned":
            return self._judged_again(row, done | _in_its_background(row, rgb))
        return self._judged_again(row, done | self._pixels(row["sample_id"], rgb, sampled.mask))

    def _judged_again(self, row: Row, done: Row) -> Row:
        """A sample that the gate has accepted, by what only its pixels tell: what was changed outside its mask, and
        whether its mask's contour is seen."""
        if self.gate is None or done["outcome"] != records.ACCEPTED:
            return done
        outcome, reason = decide({name: done.get(name) for name in OF_PIXELS}, self.gate_section)
        shown = outcome == records.ACCEPTED or row["audit"] or self.section.keep_rejected == "image"
        without = {} if shown else dict.fromkeys(("image", "mask", "mask_source"))
        return done | without | {"outcome": outcome, "reason": reason}

    def _pixels(self, name: str, rgb: RGB, mask: torch.Tensor) -> Row:
        image_of = {"image": records.image_struct(encode_png(np.ascontiguousarray(rgb)), f"{name}.png")}
        if self.denoiser.mask_source is None:
            return image_of
        shown = mask[0].numpy() > 0.5
        return image_of | {
            "mask": records.image_struct(encode_mask(shown), f"{name}-mask.png"),
            "mask_source": self.denoiser.mask_source, "score_edge_contrast": edge_contrast(rgb, shown),
        }  # fmt: skip


class _OfOneSize:
    """The jobs of the units that follow one another at one image size, for a sampler; `left`: the first unit of another
    size, which waits until the sampler has ended."""

    def __init__(
        self,
        first: tuple[int, Sequence[Row]],
        units: Iterator[tuple[int, Sequence[Row]]],
        jobs: Callable[[Sequence[Row]], list[SampleJob]],
    ) -> None:
        self.size = _size(first[1][0])
        self.left: tuple[int, Sequence[Row]] | None = first
        self._units, self._jobs_of = units, jobs
        self._jobs: deque[SampleJob] = deque()
        self._under_way: dict[str, tuple[int, Sequence[Row], dict[str, Sampled]]] = {}

    def __iter__(self) -> Iterator[SampleJob]:
        return self

    def __next__(self) -> SampleJob:
        if not self._jobs:
            unit, rows = self._following()
            done: dict[str, Sampled] = {}
            self._under_way.update((row["sample_id"], (unit, rows, done)) for row in rows)
            self._jobs += self._jobs_of(rows)
        return self._jobs.popleft()

    def _following(self) -> tuple[int, Sequence[Row]]:
        """The next unit of the size, or a StopIteration where there is none by now."""
        self.left = self.left or next(self._units)
        if _size(self.left[1][0]) != self.size:
            raise StopIteration
        unit, self.left = self.left, None
        return unit

    def add(self, sampled: Sampled) -> tuple[int, Sequence[Row], dict[str, Sampled]] | None:
        """Takes what was drawn; returns its unit, with its rows and all that was drawn of it, if it was the last."""
        unit, rows, done = self._under_way.pop(sampled.sample_id)
        done[sampled.sample_id] = sampled
        return (unit, rows, done) if len(done) == len(rows) else None


def _size(row: Row) -> tuple[int, int]:
    return row["width"], row["height"]


def background_of(row: Row) -> RGB:
    """The background of a planned row at the sample's size, (H, W, 3); a ValueError if it has none or no mask."""
    if not row.get("background") or not row.get("mask"):
        raise ValueError(
            f"a plan for a generator that draws into an image must have a background and a mask in every row, got "
            f"none in {row['sample_id']}; plan with plan.generator set to that generator."
        )
    return np.ascontiguousarray(resized(read_png(row["background"]["bytes"]), row["width"], row["height"]))


def _in_its_background(row: Row, drawn: RGB) -> Row:
    """The columns of a drawn row: its pixels with the background outside the planned mask."""
    name, background, mask = row["sample_id"], background_of(row), read_mask(row["mask"]["bytes"])
    image = pasted(drawn, background, mask)
    return {
        "image": records.image_struct(encode_png(image), f"{name}.png"),
        "mask": records.image_struct(encode_mask(mask), f"{name}-mask.png"), "mask_source": "planned",
        "score_background_psnr": background_psnr(drawn, background, mask),
        "score_edge_contrast": edge_contrast(image, mask),
    }  # fmt: skip
