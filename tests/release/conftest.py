from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tiny_run.TinyRun:
    """40 samples of 44 planned: 28 accepted, 8 rejected (4 with pixels), 4 failed. Read-only."""
    return tiny_run.build(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def fresh_run(tmp_path: Path) -> tiny_run.TinyRun:
    """The same, to be changed."""
    return tiny_run.build(tmp_path / "fresh")
