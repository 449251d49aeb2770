"""The contact sheet: what was asked for, and each sample as image and outlined image with its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from factory import taxonomy
from factory.images import RGB, Mask, read_mask, read_png, resized
from factory.records import ACCEPTED, FAILED
from factory.release.pictures import contours, image_bytes, words

_PAPER, _INK, _QUIET, _EMPTY = (250, 250, 249), (24, 30, 34), (98, 108, 114), (230, 232, 233)
_TONES = {ACCEPTED: (15, 118, 90), FAILED: (110, 110, 118)}
_REJECTED = (180, 50, 40)
_OUTLINE = (0, 255, 208)
_MARGIN, _GAP, _FRAME = 24, 18, 2
_TITLE_LINES, _LEAST_WIDTH = 6, 640  # so that a single pair still has its whole prompt above it


def contact_sheet(
    rows: Sequence[Mapping[str, Any]], *, title: str, columns: int | None = None, tile: int = 192
) -> Image.Image:
    """A sheet of samples: one cell per row with the image, the image with its mask's outline, and the verdict.

    rows: samples as mappings with `image` and `mask` (an image struct, PNG bytes, or an (H, W, 3) uint8 and an (H, W)
        bool array; None where not kept), `outcome`, `reason`, and if known `diagnosis`, `skin_type`, `iou`.
    title: what was asked, e.g. "8 x melanoma, skin type V, seed 7". columns: cells per line (up to 4 by default).
    tile: px of each of the two pictures' sides.
    """
    if not rows:
        raise ValueError("rows must hold at least one sample, got none; sample something first.")
    per_line = columns or min(4, max(1, round(len(rows) ** 0.5 / 1.4 + 0.5)))
    cell_w, cell_h = 2 * tile + 4 * _FRAME, tile + 2 * _FRAME + 48
    lines = -(-len(rows) // per_line)
    width = max(2 * _MARGIN + per_line * cell_w + (per_line - 1) * _GAP, _LEAST_WIDTH)
    heading = _wrapped(title, _font(20), width - 2 * _MARGIN)
    top = _MARGIN + 26 * len(heading) + 30
    sheet = Image.new("RGB", (width, top + lines * (cell_h + _GAP) - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, text in enumerate(heading):
        draw.text((_MARGIN, _MARGIN + 26 * line - 4), text, fill=_INK, font=_font(20))
    draw.text((_MARGIN, top - 30), _summary(rows), fill=_QUIET, font=_font(14))
    for index, row in enumerate(rows):
        x = _MARGIN + (index % per_line) * (cell_w + _GAP)
        y = top + (index // per_line) * (cell_h + _GAP)
        _cell(sheet, draw, row, x, y, tile)
    return sheet


def outlined(rgb: RGB, mask: Mask) -> RGB:
    """A copy of (H, W, 3) with the outline of (H, W) bool drawn as one thin bright line with a dark edge."""
    canvas = rgb.astype(np.float32)
    for color, width, opacity in (((0, 0, 0), 5, 0.5), (_OUTLINE, 3, 1.0)):
        cover = _line(mask, width)[..., None] * opacity
        canvas += cover * (np.array(color, np.float32) - canvas)
    return canvas.round().astype(np.uint8)


def _line(mask: Mask, width: int) -> NDArray[np.float32]:
    """How far each pixel of (H, W) is covered, 0 to 1, by a line along the mask's edge, `width` half pixels wide."""
    height, breadth = mask.shape
    fine = np.zeros((2 * height, 2 * breadth), np.float32)
    cv2.polylines(fine, [2 * points for points in contours(mask)], True, 1.0, width)
    return np.asarray(cv2.resize(fine, (breadth, height), interpolation=cv2.INTER_AREA), dtype=np.float32)


def _cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Mapping[str, Any], x: int, y: int, tile: int) -> None:
    tone = _TONES.get(str(row.get("outcome")), _REJECTED)
    width, height = 2 * tile + 4 * _FRAME, tile + 2 * _FRAME
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=tone)
    left, right = _pair(row, tile)
    sheet.paste(left, (x + _FRAME, y + _FRAME))
    sheet.paste(right, (x + tile + 3 * _FRAME, y + _FRAME))
    draw.text((x, y + height + 6), _fit(_verdict(row), _font(15), width), fill=tone, font=_font(15))
    draw.text((x, y + height + 26), _fit(_asked(row), _font(13), width), fill=_QUIET, font=_font(13))


def _pair(row: Mapping[str, Any], tile: int) -> tuple[Image.Image, Image.Image]:
    """The two pictures of a cell; a sample without pixels is an empty pair that says so."""
    rgb, mask = _pixels(row.get("image")), _shape(row.get("mask"))
    if rgb is None:
        empty = Image.new("RGB", (tile, tile), _EMPTY)
        ImageDraw.Draw(empty).text((tile // 2, tile // 2), "no image kept", fill=_QUIET, font=_font(14), anchor="mm")
        return empty, Image.new("RGB", (tile, tile), _EMPTY)
    width, height = (max(1, round(side * tile / max(rgb.shape[:2]))) for side in (rgb.shape[1], rgb.shape[0]))
    plain = resized(rgb, width, height)
    lined = plain if mask is None else outlined(plain, resized(mask, width, height))
    return _boxed(plain, tile), _boxed(lined, tile)


def _pixels(value: Any) -> RGB | None:
    if isinstance(value, np.ndarray):
        return value
    data = image_bytes(value)
    return read_png(data) if data else None


def _shape(value: Any) -> Mask | None:
    if isinstance(value, np.ndarray):
        return value
    data = image_bytes(value)
    return read_mask(data) if data else None


def _boxed(rgb: RGB, tile: int) -> Image.Image:
    """The picture in the middle of a square of `tile` px."""
    image = Image.fromarray(rgb)
    box = Image.new("RGB", (tile, tile), _EMPTY)
    box.paste(image, ((tile - image.width) // 2, (tile - image.height) // 2))
    return box


def _verdict(row: Mapping[str, Any]) -> str:
    iou = row.get("iou")
    parts = [str(row.get("outcome"))]
    if row.get("reason"):
        parts.append(words(row["reason"]))
    if iou is not None:
        parts.append(f"IoU {iou:.2f}")
    return ", ".join(parts)


def _asked(row: Mapping[str, Any]) -> str:
    parts = []
    if row.get("diagnosis"):
        parts.append(taxonomy.diagnosis_name(str(row["diagnosis"])))
    if row.get("skin_type"):
        parts.append(f"skin type {row['skin_type']}")
    return ", ".join(parts) or str(row.get("sample_id", ""))


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    accepted = sum(row.get("outcome") == ACCEPTED for row in rows)
    return f"{accepted} of {len(rows)} accepted. Left: image. Right: the same with the outline of its mask."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than the cell."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_fit(line, font, width) for line in lines[:_TITLE_LINES]]
