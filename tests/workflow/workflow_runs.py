"""A checkout of its own for each workflow run, so that tests touch no results of the user."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from warm_python import SLOW_IMPORTS, SNAKEMAKE_IMPORTS, warm_python

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ("--configfile", "config/smoke.yaml")
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


def offline(**variables):
    """Return the environment of a run without a network for the hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", **variables}


@cache
def warm_folder():
    """Return the folder of a Python that has imported what takes Snakemake and jobs longest.

    It is kept for all tests of this process. Imports take more than half of the time in which
    Snakemake plans, and most of that of a job.
    """
    if sys.platform != "linux":  # see warm_python
        return str(Path(sys.executable).parent)
    server = warm_python(offline(), (*SNAKEMAKE_IMPORTS, *SLOW_IMPORTS))
    path = server.__enter__()
    atexit.register(server.__exit__, None, None, None)
    return path.split(os.pathsep)[0]


def warm_path(path=None):
    """Return a PATH, by default that of this process, that begins with the warm Python."""
    return f"{warm_folder()}{os.pathsep}{path or os.environ['PATH']}"


def snakemake_command(*arguments, python=None):
    """Return a command that ends within a second of its last job, not the profile's three."""
    python = python or shutil.which("python", path=warm_folder())
    return [python, "-m", "snakemake", "--max-jobs-per-timespan", "100/1s", *arguments]


def snakemake(folder, *arguments, timeout=3600, environment=None, **variables):
    """Run Snakemake without a network for the hub, or in a given environment.

    Snakemake and its jobs are forks of the warm Python, unless an environment is given: that may
    change what is imported. A stand-in for Quarto beside the folder is on the PATH, as when its
    study was made.
    """
    if (folder.parent / "bin" / "quarto").is_file():
        variables = {"PATH": f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"} | variables
    if environment is None:
        command = snakemake_command(*arguments)
        variables["PATH"] = warm_path(variables.get("PATH"))
    else:
        command = snakemake_command(*arguments, python=sys.executable)
    return subprocess.run(
        command, cwd=folder, env=(environment or offline()) | variables,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def make_smoke_study(folder):
    """Run the smoke study in ``folder``/checkout: kill it amid its scoring, then run it again.

    Everything that is tested of the study is thus tested of one that was killed. A stand-in for
    Quarto is on the PATH. What the last run says is in ``folder``/snakemake.out.
    """
    make_quarto(folder / "bin")
    checkout = make_checkout(folder / "checkout")
    kill_while_scoring(checkout, "--cores", "2", *SMOKE)
    unlocked = snakemake(checkout, "--unlock", *SMOKE)
    assert unlocked.returncode == 0, unlocked.stderr
    done = snakemake(checkout, "--cores", "2", *SMOKE)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "snakemake.out").write_text(done.stdout, encoding="utf-8")


def kill_while_scoring(folder, *arguments):
    """Start a run of the smoke study, and kill all of it as soon as a few cells are scored."""
    results = folder / "results" / "smoke"
    path = warm_path(f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with subprocess.Popen(
        snakemake_command(*arguments), cwd=folder, env=offline(PATH=path),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as run:  # fmt: skip
        while len(list(results.glob("store/cells/*/*.json"))) < 5:
            assert run.poll() is None, "the run ended before any cell was scored"
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
    assert (results / "config.yaml").exists()
    assert not (results / "comparison" / "full_routing_results.csv").exists()
