"""Pictures for the page: thumbnails as data URIs, mask outlines as vector paths, and which samples are shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from factory.images import RGB, Mask, read_mask, read_png, resized

THUMBNAIL = 176  # px of the longer side: two device pixels per CSS pixel at the grid's usual size


@dataclass(frozen=True)
class Picture:
    """One figure: the image as a data URI, its outline in image pixels (an SVG path), and what is written below."""

    uri: str
    width: int
    height: int
    outline: str
    alt: str
    caption: str
    detail: str = ""
    note: str = ""


def picture(image: bytes, mask: bytes | None, *, alt: str, caption: str, detail: str = "", note: str = "") -> Picture:
    """A figure from encoded image and mask (PNG, as the tables hold them)."""
    rgb = read_png(image)
    path = outline_path(read_mask(mask)) if mask else ""
    return Picture(data_uri(rgb), rgb.shape[1], rgb.shape[0], path, alt, caption, detail, note)


def data_uri(rgb: RGB, longest: int = THUMBNAIL) -> str:
    """A WebP thumbnail of (H, W, 3) uint8, never enlarged, as a data URI."""
    scale = min(1.0, longest / max(rgb.shape[:2]))
    small = resized(rgb, max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    out = io.BytesIO()
    Image.fromarray(small).save(out, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def contours(mask: Mask) -> list[np.ndarray]:
    """The outer contours of (H, W) bool, each (N, 2) int32 as x, y of pixel centres."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [contour.reshape(-1, 2) for contour in found]


def outline_path(mask: Mask) -> str:
    """The mask's outline as an SVG path in pixel coordinates, simplified to within 0.4 px."""
    parts = []
    for contour in contours(mask):
        points = cv2.approxPolyDP(contour.reshape(-1, 1, 2), 0.4, True).reshape(-1, 2) + 0.5
        parts.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z")
    return "".join(parts)


def stratified(groups: Sequence[str | None], ids: Sequence[str], count: int) -> list[int]:
    """Positions of at most `count` rows, as even over the groups as their sizes allow.

    Within a group rows come by id. Ids are hashes, so this is a random choice that never changes for a run.
    """
    by_group: dict[str, list[int]] = {}
    for position in sorted(range(len(ids)), key=lambda i: ids[i]):
        by_group.setdefault(groups[position] or "", []).append(position)
    chosen: dict[str, list[int]] = {group: [] for group in sorted(by_group)}
    left = min(count, len(ids))
    while left:
        for group, members in by_group.items():
            if left and len(chosen[group]) < len(members):
                chosen[group].append(members[len(chosen[group])])
                left -= 1
    return [position for members in chosen.values() for position in members]


def image_bytes(struct: Mapping[str, Any] | bytes | None) -> bytes | None:
    """The encoded bytes of an image column's value."""
    if struct is None or isinstance(struct, bytes):
        return struct
    data = struct["bytes"]
    return None if data is None else bytes(data)


def words(identifier: object) -> str:
    """`mask_size` -> `mask size`, `low_iou` -> `low IoU`: what is written below a picture."""
    return " ".join("IoU" if word == "iou" else word for word in str(identifier).split("_"))
