"""A checkout of its own for each workflow run, so that tests touch no results of the user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("workflow", "scripts", "src", "config", "envs", "profiles", "report")


def make_checkout(folder):
    """Copy what a run needs; the model is linked, because it is large."""
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "data_files", folder / "tests" / "data_files")
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "resources").symlink_to(ROOT / "resources")
    return folder


def snakemake(folder, *arguments, timeout=3600):
    """Run Snakemake as a user does, without a network for the hub."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
