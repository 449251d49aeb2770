from __future__ import annotations

import numpy as np
import pytest

from factory import records
from factory.images import encode_mask, encode_png
from factory.phantom import draw
from factory.release.sheet import contact_sheet, outlined


def _row(index: int, outcome: str = "accepted", reason: str | None = None) -> dict[str, object]:
    phantom = draw(4, index, 64)
    return {
        "image": records.image_struct(encode_png(phantom.image), "a.png"),
        "mask": records.image_struct(encode_mask(phantom.mask), "m.png"),
        "outcome": outcome, "reason": reason, "iou": 0.91, "diagnosis": phantom.diagnosis, "skin_type": "IV",
    }  # fmt: skip


def _has(sheet: object, color: tuple[int, int, int], num: int = 200) -> bool:
    return int((np.asarray(sheet) == np.array(color)).all(-1).sum()) >= num


def test_frames_are_green_for_accepted_and_red_for_rejected() -> None:
    green, red = (15, 118, 90), (180, 50, 40)
    accepted = contact_sheet([_row(0)], title="one")
    assert _has(accepted, green) and not _has(accepted, red, 1)
    both = contact_sheet([_row(0), _row(1, "rejected", "low_iou")], title="two")
    assert _has(both, green) and _has(both, red)


def test_the_right_picture_differs_from_the_left_along_the_outline_alone() -> None:
    phantom = draw(4, 2, 64)
    lined = outlined(phantom.image, phantom.mask)
    changed = (lined != phantom.image).any(-1)
    rows, columns = np.nonzero(changed)
    inner = np.zeros_like(phantom.mask)
    inner[1:-1, 1:-1] = (
        phantom.mask[1:-1, 1:-1] & phantom.mask[:-2, 1:-1] & phantom.mask[2:, 1:-1] & phantom.mask[1:-1, :-2]
        & phantom.mask[1:-1, 2:]
    )  # fmt: skip
    edge = np.argwhere(phantom.mask & ~inner)
    distance = np.abs(edge[None] - np.stack([rows, columns], 1)[:, None]).max(-1).min(1)
    assert changed.any() and distance.max() <= 3


def test_arrays_and_encoded_pictures_make_the_same_sheet() -> None:
    phantom = draw(4, 0, 64)
    plain = _row(0) | {"image": phantom.image, "mask": phantom.mask}
    assert np.array_equal(contact_sheet([plain], title="t"), contact_sheet([_row(0)], title="t"))


def test_a_sample_without_pixels_or_mask_still_has_its_cell() -> None:
    rows = [_row(0), _row(1, "rejected", "empty_mask") | {"image": None, "mask": None}, _row(2) | {"mask": None}]
    assert contact_sheet(rows, title="three", columns=3).size[0] > 3 * 2 * 192


@pytest.mark.parametrize(("count", "columns"), [(1, None), (5, 2), (16, None)])
def test_the_sheet_is_large_enough_for_all_cells(count: int, columns: int | None) -> None:
    sheet = contact_sheet([_row(i % 3) for i in range(count)], title="many " * 60, columns=columns, tile=64)
    per_line = columns or 4
    assert sheet.height >= -(-count // per_line) * 64


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="rows must hold at least one sample"):
        contact_sheet([], title="nothing")
