"""The real published tables, where this machine has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def published_table() -> Callable[[str], Path]:
    """`published_table("isic2019")` is the folder of a set's published tables; the test is skipped without it."""
    tables = Path(os.environ.get("DERMAFACTORY_PUBLISHED_TABLES") or ROOT / "../shared/data/published_tables").resolve()

    def folder(name: str) -> Path:
        if not (tables / name).is_dir():
            pytest.skip(f"no published tables of {name} here; set DERMAFACTORY_PUBLISHED_TABLES to their folder")
        return tables / name

    return folder
