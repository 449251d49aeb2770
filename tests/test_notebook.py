"""The notebook runs from its first cell to its last on a bare installation, and is stored without what it printed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks/01-a-first-run.ipynb"
PATIENCE_S = 600  # for one cell; the imports alone take long on a loaded machine
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn", "opencv-python-headless": "cv2"}


def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def cells_of(notebook: Any, kind: str) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def test_it_is_stored_without_outputs_and_every_piece_of_code_has_its_words() -> None:
    code = cells_of(stored(), "code")
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    kinds = [cell.cell_type for cell in stored().cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert "code code" not in " ".join(kinds)


def test_it_imports_what_the_package_depends_on_and_ipython() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[<>=;]", wanted)[0].strip().lower() for wanted in project["dependencies"]]
    declared = {IMPORTED_AS.get(name, name) for name in names} | {"factory", "IPython"} | sys.stdlib_module_names
    imported: set[str] = set()
    for cell in cells_of(stored(), "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert imported <= declared


def test_it_runs_to_its_end_and_the_gate_rejects_the_planted_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = stored()
    NotebookClient(
        notebook, timeout=PATIENCE_S, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    outputs = [output for cell in cells_of(notebook, "code") for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 7
    assert re.search(r"the moved mask\s+rejected, low_iou", printed)
    assert re.search(r"^outcome\s+(accepted|rejected)$", printed.split("calls_run")[-1], re.MULTILINE)
