"""The record: the columns of every table, the ids of its rows, and what can become of one.

Identity is content. A corpus row is named by where it came from, its pixels by their hash, a planned sample by
(plan fingerprint, index); a sample's noise seed comes from its id, so nothing about a sample depends on when,
where or beside whom it was made.

    {"sample_id": "6d1f...", "unit": 3, "index": 201, "diagnosis": "melanoma", "skin_type": "IV",
     "image": {"bytes": b"\\x89PNG...", "path": "6d1f....png"}, "iou": 0.91, "outcome": "accepted", "reason": None}
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from factory import taxonomy

ACCEPTED, REJECTED, FAILED = "accepted", "rejected", "failed"
OUTCOMES: tuple[str, ...] = (ACCEPTED, REJECTED, FAILED)

# The struct that Hugging Face `datasets` reads as an Image feature.
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_OUTCOME_FIELDS = [("outcome", pa.string()), ("reason", pa.string())]

_CORPUS = [
    ("row_id", pa.string()), ("record_id", pa.string()), ("source", pa.string()), ("source_id", pa.string()),
    ("image", IMAGE), ("mask", IMAGE), ("mask_source", pa.string()), ("modality", pa.string()),
    # The publisher's own label, and what the label policy makes of it.
    ("label", pa.string()), ("domain", pa.string()), ("diagnosis", pa.string()), ("malignant", pa.bool_()),
    ("ham7", pa.string()), ("stated_malignant", pa.bool_()), ("confirmation", pa.string()),
    # Each scale has its own words; `ita` is measured in degrees whatever else is known.
    ("skin_type", pa.string()), ("skin_type_scale", pa.string()), ("skin_type_source", pa.string()),
    ("ita", pa.float32()), ("site", pa.string()), ("age", pa.float32()), ("sex", pa.string()),
    ("diameter_mm", pa.float32()),
    ("patient_id", pa.string()), ("lesion_id", pa.string()), ("group_id", pa.string()), ("split", pa.string()),
    ("duplicate_of", pa.string()), ("source_width", pa.int32()), ("source_height", pa.int32()),
    ("black_border", pa.float32()), ("vignette", pa.float32()), ("expert_asymmetry", pa.float32()),
    ("expert_colors", pa.list_(pa.string())),
    ("width", pa.int32()), ("height", pa.int32()), ("scale", pa.int32()), ("licence", pa.string()),
    # What a phantom knows about itself; null for real images.
    ("true_asymmetry", pa.float32()), ("true_border_irregularity", pa.float32()), ("true_color_count", pa.int32()),
    ("true_colors", pa.list_(pa.string())),
    *_OUTCOME_FIELDS,
]  # fmt: skip

_CAPTIONS = [
    ("record_id", pa.string()), ("caption", pa.string()), ("asymmetry", pa.float32()),
    ("border_irregularity", pa.float32()), ("color_count", pa.int32()), ("colors", pa.list_(pa.string())),
    ("mask_source", pa.string()), ("captioner", pa.string()), ("label_in_prompt", pa.bool_()),
    # Measured beside the ABC, null where nothing was (see quality/attributes); the mask's confidence is 0 to 1,
    # and null for a mask that the record came with.
    ("mask_confidence", pa.float32()), ("asymmetry_major", pa.float32()), ("asymmetry_minor", pa.float32()),
    ("color_asymmetry", pa.float32()), ("radial_variance", pa.float32()), ("fractal_dimension", pa.float32()),
    ("abrupt_octants", pa.int32()), ("color_shares", pa.list_(pa.float32())), ("relative_diameter", pa.float32()),
    ("diameter_mm", pa.float32()),
    # What a model stated beside what was measured above; null for the measured captioner.
    ("stated_asymmetry", pa.string()), ("stated_border_irregularity", pa.string()),
    ("stated_colors", pa.list_(pa.string())), ("findings", pa.list_(pa.string())), ("raw_text", pa.string()),
    ("parsed_as", pa.string()), ("attempts", pa.int32()), ("tokens_in", pa.int64()), ("tokens_out", pa.int64()),
    ("prompt_digest", pa.string()), ("model_digest", pa.string()),
    *_OUTCOME_FIELDS,
]  # fmt: skip

_PLAN = [
    ("sample_id", pa.string()), ("unit", pa.int32()), ("index", pa.int64()), ("round", pa.int32()),
    ("retry_of", pa.string()), ("generator", pa.string()), ("diagnosis", pa.string()), ("skin_type", pa.string()),
    ("prompt", pa.string()), ("text_length", pa.int32()), ("mask", IMAGE), ("parents", pa.list_(pa.string())),
    ("box", pa.list_(pa.int32())),  # of a background in its parent: left, top and side in px
    ("seed", pa.int64()), ("width", pa.int32()), ("height", pa.int32()), ("guidance", pa.float32()),
    ("num_inference_steps", pa.int32()), ("audit", pa.bool_()),
    ("site", pa.string()), ("lesion_size", pa.string()), ("bank", pa.string()),  # where there is a quota of each
]  # fmt: skip

# Scores are facts, whatever the verdict; a score that was not computed is null.
SCORES: tuple[str, ...] = (
    "score_latent_iou", "score_confidence", "score_area", "score_solidity", "score_components", "score_hausdorff_px",
    "score_background_psnr", "score_overlap", "score_holes", "score_shape", "score_edge_contrast",
)  # fmt: skip
_SAMPLES = [
    *((name, dtype) for name, dtype in _PLAN if name != "mask"),
    ("image", IMAGE), ("mask", IMAGE), ("mask_source", pa.string()), ("iou", pa.float32()),
    *((name, pa.float32()) for name in SCORES),
    ("latents", pa.binary()), ("calls_run", pa.int32()), ("batch_shape", pa.int32()), ("num_threads", pa.int32()),
    ("weights_digest", pa.string()), ("gate_digest", pa.string()), *_OUTCOME_FIELDS,
]  # fmt: skip


def _schema(fields: list[tuple[str, pa.DataType]]) -> pa.Schema:
    schema = pa.schema([pa.field(name, dtype) for name, dtype in fields])
    return schema.with_metadata({b"huggingface": json.dumps({"info": {"features": _features(schema)}}).encode()})


def _features(schema: pa.Schema) -> dict[str, object]:
    """The `datasets` features of a schema, so that a sealed table loads as it is."""
    return {field.name: _feature(field.type) for field in schema}


def _feature(dtype: pa.DataType) -> object:
    if dtype == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(dtype):
        return {"feature": _feature(dtype.value_type), "_type": "List"}
    names = {
        pa.bool_(): "bool",
        pa.float32(): "float32",
        pa.float64(): "float64",
    }  # where Arrow has another name for it
    return {"dtype": names.get(dtype, str(dtype)), "_type": "Value"}


# A source entry as its reader listed it (corpora/base.Entry): paths as bytes, labels as judged.
_LISTING = [
    ("unit", pa.int32()), ("source", pa.string()), ("source_id", pa.string()), ("licence", pa.string()),
    ("modality", pa.string()), ("image", pa.binary()), ("mask", pa.binary()), ("member", pa.string()),
    ("label", pa.string()), ("problem", pa.string()), ("domain", pa.string()), ("diagnosis", pa.string()),
    ("malignant", pa.bool_()), ("ham7", pa.string()), ("excluded", pa.string()), ("stated_malignant", pa.bool_()),
    ("confirmation", pa.string()), ("skin_type", pa.string()), ("skin_type_scale", pa.string()),
    ("skin_type_source", pa.string()), ("site", pa.string()), ("age", pa.float32()), ("sex", pa.string()),
    ("diameter_mm", pa.float32()), ("patient_id", pa.string()), ("lesion_id", pa.string()), ("same_as", pa.string()),
    ("expert_asymmetry", pa.float32()), ("expert_colors", pa.list_(pa.string())), ("split_hint", pa.string()),
]  # fmt: skip
# The corpus before its second pass, which needs all rows: with what copies are found by (see quality/copies).
_INTAKE = [*_CORPUS, ("same_as", pa.string()), ("copy_keys", pa.binary()), ("copy_view", IMAGE)]

# One per intake row, in its order; null where the row has no image. Half precision, unit length.
_EMBEDDINGS = [("row_id", pa.string()), ("embedding", pa.binary())]
# Pairs of intake rows, by position and by id, that show one photograph: `near`, or `published` as such; or that an
# embedding cannot tell apart, `embedding`. The likeness is that of their kind.
_COPIES = [
    ("a", pa.int64()), ("b", pa.int64()), ("row_id_a", pa.string()), ("row_id_b", pa.string()),
    ("source_a", pa.string()), ("source_b", pa.string()), ("kind", pa.string()), ("likeness", pa.float32()),
]  # fmt: skip

# Normal skin found beside the lesions of training rows, as encoded pixels and as the square (left, top, side) of their
# record, with what quality/shape_prior says of the record's own mask.
_BACKGROUNDS = [
    ("record_id", pa.string()), ("diagnosis", pa.string()), ("skin_type", pa.string()), ("image", IMAGE),
    ("box", pa.list_(pa.int32())), ("shape", pa.list_(pa.float64())), *_OUTCOME_FIELDS,
]  # fmt: skip

LISTING, INTAKE, EMBEDDINGS, COPIES, CORPUS, CAPTIONS, BACKGROUNDS, PLAN, SAMPLES = (
    _schema(fields)
    for fields in (
        _LISTING, _INTAKE, _EMBEDDINGS, _COPIES, _CORPUS, _CAPTIONS, _BACKGROUNDS, _PLAN, _SAMPLES,
    )
)  # fmt: skip
SCHEMAS: dict[str, pa.Schema] = {
    "listing": LISTING, "intake": INTAKE, "embeddings": EMBEDDINGS, "copies": COPIES, "corpus": CORPUS,
    "captions": CAPTIONS, "backgrounds": BACKGROUNDS, "plan": PLAN, "samples": SAMPLES,
}  # fmt: skip

# The verb of the `factory` command that makes each of them.
MADE_BY: dict[str, str] = {
    **dict.fromkeys(("listing", "intake", "embeddings", "copies", "corpus"), "ingest"), "captions": "caption",
    "backgrounds": "plan", "plan": "plan", "samples": "synthesize",
}  # fmt: skip


def digest(*parts: object) -> str:
    """32 hex digits of SHA-256 over the parts, separated so that ("ab", "c") and ("a", "bc") differ."""
    text = json.dumps([part if isinstance(part, (int, float, bool, type(None))) else str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def row_id(source: str, source_id: str) -> str:
    """The id of a source entry; an unreadable image has one too."""
    return digest("row", source, source_id)


def record_id(pixels: np.ndarray) -> str:
    """The id of an image's content: a hash of its decoded pixels, (H, W, 3) uint8."""
    shape = "x".join(map(str, pixels.shape)).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:32]


