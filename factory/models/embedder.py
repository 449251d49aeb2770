"""Images to embeddings, by any image model in the transformers layout that a path names: DINOv2, ViT, CLIP, SigLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from factory.images import RGB


class ImageEmbedder:
    """`ImageEmbedder(directory)(images)`: the embeddings of images (H, W, 3), (N, d) float32 of unit length.

    An image tower's own projection (`get_image_features`) is taken where a model has one, else the pooled output, else
    the mean of the last hidden states. Only safetensors are read, and nothing is fetched.
    """

    def __init__(self, directory: str | Path, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        if not (Path(directory) / "config.json").is_file() or not list(Path(directory).glob("*.safetensors")):
            raise ValueError(
                f"corpus.embedding must be a transformers directory with config.json and safetensors, got {directory}; "
                "save the model with `save_pretrained` or name another."
            )
        self.device = device
        self.processor = AutoImageProcessor.from_pretrained(directory, local_files_only=True)
        self.model = AutoModel.from_pretrained(directory, local_files_only=True, use_safetensors=True)
        self.model = self.model.eval().to(device)

    @torch.inference_mode()
    def __call__(self, images: list[RGB]) -> NDArray[np.float32]:
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        found = self._pooled(pixels).float().cpu().numpy()
        length = np.linalg.norm(found, axis=1, keepdims=True)
        return np.asarray(found / np.maximum(length, 1e-12), dtype=np.float32)

    def _pooled(self, pixels: torch.Tensor) -> Any:
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=pixels)
            return getattr(found, "pooler_output", found)
        output = self.model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)
