"""Asks an exported model about pictures, with ONNX Runtime and Pillow alone: no torch, no factory.

    python examples/phone.py model.onnx lesion.jpg [more.jpg ...]

Made by `factory export distill --run RUN --out model.onnx`. A research model, not a medical device.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """As in training: turned as its camera was held, transparent parts on white, 16-bit grey in 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def main(model: str, *pictures: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    size = int(about["image_size"])
    for picture in pictures:
        image = upright_rgb(Image.open(picture))
        # As in training: squeezed to a square; shrinking averages areas, growing is cubic.
        way = Image.Resampling.BOX if size * size < image.width * image.height else Image.Resampling.BICUBIC
        pixels = np.asarray(image.resize((size, size), way))[None]  # (1, S, S, 3) uint8
        if about["input"].startswith("float32"):
            pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255  # (1, 3, S, S)
        (found,) = session.run(None, {"images": pixels})  # (1, K)
        if len(pictures) > 1:
            print(picture)
        for share, name in sorted(zip(found[0], json.loads(about["classes"]), strict=True), reverse=True):
            print(f"{share:6.1%}  {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
