"""Synthesis of planned masks: the pixels outside them are the background's, and the gate sees the mask that was asked
for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny_sdxl import save_pipeline

from factory import records
from factory.images import encode_mask, encode_png, read_mask, read_png, resized
from factory.models.inpaint import InpaintDenoiser
from factory.models.sampler import Sampler, Verdict
from factory.models.segmenter import LatentSegmenter, save_segmenter
from factory.quality.edges import edge_contrast
from factory.quality.paste import MAX_PSNR, background_psnr, pasted
from factory.recipe import GateSection, SynthesizeSection
from factory.stages.score import LocalGate, ScoreSamples
from factory.stages.synthesize import SynthesizeSamples

SECTION = SynthesizeSection(slots=2, keep_rejected="image")
ANY = GateSection(min_area=0.0, max_area=1.0, min_iou=0.0, min_solidity=0.0, checkpoints=[0.25])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("inpaint"), xl=False)


def disk(size: int = 32, x: int = 14, y: int = 18, radius: int = 8) -> np.ndarray:
    return np.asarray(cv2.circle(np.zeros((size, size), np.uint8), (x, y), radius, 1, -1) > 0)


def planned(count: int = 3, side: int = 32) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "sample_id": f"s{k}", "unit": 0, "index": k, "prompt": f"lesion {k}", "seed": k, "width": 32, "height": 32,
            "guidance": 7.5, "num_inference_steps": 4, "audit": False, "generator": "inpaint", "parents": [f"r{k}"],
            "box": [1, 2, side], "mask": records.image_struct(encode_mask(disk(radius=6 + k)), "m.png"),
            "background": records.image_struct(encode_png(rng.integers(0, 256, (side, side, 3), np.uint8)), "b.png"),
        }
        for k in range(count)
    ]  # fmt: skip


def test_outside_the_mask_every_pixel_is_the_backgrounds_and_inside_it_is_drawn(base: Path) -> None:
    rows = planned()
    made = SynthesizeSamples(base, None, SECTION, ANY, None)(rows)
    table = records.rows_to_table("samples", made)
    assert table["mask_source"].to_pylist() == ["planned"] * 3 and table["box"].to_pylist() == [[1, 2, 32]] * 3
    denoiser = InpaintDenoiser.load(base)
    for row, done in zip(rows, made, strict=True):
        background, mask = read_png(row["background"]["bytes"]), read_mask(row["mask"]["bytes"])
        image = read_png(done["image"]["bytes"])
        assert np.array_equal(image[~mask], background[~mask])
        assert np.array_equal(read_mask(done["mask"]["bytes"]), mask) and done["outcome"] == "accepted"
        raw = drawn_alone(denoiser, row)
        deep = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        assert deep.any() and np.array_equal(image[deep], raw[deep])
        assert done["score_background_psnr"] == pytest.approx(background_psnr(raw, background, mask), abs=1e-6)
        assert done["score_edge_contrast"] == edge_contrast(image, mask)


def drawn_alone(denoiser: InpaintDenoiser, row: dict[str, Any]) -> np.ndarray:
    """The row's image before it is pasted, by the sampler alone."""
    from factory.models.sampler import SampleJob

    image = torch.from_numpy(read_png(row["background"]["bytes"])).permute(2, 0, 1)[None].float() / 127.5 - 1
    mask = torch.from_numpy(read_mask(row["mask"]["bytes"]).copy())[None, None].float()
    context = denoiser.context(image.repeat(4, 1, 1, 1), mask.repeat(4, 1, 1, 1))[0]
    job = SampleJob("x", row["seed"], denoiser.condition([row["prompt"]])[0], 7.5, 4, context=context, mask=mask[0])
    found = next(iter(Sampler(denoiser, width=32, height=32, slots=2, decode="all").run([job]))).image
    assert found is not None
    return ((found + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


class Remembers(LocalGate):
    """The gate, and the masks that were shown to it."""

    def submit(
        self, ids: list[str], image_latents: torch.Tensor, masks: torch.Tensor | None, stage: Any
    ) -> list[Verdict]:
        self.shown.append((stage, ids, masks))
        return super().submit(ids, image_latents, masks, stage)


def test_the_gate_compares_the_planned_mask_with_what_it_finds(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    digest = InpaintDenoiser.load(base).vae_digest
    save_segmenter(LatentSegmenter(4, factor=2, width=8), tmp_path, digest)
    score = ScoreSamples(tmp_path, digest, ANY)
    gate = Remembers(score)
    gate.shown = []
    rows = planned()
    made = SynthesizeSamples(base, None, SECTION, ANY, gate)(rows)
    asked = {row["sample_id"]: read_mask(row["mask"]["bytes"]) for row in rows}
    assert {stage for stage, _, _ in gate.shown} == {"checkpoint", "final"}
    for _, ids, masks in gate.shown:
        assert masks is not None
        assert all(np.array_equal(mask[0] > 0, asked[name]) for name, mask in zip(ids, masks.numpy(), strict=True))
    for row in made:
        assert 0 <= row["iou"] <= 1 and 0 <= row["score_latent_iou"] <= 1
        assert row["score_area"] == pytest.approx(asked[row["sample_id"]].mean())
    never = GateSection(min_area=0.0, max_area=1.0, min_iou=1.0, shift_tolerance=0.0, checkpoints=[])
    refused = SynthesizeSamples(base, None, SECTION, never, LocalGate(ScoreSamples(tmp_path, digest, never)))(rows)
    assert {(row["outcome"], row["reason"]) for row in refused} == {("rejected", "low_iou")}
    changed = ANY.model_copy(update={"min_background_psnr": 98.0})
    judge = LocalGate(ScoreSamples(tmp_path, digest, changed))
    for keeps in ("image", "none", "latents"):
        section = SECTION.model_copy(update={"keep_rejected": keeps})
        found = SynthesizeSamples(base, None, section, changed, judge)([rows[0] | {"audit": True}, *rows[1:]])
        assert {(row["outcome"], row["reason"]) for row in found} == {("rejected", "changed_background")}
        assert [row["image"] is not None for row in found] == [True] + [keeps == "image"] * (len(rows) - 1)
        assert all(row["score_background_psnr"] < 98 for row in found)
        assert all((row.get("latents") is not None) == (keeps == "latents") for row in found)


def test_a_sample_depends_on_its_own_row_alone(base: Path) -> None:
    rows = planned(5)
    together = SynthesizeSamples(base, None, SECTION, ANY, None)(rows)
    apart = SynthesizeSamples(base, None, SECTION, ANY, None)(rows[3:4])
    assert apart[0] == together[3]


def test_a_background_of_another_size_is_scaled_to_the_samples(base: Path) -> None:
    rows = planned(1, side=41)
    image = read_png(SynthesizeSamples(base, None, SECTION, ANY, None)(rows)[0]["image"]["bytes"])
    scaled, mask = resized(read_png(rows[0]["background"]["bytes"]), 32, 32), read_mask(rows[0]["mask"]["bytes"])
    assert image.shape == (32, 32, 3) and np.array_equal(image[~mask], scaled[~mask])


@pytest.mark.parametrize("column", ["mask", "background"])
def test_a_plan_of_another_generator_is_refused(base: Path, column: str) -> None:
    rows = [row | {column: None} for row in planned(1)]
    with pytest.raises(ValueError, match="must have a background and a mask in every row, got none in s0; plan with"):
        SynthesizeSamples(base, None, SECTION, ANY, None)(rows)


def test_the_seam_is_softened_inside_the_mask_alone() -> None:
    background, drawn = np.full((64, 64, 3), 200, np.uint8), np.full((64, 64, 3), 100, np.uint8)
    mask = np.broadcast_to(np.arange(64) < 53, (64, 64))
    exact, soft = pasted(drawn, background, mask, feather=0.0), pasted(drawn, background, mask, feather=3 / 64)
    assert set(np.unique(exact[mask])) == {100} and set(np.unique(exact[~mask])) == {200}
    assert set(np.unique(soft[~mask])) == {200}
    assert soft[32, 48:54, 0].tolist() == [100, 100, 125, 150, 175, 200]  # depth 5, 4, 3, 2, 1, outside
    whole = pasted(drawn, background, np.ones((64, 64), bool))
    assert np.array_equal(whole, drawn)


def test_the_backgrounds_psnr_counts_only_what_is_outside_the_mask_and_its_margin() -> None:
    background, mask = np.full((40, 40, 3), 100, np.uint8), disk(40, 20, 20, 8)
    drawn = background + 10
    assert background_psnr(drawn, background, mask) == pytest.approx(20 * np.log10(255 / 10))
    drawn = background.copy()
    drawn[cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0] = 0  # within the margin of two pixels
    assert background_psnr(drawn, background, mask) == MAX_PSNR
    assert background_psnr(drawn, background, mask, margin=0.0) < 40
    assert background_psnr(drawn, background, np.ones((40, 40), bool)) is None
