from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from factory.images import encode_mask, encode_png
from factory.phantom import draw
from factory.release.marking import SOURCE_TYPE, mark, read_mark, xmp_packet

PACKET = xmp_packet({"generator": "joint", "seed": 7, "row_id": "abc", "absent": None})


def _pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_a_marked_image_has_the_same_compressed_pixels_and_says_it_is_synthetic() -> None:
    png = encode_png(draw(3, 0, 64).image)
    marked = mark(png, PACKET)
    assert np.array_equal(_pixels(marked), _pixels(png))
    start = png.index(b"IDAT")
    assert marked.endswith(png[start - 4 :])  # everything from the first pixel chunk on is untouched
    assert read_mark(marked) == {
        "digital_source_type": SOURCE_TYPE, "generator": "joint", "seed": "7", "row_id": "abc",
    }  # fmt: skip


def test_pillow_reads_the_packet_back() -> None:
    marked = mark(encode_mask(draw(3, 0, 64).mask), PACKET)
    with Image.open(io.BytesIO(marked)) as image:
        image.verify()  # checks every checksum
    with Image.open(io.BytesIO(marked)) as image:
        assert image.info["XML:com.adobe.xmp"] == PACKET
        assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]


def test_marking_again_replaces_the_mark() -> None:
    png = encode_png(draw(3, 1, 64).image)
    twice = mark(mark(png, PACKET), xmp_packet({"seed": 8}))
    assert twice == mark(png, xmp_packet({"seed": 8}))


def test_hostile_words_cannot_break_out_of_the_packet() -> None:
    words = "\"/><x a='b'>&\n"
    found = read_mark(mark(encode_png(draw(3, 1, 32).image), xmp_packet({"generator": words})))
    assert found is not None and found["generator"].split() == words.split()


def test_an_unmarked_image_is_not_ours() -> None:
    assert read_mark(encode_png(draw(3, 1, 32).image)) is None


def test_a_mark_by_another_tool_without_a_source_type_is_not_ours() -> None:
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><nothing/></x:xmpmeta>'
    assert read_mark(mark(encode_png(draw(3, 1, 32).image), packet)) is None


def test_what_is_not_a_whole_png_is_refused() -> None:
    png = encode_png(draw(3, 1, 32).image)
    with pytest.raises(ValueError, match="must be PNG bytes"):
        mark(b"GIF89a", PACKET)
    with pytest.raises(ValueError, match="cut off at byte"):
        mark(png[:-20], PACKET)
    end = b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
    with pytest.raises(ValueError, match="with pixels"):
        mark(png[:33] + end, PACKET)
