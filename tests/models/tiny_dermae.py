"""The smallest of DerMAE's tables: two classes, eight training images, networks of some hundred thousand weights."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from factory import images, phantom, records
from factory.recipe import DermaeSection, DistillSection, FinetuneSection, MaeSection, NetworkSection

FIT = {"steps": 2, "batch_size": 6, "warmup_steps": 1, "checkpoint_every": 1}
SECTION = DermaeSection(
    large=NetworkSection(model="test_vit", patch_size=8), base=NetworkSection(model="test_vit", patch_size=16),
    small=NetworkSection(model="test_efficientnet"), image_size=32, seeds=2,
    pretrain=MaeSection(**FIT, decoder_width=32, decoder_depth=1), finetune=FinetuneSection(**FIT),
    student=DistillSection(**FIT),
)  # fmt: skip
CLASSES = ("melanoma", "nevus")


def _row(index: int, seed: int, wanted: str) -> dict[str, Any]:
    drawn = phantom.draw(seed, index, 32, diagnosis=wanted)
    return {"image": records.image_struct(images.encode_png(drawn.image), "i.png"), "diagnosis": wanted}


def corpus() -> pa.Table:
    """Eight training rows, two validation and four test rows of two classes, and one test row of a third."""
    rows = []
    for index in range(15):
        wanted = "seborrheic_keratosis" if index == 14 else CLASSES[index % 2]
        rows.append(_row(index, 5, wanted) | {
            "row_id": f"r{index}", "record_id": f"c{index}", "group_id": f"g{index}", "licence": "CC0-1.0",
            "split": "train" if index < 8 else "val" if index < 10 else "test", "outcome": "accepted",
        })  # fmt: skip
    return records.rows_to_table("corpus", rows)


def samples() -> pa.Table:
    """Four samples to learn from; one of a class that the corpus lacks, one of a test image's making, one rejected."""
    rows = [
        _row(index, 6, CLASSES[index % 2]) | {"sample_id": f"s{index}", "parents": ["c0"], "outcome": "accepted"}
        for index in range(7)
    ]
    rows[4]["diagnosis"], rows[5]["parents"] = "dermatofibroma", ["c1", "c11"]
    rows[6] |= {"outcome": "rejected", "reason": "iou"}
    return records.rows_to_table("samples", rows)
