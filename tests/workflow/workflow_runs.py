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


def make_quarto(folder):
    """Write the stand-in for Quarto as a program, and return a PATH that begins with its folder."""
    folder.mkdir()
    program = folder / "quarto"
    stand_in = Path(__file__).with_name("quarto_stand_in.py")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" "$@"\n')
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def snakemake(folder, *arguments, timeout=3600, environment=None, **variables):
    """Run Snakemake as a user does; without a network for the hub, unless given an environment."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    environment = (environment or {**os.environ, "HF_HUB_OFFLINE": "1"}) | variables
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
