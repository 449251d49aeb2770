"""The house: imports point down only, Ray lives on one floor, and naming a recipe loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {
    "records", "labels", "taxonomy", "tables", "manifest", "fingerprint", "parts", "lock", "run", "recipe",
    "recipe_yaml", "sections", "storage", "images", "prompts", "banks", "instructions", "wording", "phantom",
    "progress",
}  # fmt: skip
_BELOW_STAGES = {"ground", "corpora", "models", "quality"}
_BELOW_RUNTIME = _BELOW_STAGES | {"fits", "stages"}
# What each floor may import beside itself. lab, release and runtime do not know each other.
MAY_IMPORT: dict[str, set[str]] = {
    "ground": set(),
    "corpora": {"ground"},
    "models": {"ground"},
    "quality": {"ground"},
    "fits": _BELOW_STAGES,
    "stages": _BELOW_STAGES,
    "gateway": _BELOW_STAGES | {"stages"},
    "lab": _BELOW_RUNTIME,
    "release": _BELOW_RUNTIME,
    "runtime": _BELOW_RUNTIME | {"gateway"},
    "caption_study": _BELOW_RUNTIME | {"lab", "release"},  # a step of the line that has a file of its own
    "evaluations": _BELOW_RUNTIME | {"lab", "release", "runtime", "caption_study"},  # and this one
    "line": _BELOW_RUNTIME | {"lab", "release", "runtime", "evaluations"},
    "cli": _BELOW_RUNTIME | {"lab", "release", "runtime", "evaluations", "line", "cli_gate"},
    "cli_gate": _BELOW_RUNTIME | {"gateway", "runtime"},  # a command with commands of its own
}
LIGHT = {"ground", "cli", "cli_gate", "evaluations", "line"}  # what is imported before a request is known to be right
HEAVY = {"torch", "torchvision", "ray", "diffusers", "transformers", "timm", "peft", "pandas"}
MODULES = sorted(path for path in (ROOT / "factory").rglob("*.py") if path.name != "__init__.py")


def floor_of(module: str) -> str | None:
    """`factory.models.joint` -> `models`, `factory.tables` -> `ground`; None for the package itself."""
    name = module.split(".")[1] if "." in module else None
    return "ground" if name in GROUND else name


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere in a tree; `from factory import tables` counts as factory.tables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_module_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without what only a type checker reads."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    kept = [node for node in kept if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return ast.Module(body=[node for node in kept if not isinstance(node, ast.ClassDef)], type_ignores=[])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_its_own_floor_and_those_below(path: Path) -> None:
    floor = floor_of(name_of(path))
    assert floor in MAY_IMPORT, f"{name_of(path)} is on no floor: say in this test where it belongs"
    wanted = {floor_of(name) for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "factory"}
    above = wanted - MAY_IMPORT[floor] - {floor, None, "__version__"}
    assert not above, f"{name_of(path)} ({floor}) imports from {', '.join(sorted(map(str, above)))}"


def test_ray_is_imported_on_one_floor() -> None:
    users = {
        name_of(path)
        for path in [*MODULES, *(ROOT / "jobs").rglob("*.py")]
        if "ray" in {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    }
    assert users
    assert {floor_of(user) for user in users} == {"runtime"}, sorted(users)


@pytest.mark.parametrize("path", [p for p in MODULES if floor_of(name_of(p)) in LIGHT], ids=name_of)
def test_the_ground_floor_the_line_and_the_command_import_nothing_heavy(path: Path) -> None:
    loaded = {name.split(".")[0] for name in imports(at_module_level(ast.parse(path.read_text())))}
    assert not loaded & HEAVY


def test_naming_a_request_loads_neither_torch_nor_ray_nor_pandas() -> None:
    script = "import sys, factory.cli, factory.line; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"factory", "typer"} <= loaded
    assert not loaded & HEAVY


def test_pins_name_no_address_and_every_one_has_a_hash() -> None:
    # Where packages come from is the installer's business: an address in a pin file would decide it for everybody.
    for name in ("requirements.txt", "constraints.txt"):
        if (ROOT / name).exists():
            text = (ROOT / name).read_text()
            assert not re.search(r"https?://|--(extra-)?index-url|--find-links|git\+", text), name
    pins = re.split(r"(?m)^(?=[A-Za-z0-9])", (ROOT / "requirements.txt").read_text())[1:]
    assert len(pins) > 50
    assert all("==" in pin and "--hash=sha256:" in pin for pin in pins)
