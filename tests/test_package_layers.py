"""The order of the package's layers: a later one imports an earlier one, never the reverse."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
LAYERS = (
    {"errors"},
    {"files", "hub", "schema", "usage", "vocabulary"},
    {"cli", "routing", "wording"},
    {"config"},
    {"data", "statistics"},
    {"engine"},
    {"evaluation"},
    {"analysis"},
    {"figures"},
    {"reporting"},
    {"workflow", "lm_eval_plugin", "__init__"},
    {"commands"},
)
"""From the bottom up. Within a layer, packages do not import each other."""


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, those for type checking and inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def place(part: str) -> int:
    """Return the number of the layer that a part of the package belongs to."""
    found = [number for number, parts in enumerate(LAYERS) if part in parts]
    assert len(found) == 1, f"moe_routing.{part} has no place in LAYERS"
    return found[0]


def part_of(path: Path) -> str:
    """Return the part of the package that a file belongs to: its folder, or the module."""
    return path.relative_to(SOURCE / "moe_routing").parts[0].removesuffix(".py")


MODULES = sorted((SOURCE / "moe_routing").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_no_import_runs_backwards(path: Path) -> None:
    own = part_of(path)
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] != "moe_pretraining", f"{path}: the study does not import {name}"
        if parts[0] == "moe_routing" and len(parts) > 1 and parts[1] != own:
            assert place(parts[1]) < place(own), f"{path} imports {name}, of a later layer"


def test_the_check_sees_a_backward_import(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from moe_routing.reporting import tables\n")
    assert list(imports(file)) == ["moe_routing.reporting.tables"]
    assert place("reporting") > place("routing")
