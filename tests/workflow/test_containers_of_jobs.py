"""With ``--sdm apptainer`` every job runs in the image that envs/apptainer.def makes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from workflow_runs import SMOKE, make_checkout, snakemake

ITEMS = "results/smoke/data/lambada.parquet"


@pytest.fixture
def plain(tmp_path):
    """A checkout in a folder without a space, which Snakemake refuses in the path of an image."""
    return make_checkout(tmp_path / "checkout")


@pytest.fixture
def apptainer(tmp_path):
    """The stand-in as a program; returns a PATH with it, and the file of its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in = shutil.copy(Path(__file__).with_name("apptainer_stand_in.py"), folder)
    program = folder / "apptainer"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" "$@"\n')
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}", folder / "calls.jsonl"


def in_containers(folder, path, *arguments):
    return snakemake(folder, "--sdm", "apptainer", *SMOKE, *arguments, PATH=path)


def test_jobs_run_in_the_image_of_the_recipe(plain, apptainer):
    path, calls = apptainer
    (plain / "envs" / "jobs.sif").touch()
    done = in_containers(plain, path, "--cores", "1", ITEMS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (plain / ITEMS).is_file()
    made = [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()]
    scripts = ("fetch_model.py", "fetch_data.py", "prepare_data.py")
    for script, call in zip(scripts, made, strict=True):
        assert call[0] == "exec"
        assert call[call.index("--home") + 1] == str(plain)
        assert call[-4:-1] == ["envs/jobs.sif", "bash", "-c"]
        assert f'python "$SCRIPTS/{script}"' in call[-1]


def test_an_image_that_was_not_built_is_asked_for_before_any_job(plain, apptainer):
    done = in_containers(plain, apptainer[0], "--cores", "1", ITEMS)
    assert done.returncode != 0
    assert (
        "error: envs/jobs.sif: no such image; make it with: apptainer build envs/jobs.sif "
        "envs/apptainer.def" in done.stderr.splitlines()
    )
    assert not (plain / "results").exists()
