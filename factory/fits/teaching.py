"""A teacher's answers on whole images, asked for once and kept by content.

An answer's key is the digest of the image's bytes, in a folder that is named by the teacher's digest. It is the cheap
kind of distillation (the "fixed teacher" of Beyer et al., CVPR 2022), and there the weaker one: by default the teacher
is asked about each crop that the student sees.

N images  S side in pixels  K classes
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from factory import images as pictures
from factory import records
from factory.fits.encoded import Arrays, EncodedCache, keys_of
from factory.storage import LocalStore, Store


class Teacher:
    """Encoded images -> logits (K,) each, as `EncodedCache` asks. `asked` counts the images it was shown."""

    def __init__(self, model: nn.Module, image_size: int) -> None:
        self.model, self.image_size, self.asked = model.eval(), image_size, 0
        self.device = next(model.parameters()).device
        content = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            content.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        self.digest = records.digest("teacher", content.hexdigest(), image_size)

    def __call__(self, images: Sequence[bytes], masks: Sequence[bytes | None]) -> list[Arrays | str]:
        size = self.image_size
        pixels = np.stack([pictures.resized(pictures.read_png(one), size, size) for one in images])
        given = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # (N, 3, S, S)
        self.asked += len(images)
        with torch.no_grad():
            return [{"logits": row.numpy()} for row in self.model(given.to(self.device)).cpu()]


def kept_answers(teacher: Teacher, images: Sequence[bytes], store: Store | None) -> NDArray[np.float32]:
    """Logits (N, K) of images; what the store holds of this teacher is not asked for again. None keeps nothing."""
    none: list[bytes | None] = [None] * len(images)
    with tempfile.TemporaryDirectory() as scratch:
        cache = EncodedCache(store or LocalStore(Path(scratch) / "store"), teacher.digest)
        cache.fill(teacher, images, none)
        rows = cache.rows(keys_of(images, none), Path(scratch) / "rows")
        found = np.empty((len(images), rows.buckets[0]["logits"].shape[1]), np.float32)
        found[rows.index] = rows.buckets[0]["logits"]
    return found
