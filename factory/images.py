"""Encoded images in and out: decoding that a hostile or broken file cannot hurt, and lossless encoding.

Every refusal is an `ImageProblem`: a short `reason` for the row, and one sentence that names the file and says what
to do. What is accepted comes out as (H, W, 3) uint8 RGB or (H, W) bool, whatever it was in the file:

    EXIF orientation   applied
    grey, palette      converted to RGB
    alpha              laid over white
    CMYK               converted to RGB (Adobe's inverted values are understood)
    16 bits            scaled to 8 by keeping the high byte
    ICC profile        its colours in sRGB; a damaged profile, or one of another kind of pixels, is left aside
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

RGB = NDArray[np.uint8]
Mask = NDArray[np.bool_]

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
MAX_PIXELS, MAX_BYTES = 64_000_000, 67_108_864

# The first bytes of formats that exist and are not read here, to tell them from noise. (offset, bytes, name)
_OTHER_FORMATS = (
    (0, b"GIF8", "GIF"), (0, b"%PDF", "PDF"), (0, b"8BPS", "Photoshop"), (128, b"DICM", "DICOM"),
    (4, b"ftyp", "HEIF or AVIF"), (0, b"\x00\x00\x00\x0cjP", "JPEG 2000"), (0, b"<svg", "SVG"),
)  # fmt: skip
_OWN_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"II*\0", b"MM\0*")
# Paeth's filter and runs alone: of what OpenCV offers the fewest bytes for photographs, at more than twice the speed of
# its default (2.3 ms and 66 kB against 5.2 ms and 71 kB for 256 px).
_PNG = (
    cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE,
    cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH,
)  # fmt: skip


class ImageProblem(ValueError):
    """An image that cannot be used; `reason` is the word for the row, the text one sentence for a person."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageProblem], tuple[str, str]]:
        return type(self), (self.reason, str(self))


def decode_rgb(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> RGB:
    """The pixels of an encoded image, (H, W, 3) uint8.

    `max_bytes` and `max_pixels` (as the header declares them) are checked before anything is allocated. Raises
    ImageProblem with reason empty_file, too_many_bytes, not_an_image, not_an_allowed_format, bomb, animated,
    truncated, broken or unsupported_pixels.
    """
    return np.ascontiguousarray(np.asarray(_to_rgb(_load(data, name, max_pixels, max_bytes), name)))


def decode_mask(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Mask:
    """The pixels of an encoded mask, (H, W) bool: brighter than half of its brightest value.

    So 0/1, 0/255 and soft masks all mean what they look like, and an all-dark one is empty. Raises as `decode_rgb`.
    """
    picture = _load(data, name, max_pixels, max_bytes)
    if picture.mode not in ("1", "L") and not picture.mode.startswith("I;16"):
        picture = _to_rgb(picture, name).convert("L")
    grey = np.asarray(picture).astype(np.float32)
    return grey > max(float(grey.max()) / 2, 0.0)


def encode_png(rgb: RGB) -> bytes:
    """Lossless PNG of (H, W, 3) uint8; the same pixels give the same bytes."""
    return _png(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))


def encode_grey(grey: NDArray[np.uint8]) -> bytes:
    """Lossless PNG of (H, W) uint8."""
    return _png(grey)


def _png(pixels: NDArray[Any]) -> bytes:
    ok, data = cv2.imencode(".png", pixels, _PNG)
    assert ok
    return data.tobytes()


def encode_mask(mask: Mask) -> bytes:
    """One-bit PNG of (H, W) bool; the same mask gives the same bytes."""
    out = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1", dither=Image.Dither.NONE).save(out, "PNG")
    return out.getvalue()


def read_png(data: bytes) -> RGB:
    """The pixels of a PNG that this project wrote, (H, W, 3) uint8. For anything else use `decode_rgb`."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ImageProblem(
            "broken", f"a stored image of {len(data)} bytes must be a PNG; run `factory verify` on the run."
        )
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def read_grey(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a grey PNG that this project wrote, (H, W) uint8."""
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE), dtype=np.uint8)


def read_mask(data: bytes) -> Mask:
    """The pixels of a mask that this project wrote, (H, W) bool. For anything else use `decode_mask`."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("1"))


def brightest(rgb: RGB) -> NDArray[np.uint8]:
    """The largest of each pixel's three values, (H, W): many times as fast as `rgb.max(axis=2)`."""
    return np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2])


