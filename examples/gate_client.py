"""Gates a folder of images with their masks over HTTP, written against the gate's OpenAPI page: the standard library
and Pillow, no factory.

    FACTORY_GATE_TOKEN=... python examples/gate_client.py http://127.0.0.1:8000 IMAGES MASKS --out ious.json

A mask belongs to the image whose name its own begins with (ISIC_0000001.jpg, ISIC_0000001_segmentation.png). --shift
moves every mask by that share of its sides, and --swap takes the next image's mask, to see what the gate makes of masks
that are wrong. IoUs go to a JSON file, by name, with the digests that they were measured with.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

KINDS = {".png", ".jpg", ".jpeg", ".webp"}
TRIES = 6


def pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Every image that has a mask, with it."""
    found = sorted(path for path in masks.iterdir() if path.suffix.lower() in KINDS)
    named = [path for path in sorted(images.iterdir()) if path.suffix.lower() in KINDS]
    matched = ((image, [mask for mask in found if mask.stem.startswith(image.stem)]) for image in named)
    return [(image, candidates[0]) for image, candidates in matched if candidates]


def changed(mask: Path, size: tuple[int, int], shift: float) -> bytes:
    """The mask as a PNG of the image's size, moved to the right and down by `shift` of its sides, white where it was
    outside counted as nothing."""
    picture = Image.open(mask).convert("L")
    if picture.size != size:  # of another image
        picture = picture.resize(size, Image.Resampling.NEAREST)
    if shift:
        dx, dy = round(size[0] * shift), round(size[1] * shift)
        moved = ImageChops.offset(picture, dx, dy)
        moved.paste(0, (0, 0, dx, size[1]))
        moved.paste(0, (0, 0, size[0], dy))
        picture = moved
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def sized(image: Path, longest: int) -> tuple[bytes, tuple[int, int]]:
    """The image's bytes and size; one that is larger than the gate needs is shrunk here, which spares the way."""
    with Image.open(image) as picture:
        if max(picture.size) <= longest and picture.format in ("PNG", "JPEG", "WEBP"):
            return image.read_bytes(), picture.size
        picture = picture.convert("RGB")
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "PNG")
        return out.getvalue(), picture.size


class Gate:
    """A client of POST /v1/validate."""

    def __init__(self, address: str, token: str | None, certificate: str | None) -> None:
        self.address = address.rstrip("/") + "/v1/validate"
        self.headers = {"Content-Type": "application/json"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self.trusted = ssl.create_default_context(cafile=certificate) if address.startswith("https") else None

    def validate(self, image: bytes, mask: bytes) -> dict[str, Any]:
        """The verdict. What the page calls temporary, and a connection that broke, is tried again."""
        body = json.dumps({name: base64.b64encode(data).decode() for name, data in (("image", image), ("mask", mask))})
        for attempt in range(TRIES):
            wait_s = 2.0**attempt / 2
            try:
                request = urllib.request.Request(self.address, body.encode(), self.headers)
                with urllib.request.urlopen(request, timeout=90, context=self.trusted) as answer:
                    found: dict[str, Any] = json.load(answer)
                    return found
            except urllib.error.HTTPError as error:
                said = json.load(error)
                if error.code not in (408, 429, 503) or attempt == TRIES - 1:
                    raise SystemExit(f"gate: {error.code} {said['error']}: {said['message']}") from None
                wait_s = max(wait_s, float(error.headers.get("Retry-After") or 0))
            except (urllib.error.URLError, ConnectionError) as error:
                if attempt == TRIES - 1:
                    raise SystemExit(f"gate: {self.address} does not answer ({error}); start it first.") from None
            time.sleep(wait_s)
        raise AssertionError("unreachable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--out", type=Path, default=Path("ious.json"))
    parser.add_argument("--shift", type=float, default=0.0, help="share of the sides, 0 to 0.9")
    parser.add_argument("--swap", action="store_true", help="take the next image's mask")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--longest", type=int, default=1024, help="px; larger images are shrunk before they are sent")
    parser.add_argument("--certificate", help="PEM to trust, for a gate with a certificate of its own")
    given = parser.parse_args()

    found = pairs(given.images, given.masks)[: given.limit]
    if not found:
        sys.exit(f"gate: {given.masks} must hold masks named after the images of {given.images}, got none.")
    masks = [mask for _, mask in found]
    if given.swap:
        masks = masks[1:] + masks[:1]
    gate = Gate(given.address, os.environ.get("FACTORY_GATE_TOKEN"), given.certificate)
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'image':32} {'verdict':10} {'reason':18} {'iou':>6} {'theta':>6}")
    for (image, _), mask in zip(found, masks, strict=True):
        data, size = sized(image, given.longest)
        answer = gate.validate(data, changed(mask, size, given.shift))
        rows[image.stem] = {name: answer[name] for name in ("verdict", "reason", "iou", "theta")}
        iou = "-" if answer["iou"] is None else f"{answer['iou']:.3f}"
        print(
            f"{image.stem[:32]:32} {answer['verdict']:10} {answer['reason'] or '':18} {iou:>6} {answer['theta']:6.3f}"
        )
    counts = Counter(row["reason"] or row["verdict"] for row in rows.values())
    print(", ".join(f"{name} {count}" for name, count in counts.most_common()))
    result = {
        "shift": given.shift, "swap": given.swap, "model": answer["model"],
        "iou": {name: row["iou"] for name, row in rows.items()}, "rows": rows,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
