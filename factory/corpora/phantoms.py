"""Phantoms as a corpus: the entries of `corpus.phantoms`, drawn one by one when they are loaded.

The truth goes to the `true_*` columns. Skin type is the phantom's own, by the angle its skin was painted with.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from factory import taxonomy
from factory.corpora.base import Entry, Loaded
from factory.images import encode_mask, encode_png
from factory.phantom import draw, draw_many
from factory.recipe import CorpusSection


@dataclass(frozen=True)
class PhantomEntry(Entry):
    """Phantom `index` of `seed` at `size` px; its labels are known once it is drawn."""

    seed: int = 0
    index: int = 0
    size: int = 128

    def load(self) -> Loaded:
        """The pixels, the mask and the truth."""
        phantom = draw(self.seed, self.index, self.size)
        labels = {
            "diagnosis": phantom.diagnosis,
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
        return Loaded(phantom.image, phantom.mask, labels)


def entries(path: str, section: CorpusSection) -> list[Entry]:
    """The phantoms of a recipe, sorted by id. `path` must be empty: phantoms are drawn, not read."""
    if path:
        raise ValueError(
            f"corpus.sources.phantoms must be empty, got {path!r}; phantoms are set under corpus.phantoms."
        )
    wanted = section.phantoms
    return [_entry(wanted.seed, index, wanted.size) for index in range(wanted.count)]


def _entry(seed: int, index: int, size: int) -> PhantomEntry:
    name = f"phantom-{seed}-{index:06d}"
    return PhantomEntry(
        source="phantoms", source_id=name, licence="Apache-2.0", modality="dermoscopic", lesion_id=name,
        seed=seed, index=index, size=size,
    )  # fmt: skip


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
