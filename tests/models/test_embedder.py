"""Embeddings by models of the transformers layout, in tiny configurations of the real classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from factory.models.embedder import ImageEmbedder
from factory.phantom import draw_many

PICTURES = [drawn.image for drawn in draw_many(3, range(4), 64)]


def saved(kind: str, folder: Path) -> Path:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )  # fmt: skip

    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = {
        "vit": lambda: ViTModel(ViTConfig(**tiny, intermediate_size=32)),
        "vit without a pooler": lambda: ViTModel(ViTConfig(**tiny, intermediate_size=32), add_pooling_layer=False),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**tiny)),
        "clip": lambda: CLIPModel(CLIPConfig(
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            vision_config=tiny | {"intermediate_size": 32}, projection_dim=12,
        )),
    }[kind]()  # fmt: skip
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["vit", "vit without a pooler", "dinov2", "clip"])
def test_every_kind_of_model_gives_unit_vectors_that_depend_on_the_image_alone(kind: str, tmp_path: Path) -> None:
    embed = ImageEmbedder(saved(kind, tmp_path))
    found = embed(PICTURES)
    assert found.shape == (4, 12 if kind == "clip" else 16) and found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.allclose(embed(PICTURES[2:3])[0], found[2], atol=1e-5)
    assert (found @ found.T)[~np.eye(4, dtype=bool)].max() < 0.99999


def test_a_folder_without_a_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus.embedding must be a transformers directory .* name another"):
        ImageEmbedder(tmp_path)
