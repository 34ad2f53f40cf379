"""Config, statistics, figures and reports work where torch and transformers are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from without_torch import without_torch

ROOT = Path(__file__).resolve().parents[1]

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

names = ["moe_routing." + name for name in (
    "vocabulary", "config", "schema", "workflow", "analysis.outputs",
    "evaluation.collect", "routing.strategies", "data", "statistics",
    "figures", "reporting",
)]
for name in names:
    package = importlib.import_module(name)
    for info in pkgutil.walk_packages(getattr(package, "__path__", ()), package.__name__ + "."):
        importlib.import_module(info.name)
        names.append(info.name)
from moe_routing.config.study import load_config
from moe_routing.routing.strategies import control_kinds, families

load_config("config/config.yaml")
assert families() and control_kinds()
assert not {"torch", "transformers"} & set(sys.modules)
print(len(names))
"""


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_neither_package_can_be_imported_there(tmp_path, name):
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        env=without_torch(tmp_path, ROOT / "src"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"No module named '{name}'" in done.stderr


def test_every_module_of_the_later_stages_is_imported_without_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], cwd=ROOT,
        env=without_torch(tmp_path, ROOT / "src"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 70
