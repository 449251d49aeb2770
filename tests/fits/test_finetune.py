"""Fine-tuning: rates by layer, skipped blocks and mixed rows by row, exact resume, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.data.mixup import cutmix_bbox_and_lam

from factory import images, phantom, recipe, records
from factory.fits.card import read_card
from factory.fits.examples import ImageExamples
from factory.fits.finetune import FinetuneObjective, finetune_objective
from factory.fits.loop import train
from factory.fits.mae import MaeObjective
from factory.fits.mixing import box, mixed
from factory.fits.objective import RowNoise
from factory.models.drop_path import RowDropPath, give
from factory.recipe import FinetuneSection, MaeSection

SECTION = FinetuneSection(
    steps=6, batch_size=8, warmup_steps=1, checkpoint_every=3, layer_decay=0.5, drop_path=0.5, schedule="constant",
    learning_rate=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("mae")
    section = MaeSection(encoder="test_vit", image_size=32, patch_size=8, decoder_width=32, decoder_depth=1)
    objective = MaeObjective(section, ImageExamples([], 32))
    objective.save(objective.build(), directory)
    return directory


def _corpus(diagnoses: list[str], splits: str = "") -> pa.Table:
    rows: list[dict[str, Any]] = []
    for index, wanted in enumerate(diagnoses):
        drawn = phantom.draw(5, index, 32, diagnosis=wanted)
        rows.append({
            "row_id": f"r{index}", "record_id": f"c{index}", "diagnosis": wanted,
            "image": records.image_struct(images.encode_png(drawn.image), f"c{index}.png"),
            "split": {"v": "val"}.get(splits[index : index + 1], "train"), "licence": "CC0-1.0", "outcome": "accepted",
        })  # fmt: skip
    return records.rows_to_table("corpus", rows)


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    return _corpus(["nevus", "melanoma", "nevus"] * 5, "vvv")


def _objective(encoder: Path, corpus: pa.Table, **changed: Any) -> FinetuneObjective:
    return finetune_objective(SECTION.model_copy(update=changed), encoder, corpus)


def test_learning_rates_fall_from_the_head_to_the_pixels(encoder: Path, corpus: pa.Table) -> None:
    objective = _objective(encoder, corpus)
    model = objective.build()
    groups = objective.parameter_groups(model)
    scale = {id(value): group["lr_scale"] for group in groups for value in group["params"]}
    decay = {id(value): group["weight_decay"] for group in groups for value in group["params"]}
    names = dict(model.model.named_parameters())
    depth = len(model.model.blocks)
    assert scale[id(names["head.weight"])] == 1.0
    for block in range(depth):
        assert scale[id(names[f"blocks.{block}.mlp.fc1.weight"])] == 0.5 ** (depth - block)
    assert scale[id(names["patch_embed.proj.weight"])] == 0.5 ** (depth + 1)
    assert decay[id(names["head.weight"])] == 0.05 and decay[id(names["head.bias"])] == 0.0
    assert {id(value) for value in names.values() if value.requires_grad} == set(scale)


def test_the_loop_steps_each_layer_at_its_own_rate(encoder: Path, corpus: pa.Table, tmp_path: Path) -> None:
    # AdamW's first step is the learning rate itself, whatever the gradient; without decay it is all that moves.
    section = SECTION.model_copy(update={"steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "drop_path": 0.0})
    objective = finetune_objective(section, encoder, corpus)
    before, after = objective.build().model, train(objective, section, tmp_path).model
    depth = len(before.blocks)
    for name, scale in (("blocks.0.mlp.fc1.weight", 0.5**depth), ("head.weight", 1.0)):
        moved = (after.get_parameter(name) - before.get_parameter(name)).detach().abs().median()
        assert float(moved) == pytest.approx(1e-3 * scale, rel=0.02)


def test_a_fit_that_stops_and_goes_on_ends_at_the_same_bits(encoder: Path, corpus: pa.Table, tmp_path: Path) -> None:
    half = SECTION.model_copy(update={"steps": 3})
    train(_objective(encoder, corpus), half, tmp_path / "stopped")
    torch.manual_seed(99)  # another process has another generator
    stopped = train(_objective(encoder, corpus), SECTION, tmp_path / "stopped").state_dict()
    whole = train(_objective(encoder, corpus), SECTION, tmp_path / "whole").state_dict()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_a_row_is_mixed_and_its_blocks_skipped_alike_whatever_its_batch(encoder: Path, corpus: pa.Table) -> None:
    objective = _objective(encoder, corpus)
    model = objective.build().train()
    rows = np.array([0, 3, 5, 6])
    with torch.no_grad():
        batch = objective.examples.batch(rows)
        together = objective.loss(model, batch, RowNoise(0, 7, rows))["loss"]
        alone = [
            objective.loss(model, objective.examples.batch(rows[k : k + 1]), RowNoise(0, 7, rows[k : k + 1]))["loss"]
            for k in range(4)
        ]
    assert float(together) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-5)
    assert len({round(float(one), 4) for one in alone}) == 4


def test_a_skipped_residual_is_nought_and_a_kept_one_is_scaled_up() -> None:
    path = RowDropPath(0.25).train()
    give(path, torch.tensor([[0.24], [0.25]]))
    assert path(torch.ones(2, 3, 2)).flatten(1).tolist() == [[0.0] * 6, [pytest.approx(4 / 3)] * 6]
    assert torch.equal(path.eval()(torch.ones(2, 3)), torch.ones(2, 3))


def test_every_drop_path_of_timm_is_replaced(encoder: Path, corpus: pa.Table) -> None:
    from timm.layers import DropPath

    objective = _objective(encoder, corpus, drop_path=0.3)
    model = objective.build()
    assert not any(isinstance(module, DropPath) for module in model.modules())
    rates = [module.drop_prob for module in model.modules() if isinstance(module, RowDropPath)]
    assert objective.paths == len(rates) > 0 and max(rates) == pytest.approx(0.3) and rates == sorted(rates)


@pytest.mark.parametrize(("share", "across", "down"), [(0.3, 0.1, 0.95), (0.75, 0.5, 0.5), (0.99, 0.0, 0.0)])
def test_a_cut_square_is_timms(share: float, across: float, down: float, monkeypatch: pytest.MonkeyPatch) -> None:
    centre = iter([int(down * 32), int(across * 32)])
    monkeypatch.setattr(np.random, "randint", lambda low, high, size=None: next(centre))
    (top, bottom, left, right), _ = cutmix_bbox_and_lam((3, 32, 32), share)
    assert box(32, share, across, down) == (top, bottom, left, right)


def test_mixed_targets_weigh_the_pixels_that_are_seen() -> None:
    rows = np.arange(64)
    black, white = torch.zeros(64, 3, 16, 16), torch.ones(64, 3, 16, 16)
    labels, others = torch.zeros(64, dtype=torch.long), torch.ones(64, dtype=torch.long)
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        pixels, targets = mixed(
            black, labels, white, others, RowNoise(0, 0, rows), 3, mixup=mixup, cutmix=cutmix, smoothing=0.0
        )
        torch.testing.assert_close(targets[:, 1], pixels.mean((1, 2, 3)), atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(64))
    plain, smooth = mixed(black, labels, white, others, RowNoise(0, 0, rows), 3, mixup=0.0, cutmix=0.0, smoothing=0.3)
    assert torch.equal(plain, black)
    torch.testing.assert_close(smooth[0], torch.tensor([0.8, 0.1, 0.1]))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_what_is_saved_comes_back_with_its_pooling(encoder: Path, corpus: pa.Table, tmp_path: Path, pool: str) -> None:
    objective = _objective(encoder, corpus, global_pool=pool)
    model = objective.build().eval()
    objective.save(model, tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(objective.load(tmp_path)(pixels), model(pixels))
    features = model.model.forward_features((pixels - 0.5) / 0.5)
    pooled = features[:, 1:].mean(1) if pool == "avg" else features[:, 0]
    torch.testing.assert_close(model(pixels), model.model.head(pooled))
    card = read_card(tmp_path)
    assert card["classes"] == ["melanoma", "nevus"] and card["pretrained"] == read_card(encoder)["digest"]


def test_the_loss_falls_and_held_out_images_are_seen_whole(encoder: Path, corpus: pa.Table, tmp_path: Path) -> None:
    changed = {"steps": 40, "validate_every": 20, "checkpoint_every": 40, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.1}
    section = SECTION.model_copy(update=changed)
    train(finetune_objective(section, encoder, corpus), section, tmp_path)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] < 0.8 * logged[0]["loss"]
    assert sum("validation_loss" in row for row in logged) == 2


def _public(encoder: Path, path: Path, **changed: Any) -> FinetuneSection:
    save_file(load_file(encoder / "model.safetensors"), path)
    return SECTION.model_copy(update={"weights": str(path), "model": "test_vit", "image_size": 32} | changed)


def test_a_public_checkpoint_is_loaded_by_its_path(encoder: Path, corpus: pa.Table, tmp_path: Path) -> None:
    objective = finetune_objective(_public(encoder, tmp_path / "w.safetensors"), None, corpus)
    found, stored = objective.build().model.state_dict(), load_file(encoder / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in stored.items())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "vit_tiny_patch16_224"}, "must hold the weights of this model at this size, .* differs in"),
        ({"image_size": 64}, "must hold the weights of this model at this size, .* differs in pos_embed"),
        ({"image_size": 36}, "multiple of patch_size, got 36 and 8"),
        ({"model": "mobilenetv3_small_050"}, "plain VisionTransformer of timm, got 'mobilenetv3_small_050'"),
        ({"weights": "nowhere.safetensors"}, "must be a .safetensors file that is there, got nowhere.safetensors"),
        ({"weights": "mae.pth"}, "`factory convert` makes one"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    encoder: Path, corpus: pa.Table, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    section = _public(encoder, tmp_path / "w.safetensors", **changed)
    with pytest.raises(ValueError, match=words):
        finetune_objective(section, None, corpus).build()


def test_an_image_smaller_than_a_patch_is_refused(encoder: Path, corpus: pa.Table) -> None:
    examples = ImageExamples([], 4, [])
    with pytest.raises(ValueError, match="image_size must be at least a patch, got 4 and patch_size 8"):
        FinetuneObjective(SECTION, "test_vit", encoder / "model.safetensors", examples, ["a", "b"])


def test_a_checkpoint_without_patches_is_refused(corpus: pa.Table, tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    section = SECTION.model_copy(update={"weights": str(tmp_path / "w.safetensors"), "image_size": 32})
    with pytest.raises(ValueError, match=r"must be of a timm ViT, got .* without patch_embed\.proj\.weight"):
        finetune_objective(section, None, corpus)


def test_a_class_that_training_has_not_is_not_a_class(encoder: Path) -> None:
    corpus = _corpus(["nevus", "melanoma", "seborrheic_keratosis", "nevus", "melanoma"], "..v..")
    with pytest.raises(ValueError, match=r"got none of seborrheic_keratosis \(1 validation\)"):
        _objective(encoder, corpus)
    found = _objective(encoder, corpus, rare="leave_out")
    assert found.classes == ["melanoma", "nevus"]
    assert found.held_out is not None and len(found.held_out) == 0


def test_a_class_with_one_example_is_refused_and_one_of_two_is_shown_as_often_as_the_others(
    encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="at least two training images, got 1 of melanoma"):
        _objective(encoder, _corpus(["nevus"] * 5 + ["melanoma"]))
    corpus = _corpus(["nevus"] * 5 + ["melanoma"] * 2)
    objective = _objective(encoder, corpus)
    labels = objective.examples.batch(np.arange(len(objective.examples)))["label"]
    assert np.bincount(labels).tolist() == [5, 5]
    section = SECTION.model_copy(update={"steps": 1})
    train(objective, section, tmp_path)
    plain = _objective(encoder, corpus, balanced=False)
    assert len(plain.examples) == 7


def test_one_diagnosis_alone_is_refused(encoder: Path, corpus: pa.Table) -> None:
    with pytest.raises(ValueError, match="at least two diagnoses to tell apart, got \\['nevus'\\]"):
        _objective(encoder, corpus.filter(pc.equal(corpus["diagnosis"], "nevus")))


def test_weights_are_named_by_their_encoder() -> None:
    from factory.runtime.fit import weights_name

    assert weights_name(recipe.load(), "finetune") == "finetune-vit_tiny_patch16_224"
    public = recipe.load(None, ["fit.finetune.weights=w.safetensors"])
    assert weights_name(public, "finetune") == "finetune-vit_base_patch16_224"