def sample_id(plan_fingerprint: str, index: int) -> str:
    """The id of planned sample `index` of a plan."""
    return digest("sample", plan_fingerprint, index)


def seed_of(identifier: str) -> int:
    """A 63-bit noise seed from an id."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") >> 1


def sample_ids(plan_fingerprint: str, indices: range) -> np.ndarray:
    """`sample_id` of many planned samples, (N,) of 32 bytes each."""
    known = hashlib.sha256(json.dumps(["sample", plan_fingerprint])[:-1].encode() + b", ")
    found = bytearray()
    for index in indices:
        each = known.copy()
        each.update(b"%d]" % index)
        found += each.digest()[:16]
    return np.frombuffer(found.hex().encode(), dtype="S32")


def seeds_of(identifiers: np.ndarray, salt: bytes = b"") -> np.ndarray:
    """`seed_of(identifier + salt)` of many ids, (N,) int64; identifiers: (N,) of bytes."""
    digests = b"".join([hashlib.sha256(identifier + salt).digest()[:8] for identifier in identifiers.tolist()])
    return (np.frombuffer(digests, dtype=">u8") >> np.uint64(1)).astype(np.int64)


def image_struct(data: bytes | None, path: str) -> dict[str, object] | None:
    """Encoded bytes as the value of an image column, or None."""
    return None if data is None else {"bytes": data, "path": path}


def rows_to_table(name: str, rows: list[dict[str, object]]) -> pa.Table:
    """Rows of one table under its schema: absent columns are null, unknown columns and outcomes are refused."""
    schema = SCHEMAS[name]
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:
        raise ValueError(f"{name} has no column {', '.join(unknown)}; add it to factory/records.py or leave it out.")
    if "outcome" in schema.names:
        for row in rows:
            _check_outcome(name, row)
    return pa.Table.from_pylist([{key: row.get(key) for key in schema.names} for row in rows], schema=schema)


def accepted(split: str | None = None) -> pc.Expression:
    """The accepted rows, of a split if one is named, as `Table.read` and pyarrow's own `filter` take it.

    Example: table.read(["diagnosis", "split", "outcome"], accepted("train")), or loaded.filter(accepted("train")).
    """
    kept = pc.field("outcome") == ACCEPTED
    return kept if split is None else kept & (pc.field("split") == split)


def _check_outcome(name: str, row: dict[str, object]) -> None:
    taxonomy.check(str(row.get("outcome")), OUTCOMES, f"{name}.outcome")
    if (row["outcome"] == ACCEPTED) != (row.get("reason") is None):
        raise ValueError(
            f"{name}.reason must be given exactly when a row is not accepted, "
            f"got outcome {row['outcome']!r} with reason {row.get('reason')!r}; give one reason per lost row."
        )
