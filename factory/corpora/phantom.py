"""Phantoms as a corpus: the entries of `corpus.phantoms`, drawn one by one when they are loaded.

`path` is empty, or a whole number in place of corpus.phantoms.count. An id is `phantom-SEED-INDEX`, and each is a
lesion of its own. The diagnosis and the truth (the `true_*` columns) are known once a phantom is drawn. Skin type is
the phantom's own, by the angle its skin was painted with. Licence Apache-2.0, as this project's.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from factory import labels, taxonomy
from factory.corpora import published
from factory.corpora.base import Entry, Loaded
from factory.images import encode_mask, encode_png
from factory.phantom import draw, draw_many
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="Phantoms, drawn by this project",
    layout="nothing: the path is empty, or a whole number in place of corpus.phantoms.count",
    licence="Apache-2.0",
    verified=True,
)
_MOST = 1_000_000  # ids have six digits, and must sort as their numbers do


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """The phantoms of a recipe, by id, made one at a time."""
    wanted = section.phantoms
    count = int(path) if path.isdecimal() else wanted.count
    if (path and not path.isdecimal()) or count > _MOST:
        raise ValueError(
            f"corpus.sources.phantom must be empty or a whole number up to {_MOST}, got {path or count!r}; "
            "seed and size are set under corpus.phantoms."
        )
    for index in range(count):
        name = f"phantom-{wanted.seed}-{index:06d}"
        yield Entry(
            source="phantom", source_id=name, licence=ABOUT.licence, modality="dermoscopic", lesion_id=name,
            member=f"{wanted.seed} {index} {wanted.size}",
        )  # fmt: skip


def load(entry: Entry) -> Loaded:
    """The pixels, the mask and the truth of the phantom that `member` names by seed, index and size."""
    seed, index, size = map(int, (entry.member or "").split())
    phantom = draw(seed, index, size)
    means = labels.default().judge("phantom", phantom.diagnosis)
    truth = {
        "label": phantom.diagnosis,
        "diagnosis": means.diagnosis,
        "domain": means.domain,
        "malignant": means.malignant,
        "ham7": means.ham7,
        "skin_type": taxonomy.SKIN_TYPES[phantom.skin_type - 1],
        "skin_type_scale": "ita",
        "skin_type_source": "phantom",
        "mask_source": "phantom",
        "diameter_mm": phantom.diameter_mm,
        "true_asymmetry": phantom.asymmetry,
        "true_border_irregularity": phantom.border_irregularity,
        "true_color_count": phantom.color_count,
        "true_colors": [color for color in taxonomy.COLORS if color in phantom.colors],
    }
    return Loaded(phantom.image, phantom.mask, truth)


_TRUTH = (
    "name", "diagnosis", "malignant", "skin_type", "ita", "asymmetry", "border_irregularity", "color_count", "colors",
    "structures", "artefacts", "diameter_mm",
)  # fmt: skip


def write_phantoms(out: Path, count: int, size: int, seed: int) -> None:
    """A phantom corpus as files: `<diagnosis>/<name>.png` with `<name>_mask.png`, as the reader `folder` takes them,
    and `truth.csv`. `out` must be new or empty."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"OUT must be a new or empty folder, got {out}; name another.")
    draw(seed, 0, size)  # a size that cannot be drawn is refused before anything is written
    out.mkdir(parents=True, exist_ok=True)
    with (out / "truth.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(_TRUTH)
        for phantom in draw_many(seed, range(count), size):
            name = f"phantom-{seed}-{phantom.index:06d}"
            folder = out / phantom.diagnosis
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.png").write_bytes(encode_png(phantom.image))
            (folder / f"{name}_mask.png").write_bytes(encode_mask(phantom.mask))
            values = [getattr(phantom, column) for column in _TRUTH[1:]]
            table.writerow([name, *(" ".join(value) if isinstance(value, tuple) else value for value in values)])
