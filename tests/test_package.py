"""The package's public face: its names, its types, and the examples of its documentation."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import moe_routing

SOURCE = Path(moe_routing.__file__)


def test_dir_lists_the_public_names_and_every_one_can_be_had():
    assert {*dir(moe_routing)} == {*moe_routing.__all__, "__version__"}
    for name in dir(moe_routing):
        assert getattr(moe_routing, name) is not None


def test_dir_imports_nothing():
    code = "import sys, moe_routing; dir(moe_routing); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_type_checkers_see_what_is_imported_on_first_use():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == moe_routing._HOMES
    assert {*typed} == {*moe_routing.__all__}
    assert SOURCE.with_name("py.typed").is_file()