def _load(data: bytes, name: str, max_pixels: int, max_bytes: int) -> Image.Image:
    """The decoded and upright picture, after every check that its header allows."""
    picture = _open(data, name, max_bytes, max_pixels)
    width, height = picture.size
    if width * height > max_pixels:
        raise _bomb(name, f"{width} x {height} pixels", max_pixels)
    frames = int(getattr(picture, "n_frames", 1))
    if frames > 1:
        raise ImageProblem("animated", f"{name} must hold one picture, got {frames}; export the one that is meant.")
    try:
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders of untrusted bytes raise almost anything, and all of it means one thing
        raise _undecodable(name, error) from error


def _open(data: bytes, name: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """The picture with its header read and no pixel decoded."""
    if not data:
        raise ImageProblem("empty_file", f"{name} must hold an image, got 0 bytes; copy it again from its source.")
    if len(data) > max_bytes:
        raise ImageProblem(
            "too_many_bytes",
            f"{name} must not exceed {max_bytes} bytes, got {len(data)}; shrink it or raise corpus.max_bytes.",
        )
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(name, "a size far beyond that", max_pixels) from error
    except UnidentifiedImageError as error:
        raise _unrecognised(data, name) from error
    except Exception as error:
        raise _undecodable(name, error) from error


def _bomb(name: str, size: str, max_pixels: int) -> ImageProblem:
    return ImageProblem(
        "bomb", f"{name} must declare at most {max_pixels} pixels, got {size}; shrink it or raise corpus.max_pixels."
    )


def _unrecognised(data: bytes, name: str) -> ImageProblem:
    if data.startswith(_OWN_MAGIC):
        return _undecodable(name, OSError("its header cannot be read"))
    allowed = ", ".join(FORMATS)
    for offset, magic, other in _OTHER_FORMATS:
        if data[offset : offset + len(magic)] == magic:
            return ImageProblem(
                "not_an_allowed_format", f"{name} must be one of {allowed}, got {other}; convert it to PNG first."
            )
    return ImageProblem("not_an_image", f"{name} must be one of {allowed}, got something else; remove or replace it.")


def _undecodable(name: str, error: Exception) -> ImageProblem:
    text = str(error).lower()
    if any(word in text for word in ("truncat", "not enough image data", "unexpected end", "incomplete")):
        return ImageProblem("truncated", f"{name} must be complete, but it ends early; copy it again from its source.")
    return ImageProblem("broken", f"{name} must be decodable, but its data is damaged ({error}); copy it again.")


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Any mode as RGB: see the table at the top."""
    profile = picture.info.get("icc_profile") or b""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode not in ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise ImageProblem(
            "unsupported_pixels",
            f"{name} must hold 8 or 16 bit grey or colour, got pixels of kind {picture.mode!r}; convert it to 8 bits.",
        )
    picture = picture if picture.mode in ("L", "CMYK") else picture.convert("RGB")
    transform = _to_srgb(profile, picture.mode)
    converted = None if transform is None else ImageCms.applyTransform(picture, transform)
    return converted or picture.convert("RGB")


@lru_cache(64)  # a dataset has a few profiles, each on many images
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From pixels of a mode under a profile to sRGB; None where nothing is to be done, or can be."""
    if not profile:
        return None
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(theirs):
            return None
        return ImageCms.buildTransform(theirs, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def resized(pixels: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """An image (H, W, 3) uint8 or a mask (H, W) bool at another size.

    Shrinking averages areas, growing is cubic; a mask is true where at least half of the area was.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    shrink = width * height < pixels.shape[0] * pixels.shape[1]
    if pixels.dtype == np.bool_:
        soft = cv2.resize(pixels.astype(np.float32), (width, height), interpolation=_kernel(shrink, cv2.INTER_LINEAR))
        return np.asarray(soft >= 0.5)
    return cv2.resize(pixels, (width, height), interpolation=_kernel(shrink, cv2.INTER_CUBIC))


def reduced(pixels: NDArray[Any], side: int) -> NDArray[Any]:
    """As it is, or with its short side reduced to `side` px; see `resized`."""
    height, width = pixels.shape[:2]
    shrink = min(1.0, side / min(height, width))
    return resized(pixels, max(1, round(width * shrink)), max(1, round(height * shrink)))


def _kernel(shrink: bool, otherwise: int) -> int:
    return cv2.INTER_AREA if shrink else otherwise
