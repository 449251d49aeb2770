"""PH2, as published: dermoscopic images with lesion masks, one folder per case, and one table.

    ROOT/PH2_dataset.txt      || Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry | ... || Colors ||
    ROOT/PH2 Dataset images/IMD003/IMD003_Dermoscopic_Image/IMD003.bmp
    ROOT/PH2 Dataset images/IMD003/IMD003_lesion/IMD003_lesion.bmp

200 images: 80 common nevi (0), 80 atypical nevi (1), 40 melanomas (2). Asymmetry (0 symmetric, 1 about one axis, 2
asymmetric) and the six colours of dermoscopy were judged by dermatologists. The same table as PH2_dataset.xlsx is not
read. There are no ids of patients or lesions, and no split. The layout is unverified: it follows the publisher's
description and public code that reads it. For research only. Source: Mendonca et al. 2013,
doi:10.1109/EMBC.2013.6610779.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from factory import taxonomy
from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="PH2",
    layout="PH2_dataset.txt, and a folder per case in 'PH2 Dataset images/'",
    licence="LicenseRef-PH2-research-use",
)
_DIAGNOSES = {"0": "common nevus", "1": "atypical nevus", "2": "melanoma"}
_COLORS = {
    "1": "white", "2": "red", "3": "light-brown", "4": "dark-brown", "5": "blue-gray", "6": "black",
}  # fmt: skip


class _Case(NamedTuple):
    """A row of the table."""

    label: str
    histology: bool
    asymmetry: float | None
    colors: tuple[str, ...]


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image, mask or table row, by id; nothing is decoded."""
    root = published.folder(path, "ph2", "PH2 Dataset images", "PH2_dataset.txt", "PH2_dataset.xlsx")
    cases = _table(root / "PH2_dataset.txt")
    folder = root / "PH2 Dataset images"
    images = published.images_in(section, "ph2", *(sorted(folder.glob("*/*_Dermoscopic_Image")) or [folder]))
    masks: dict[str, Path] = {}
    for directory in sorted(folder.glob("*/*_lesion")):
        masks |= published.masks_in(directory, ending="_lesion")
    for name, image, mask, _, problem in published.paired(images, masks, {name: {} for name in cases}):
        case = cases.get(name)
        yield Entry(
            source="ph2", source_id=name, licence=ABOUT.licence, modality="dermoscopic", image=image, mask=mask,
            label=case and case.label, problem=problem,
            confirmation=case and ("histology" if case.histology else "clinical"),
            expert_asymmetry=case and case.asymmetry, expert_colors=case and case.colors,
        )  # fmt: skip


def _table(file: Path) -> dict[str, _Case]:
    """The cases of the published text table; the legend below it is passed over."""
    if not file.exists():
        raise ValueError(
            f"corpus.sources.ph2 must hold {file.name}, got a folder without it (the .xlsx is not read); "
            "take the text table from the published archive."
        )
    cases: dict[str, _Case] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("||")]
        if cells[0].startswith("IMD"):
            case = _case(cells, file)
            if cases.setdefault(cells[0], case) != case:
                raise ValueError(
                    f"{file.name} must describe a case once, got two different rows for {cells[0]}; "
                    "remove the wrong one."
                )
    if not cases:
        raise ValueError(f"{file.name} must hold rows such as '|| IMD003 || ...', got none; download it again.")
    return cases


def _case(cells: list[str], file: Path) -> _Case:
    try:
        _, histology, clinical, criteria, colors = cells
        asymmetry = published.number(criteria.split("|")[0])
        seen = {_COLORS[number] for number in colors.split()}
        return _Case(_DIAGNOSES[clinical], bool(histology), asymmetry, tuple(c for c in taxonomy.COLORS if c in seen))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"the row of {cells[0]} in {file.name} must be as published, got {' || '.join(cells)!r}; download it again."
        ) from error
