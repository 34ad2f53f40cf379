"""The jobs behind the cells run where torch is not installed, and write the same files."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pandas as pd
import pytest
from planted_results import ROOT
from without_torch import without_torch

FREE = ("cells", "numerics", "efficiency", "config.yaml", "model.json")
"""What the jobs of a model leave behind."""

SCRIPTS = """
import runpy, sys
scripts, results = sys.argv[1:]
for name in ("collect", "compute_statistics", "figures", "comparison_report"):
    sys.argv = [name, "--results", results]
    try:
        runpy.run_path(f"{scripts}/{name}.py", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
"""
"""One process for all, which imports once what they share."""


@pytest.fixture(scope="module")
def folder(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("free")
    for name in FREE:
        source = planted.folder / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    return folder


def test_tables_figures_and_report_are_the_same_without_torch(planted, folder, tmp_path):
    environment = without_torch(tmp_path, ROOT / "src")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPTS, ROOT / "scripts", folder],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for path in planted.folder.glob("statistics/*.csv"):
        assert (folder / "statistics" / path.name).read_bytes() == path.read_bytes()
    cells = "comparison/full_routing_results.csv"
    pd.testing.assert_frame_equal(pd.read_csv(folder / cells), pd.read_csv(planted.folder / cells))
    names = {path.name for path in planted.folder.glob("comparison/comparison_plots/*")}
    assert {path.name for path in folder.glob("comparison/comparison_plots/*")} == names
    report = "comparison/ROUTING_COMPARISON_REPORT.md"
    assert (folder / report).read_text() == (planted.folder / report).read_text()
