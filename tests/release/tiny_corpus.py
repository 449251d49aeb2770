"""A corpus of 17 rows written by hand, whose every count is known because it can be seen here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from factory import records
from factory.storage import open_store
from factory.tables import Table

HOSTILE = "<script>alert('x')</script><img src=https://example.com/a.png>"
_SIZES = {"scale": "scale", "source_width": "w", "source_height": "h"}

# g1 holds a lesion of ISIC 2019, a copy of one of its images with equal pixels, and two copies in Kaggle 1.
_ROWS: list[dict[str, Any]] = [
    {"id": "a0", "diagnosis": "nevus", "w": 600, "h": 450, "scale": 256, "lesion_id": "L1", "group_id": "g1",
     "ita": 60.0, "age": 50.0, "confirmation": "follow_up"},
    {"id": "a1", "diagnosis": "melanoma", "w": 1024, "h": 768, "scale": 512, "lesion_id": "L1", "group_id": "g1",
     "ita": 20.0, "confirmation": "histology", "mask_source": "published"},
    {"id": "a2", "diagnosis": "nevus", "w": 600, "h": 450, "scale": 256, "group_id": "g1", "record_id": "pixels of a0",
     "lost": "exact_duplicate", "duplicate_of": "a0"},
    {"id": "a3", "diagnosis": None, "label": "UNK", "lost": "excluded_label"},
    {"id": "a4", "diagnosis": "melanoma", "lost": "missing_image", "outcome": "failed"},
    {"id": "a5", "diagnosis": "nevus", "w": 120, "h": 100, "lost": "too_small"},
    {"id": "a6", "diagnosis": "nevus", "w": 200, "h": 120, "lost": "too_small"},
    {"id": "d0", "diagnosis": "nevus", "w": 400, "h": 300, "scale": 256, "split": "val", "stated": False, "ita": 50.0,
     "skin_type": "12", "skin_type_scale": "ddi", "skin_type_source": "expert"},
    {"id": "d1", "diagnosis": "melanoma", "w": 300, "h": 500, "scale": 256, "split": "test", "stated": True,
     "skin_type": "56", "skin_type_scale": "ddi", "skin_type_source": "expert", "ita": -40.0},
    {"id": "d2", "diagnosis": "other_benign", "label": HOSTILE, "w": 300, "h": 300, "scale": 256, "stated": True,
     "skin_type": "12", "skin_type_scale": "ddi", "skin_type_source": "expert"},
    {"id": "k0", "diagnosis": "unspecified_benign", "w": 300, "h": 300, "scale": 256, "group_id": "g1",
     "record_id": "pixels of k0", "lost": "near_duplicate", "duplicate_of": "a0"},
    {"id": "k1", "diagnosis": "unspecified_malignant", "w": 300, "h": 300, "scale": 256, "group_id": "gK",
     "ita": 30.0, "skin_type": "III", "skin_type_scale": "ita", "skin_type_source": "measured", "stated": True},
    {"id": "k2", "diagnosis": "unspecified_malignant", "w": 300, "h": 300, "scale": 256, "group_id": "gK",
     "lost": "published_duplicate", "duplicate_of": "k1"},
    {"id": "k3", "diagnosis": "unspecified_benign", "w": 300, "h": 300, "scale": 256, "group_id": "g1",
     "record_id": "pixels of k0", "lost": "near_duplicate", "duplicate_of": "a0"},
    {"id": "k4", "diagnosis": "unspecified_benign", "w": 224, "h": 224, "scale": 128},
    {"id": "p0", "diagnosis": "nevus", "w": 200, "h": 130, "scale": 128, "patient_id": "P1", "group_id": "gP",
     "skin_type": "III", "skin_type_scale": "fst", "skin_type_source": "expert", "ita": 35.0, "diameter_mm": 4.0},
    {"id": "p1", "diagnosis": "nevus", "w": 180, "h": 140, "scale": 128, "patient_id": "P1", "group_id": "gP",
     "skin_type": "III", "skin_type_scale": "fst", "skin_type_source": "expert", "ita": 58.0, "diameter_mm": 6.0},
]  # fmt: skip
_SOURCES: dict[str, dict[str, Any]] = {
    "a": {"source": "isic2019", "licence": "CC-BY-NC-4.0", "modality": "dermoscopic"},
    "d": {"source": "ddi", "licence": "research only", "modality": "clinical", "confirmation": "histology"},
    "k": {"source": "kaggle1", "licence": None, "modality": "dermoscopic"},
    "p": {"source": "pad-ufes-20", "licence": "CC-BY-4.0", "modality": "clinical"},
}
_MALIGNANT = {"melanoma": True, "unspecified_malignant": True, None: None}

# As `copies` would hold them: pairs found, those of equal pixels too, and one published, twice.
COPIES = [
    ("a0", "k0", "near"), ("a0", "k3", "near"), ("a0", "a2", "near"), ("k0", "k3", "near"), ("k1", "k2", "published"),
    ("k2", "k1", "near"),
]  # fmt: skip
HINTS = {"d1": "test"}  # published splits


def corpus_rows() -> list[dict[str, Any]]:
    """The rows under the columns of the corpus."""
    return [_row(dict(written)) for written in _ROWS]


def _row(said: dict[str, Any]) -> dict[str, Any]:
    name, lost = said.pop("id"), said.pop("lost", None)
    split = said.pop("split", "train")
    row = dict(_SOURCES[name[0]])
    row |= {column: said.pop(key, None) for column, key in _SIZES.items()}
    row |= {
        "row_id": name, "source_id": name, "domain": "dermatology", "label": said["diagnosis"], "group_id": f"g-{name}",
        "malignant": _MALIGNANT.get(said["diagnosis"], False), "stated_malignant": said.pop("stated", None),
        "record_id": f"pixels of {name}" if row["scale"] else None,
        "outcome": "accepted" if lost is None else "rejected", "reason": lost, "split": split if lost is None else None,
    }  # fmt: skip
    return row | said


def table(rows: list[dict[str, Any]] | None = None) -> pa.Table:
    """The corpus as a table; `rows` in place of its own."""
    return records.rows_to_table("corpus", corpus_rows() if rows is None else rows)


def copies_table(pairs: list[tuple[str, str, str]] | None = None) -> pa.Table:
    """`copies`, of COPIES or of other pairs."""
    rows = [{"row_id_a": a, "row_id_b": b, "kind": kind} for a, b, kind in (COPIES if pairs is None else pairs)]
    return records.rows_to_table("copies", rows)  # type: ignore[arg-type]


def hints() -> pa.Table:
    """Published splits, as the intake has them."""
    names = [row["row_id"] for row in corpus_rows()]
    return pa.table({"row_id": names, "split": pa.array([HINTS.get(name) for name in names], pa.string())})


def build(path: Path, *, copies: bool = True, seal: bool = True, missing: bool = False) -> Path:
    """A run that holds the corpus, its listing and its intake, and `copies` if wanted; nothing else was made. As
    `missing` no row has its image, as when a published table alone is read."""
    rows = corpus_rows()
    for row in rows if missing else []:
        row |= dict.fromkeys(("record_id", "scale", "source_width", "source_height", "split", "duplicate_of", "ita"))
        row |= {"outcome": "failed", "reason": "missing_image"}
    intake = [dict(row, split=HINTS.get(row["row_id"]), duplicate_of=None) for row in rows]
    listing = [{"unit": 0, "source": row["source"], "source_id": row["source_id"]} for row in rows]
    made = {"min_side": "128", "scales": "[128, 256, 512]"}
    _write(path, "listing", records.rows_to_table("listing", listing))
    _write(path, "intake", records.rows_to_table("intake", intake), {f"corpus.{k}": v for k, v in made.items()})
    if copies:
        _write(path, "copies", copies_table([] if missing else None), {"corpus.min_likeness": "0.75"})
    _write(path, "corpus", table(rows), {"corpus.near_duplicates": '"reject"'}, seal=seal)
    (path / "run.json").write_text(json.dumps({"fingerprint": "f" * 32, "recipe": {}}))
    return path


def _write(run: Path, name: str, rows: pa.Table, fingerprint: dict[str, str] | None = None, seal: bool = True) -> None:
    made = Table(open_store(run), name)
    half = rows.num_rows // 2
    for part, span in enumerate((rows.slice(0, half), rows.slice(half))):
        made.commit(part, span)
    if seal:
        made.seal(2, fingerprint or {}, {})
