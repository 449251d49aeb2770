from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from factory.release.charts import Dot, Segment, dot_rows, loss_curve, rate_bar, stacked_bar
from factory.release.pictures import data_uri, image_bytes, outline_path, stratified


def test_a_thumbnail_keeps_its_proportions_and_is_never_enlarged() -> None:
    for shape, expected in (((300, 600, 3), (176, 88)), ((20, 10, 3), (10, 20))):
        uri = data_uri(np.full(shape, 90, np.uint8))
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
            assert image.size == expected and image.format == "WEBP"


def test_the_outline_of_a_square_has_its_four_corners() -> None:
    mask = np.zeros((20, 20), bool)
    mask[5:11, 3:9] = True
    corners = {tuple(point.split(" ")) for point in outline_path(mask).strip("MZ").split("L")}
    assert corners == {("3.5", "5.5"), ("8.5", "5.5"), ("8.5", "10.5"), ("3.5", "10.5")}
    assert outline_path(np.zeros((4, 4), bool)) == ""


def test_a_choice_is_even_over_groups_and_does_not_depend_on_the_order_of_rows() -> None:
    groups = ["a"] * 10 + ["b"] * 2 + [None]
    ids = [f"{(7 * i) % 13:02d}" for i in range(13)]
    chosen = stratified(groups, ids, 7)
    assert sorted(str(groups[i]) for i in chosen) == ["None", "a", "a", "a", "a", "b", "b"]
    turned = stratified(groups[::-1], ids[::-1], 7)
    assert {ids[i] for i in chosen} == {ids[::-1][i] for i in turned}
    assert len(stratified(groups, ids, 99)) == 13


def test_image_bytes_are_found_in_every_form() -> None:
    assert image_bytes({"bytes": b"x", "path": None}) == b"x" and image_bytes(b"y") == b"y"
    assert image_bytes({"bytes": None, "path": None}) is None and image_bytes(None) is None


def test_bars_are_as_long_as_their_values() -> None:
    svg = stacked_bar([Segment("a", 30, "accepted"), Segment("b", 10, "rejected"), Segment("c", 0, "failed")], "t")
    assert 'x="0.00" y="0" width="748.00"' in svg and 'x="750.00"' in svg and svg.count("<rect") == 2
    assert '<rect class="fill" x="0" y="6" width="250.0"' in rate_bar(0.25, 0.1, 0.4, "t")
    assert stacked_bar([], "none").count("<rect") == 0


def test_words_in_charts_are_escaped() -> None:
    assert "<b>" not in stacked_bar([Segment("<b>", 1, "accepted")], "<b>") + dot_rows(
        [Dot("<b>", 0.5, 0.4, 0.6)], "<b>"
    )


def test_a_loss_curve_needs_two_positive_points() -> None:
    assert loss_curve([1], [0.5], "t") == "" and loss_curve([1, 2], [0.5, float("nan")], "t") == ""
    assert loss_curve([1, 2, 3], [4.0, 2.0, 1.0], "t").count("50.0") == 1  # the geometric middle is half way down
    assert "polyline" in loss_curve([1, 2], [0.5, 0.5], "t")
