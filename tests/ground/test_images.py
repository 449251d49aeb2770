"""Files that are not what they seem, and what becomes of each."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from factory import images
from factory.images import ImageProblem, decode_mask, decode_rgb

GRADIENT = np.dstack([np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))] * 3)
GRADIENT[..., 1] //= 2


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def declared_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def animated() -> bytes:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


JPEG = encoded(Image.fromarray(GRADIENT), "JPEG")
PNG = encoded(Image.fromarray(GRADIENT), "PNG")
BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "empty_file"),
    "JPEG cut in its header": (lambda: JPEG[:300], "truncated"),
    "JPEG cut in its data": (lambda: JPEG[:-150], "truncated"),
    "PNG with a damaged header": (lambda: PNG[:12] + b"XXXX" + PNG[16:], "broken"),
    "truncated PNG": (lambda: PNG[: len(PNG) // 2], "truncated"),
    "text": (lambda: b"<html>404 not found</html>", "not_an_image"),
    "GIF renamed .jpg": (lambda: encoded(Image.new("P", (32, 32)), "GIF"), "not_an_allowed_format"),
    "DICOM": (lambda: b"\0" * 128 + b"DICM" + b"\0" * 64, "not_an_allowed_format"),
    "bomb by header": (lambda: declared_png(30_000, 30_000), "bomb"),
    "bomb below Pillow's own limit": (lambda: declared_png(9_000, 9_000), "bomb"),
    "animated PNG": (animated, "animated"),
    "float TIFF": (lambda: encoded(Image.new("F", (32, 32)), "TIFF"), "unsupported_pixels"),
    "damaged PNG": (lambda: PNG[:60] + b"\xff" * 30 + PNG[90:], "broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_file_is_refused_by_name_with_one_reason_and_a_remedy(name: str) -> None:
    make, reason = BROKEN[name]
    with pytest.raises(ImageProblem) as caught:
        decode_rgb(make(), "ISIC_1.jpg")
    assert caught.value.reason == reason
    sentence = str(caught.value)
    assert sentence.startswith("ISIC_1.jpg must ") and "; " in sentence and sentence.endswith(".")


def test_a_bomb_is_refused_without_allocating_it() -> None:
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ImageProblem, match=r"at most 64000000 pixels, got 9000 x 9000 pixels"):
        decode_rgb(declared_png(9_000, 9_000), "bomb.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_caps_are_the_callers() -> None:
    with pytest.raises(ImageProblem, match="must not exceed 10 bytes") as caught:
        decode_rgb(PNG, "a.png", max_bytes=10)
    assert caught.value.reason == "too_many_bytes"
    with pytest.raises(ImageProblem, match="64 x 48"):
        decode_rgb(PNG, "a.png", max_pixels=100)


def test_a_problem_survives_being_sent_between_processes() -> None:
    problem = pickle.loads(pickle.dumps(ImageProblem("bomb", "a.png must be small; shrink it.")))
    assert (problem.reason, str(problem)) == ("bomb", "a.png must be small; shrink it.")


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    values = (np.arange(64 * 48, dtype=np.uint16) * 20).reshape(48, 64)
    rgb = decode_rgb(encoded(Image.fromarray(values), "PNG"), "deep.png")
    assert np.array_equal(rgb, np.dstack([values // 256] * 3))


def test_cmyk_jpeg_shows_its_colours() -> None:
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    rgb = decode_rgb(encoded(red, "JPEG"), "print.jpg")
    assert rgb.shape == (32, 32, 3)
    assert rgb[16, 16, 0] > 200 and rgb[16, 16, 1:].max() < 60


def test_palette_grey_and_alpha_become_rgb() -> None:
    palette = decode_rgb(encoded(Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4), "PNG"), "p.png")
    grey = decode_rgb(encoded(Image.new("L", (8, 8), 77), "PNG"), "l.png")
    clear = decode_rgb(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), "a.png")
    half = decode_rgb(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"), "h.png")
    assert palette[0, 0].tolist() == [10, 200, 30]
    assert grey[0, 0].tolist() == [77, 77, 77]
    assert clear[0, 0].tolist() == [255, 255, 255]
    assert half[0, 0].tolist() == [127, 127, 127]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    rgb = decode_rgb(encoded(Image.fromarray(GRADIENT), "PNG", exif=exif), "turned.png")
    assert np.array_equal(rgb, np.rot90(GRADIENT, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_lossless_formats_give_the_pixels_back(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_rgb(encoded(Image.fromarray(GRADIENT), kind, **options), "x"), GRADIENT)


@pytest.mark.parametrize("top", [1, 128, 255])
def test_a_mask_is_what_is_brighter_than_half_of_its_brightest(top: int) -> None:
    truth = np.zeros((16, 16), bool)
    truth[4:9, 3:12] = True
    assert np.array_equal(decode_mask(encoded(Image.fromarray(truth.astype(np.uint8) * top), "PNG"), "m.png"), truth)


def test_an_all_dark_mask_is_empty_and_a_colour_mask_is_read_by_brightness() -> None:
    assert not decode_mask(encoded(Image.new("L", (16, 16)), "PNG"), "m.png").any()
    yellow = Image.new("RGB", (4, 4))
    yellow.putpixel((1, 2), (255, 255, 0))
    assert np.argwhere(decode_mask(encoded(yellow, "PNG"), "m.png")).tolist() == [[2, 1]]


def test_what_is_encoded_reads_back_and_is_the_same_bytes_each_time() -> None:
    mask = np.random.default_rng(0).random((33, 47)) > 0.5
    assert np.array_equal(images.read_png(images.encode_png(GRADIENT)), GRADIENT)
    assert np.array_equal(images.read_mask(images.encode_mask(mask)), mask)
    assert images.encode_png(GRADIENT) == images.encode_png(GRADIENT.copy())
    assert Image.open(io.BytesIO(images.encode_mask(mask))).mode == "1"


def test_a_stored_image_that_is_no_png_says_what_to_run() -> None:
    with pytest.raises(ImageProblem, match="factory verify"):
        images.read_png(b"not a png")


def test_resizing_averages_areas_and_keeps_masks_binary() -> None:
    checker = np.indices((8, 8)).sum(axis=0) % 2 * np.uint8(200)
    small = images.resized(np.dstack([checker.astype(np.uint8)] * 3), 4, 4)
    assert small.tolist() == np.full((4, 4, 3), 100).tolist()
    mask = np.zeros((8, 8), bool)
    mask[:, :3] = True
    assert images.resized(mask, 4, 4).tolist() == [[True, True, False, False]] * 4
    assert images.resized(mask, 8, 8) is mask
    assert images.resized(mask, 16, 16).mean() == pytest.approx(3 / 8, abs=0.07)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile_with_red_and_blue_exchanged() -> bytes:
    """sRGB's own profile with two primaries exchanged and another name: a colour space that is plainly not sRGB."""
    data = SRGB.replace(b"rXYZ", b"TEMP").replace(b"bXYZ", b"rXYZ").replace(b"TEMP", b"bXYZ")
    return data.replace(b"s\0R\0G\0B", b"o\0d\0d\0!").replace(b"sRGB", b"odd!")


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "RGBA")])
def test_colours_are_those_that_the_profile_means(kind: str, mode: str) -> None:
    red = Image.new("RGB", (32, 32), (200, 30, 30)).convert(mode)
    pixel = decode_rgb(encoded(red, kind, icc_profile=profile_with_red_and_blue_exchanged()), "a.png")[16, 16]
    assert pixel[2] > 150 > 80 > pixel[0]


@pytest.mark.parametrize(
    "profile", [b"no profile at all", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_an_srgb_or_damaged_profile_changes_nothing(profile: bytes) -> None:
    assert np.array_equal(decode_rgb(encoded(Image.fromarray(GRADIENT), "PNG", icc_profile=profile), "a.png"), GRADIENT)


def test_a_profile_of_other_pixels_is_left_aside() -> None:
    grey = Image.new("L", (32, 32), 90)
    found = decode_rgb(encoded(grey, "PNG", icc_profile=profile_with_red_and_blue_exchanged()), "a.png")
    assert (found == 90).all()
