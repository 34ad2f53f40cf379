"""The cluster profiles, with stand-ins for the schedulers that run the jobs here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from cluster_stand_ins import PBS, SLURM, make_cluster
from workflow_runs import SMOKE, make_checkout, offline, snakemake

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins need Linux")
CELLS = ("cells/stock/lambada", "cells/uniform_k4/lambada")
TOY = """
shell.prefix("set -euo pipefail; ")
rule all:
    input: expand("out/{name}", name=["a", "b"])
rule evaluate:
    output: "out/{name}"
    resources: gpu=0
    shell: "echo {resources.mem_mb} {resources.runtime} > {output}"
"""


@pytest.fixture
def checkout(tmp_path):
    """Snakemake's own commands on a cluster would expand a dollar sign."""
    return make_checkout(tmp_path / "it's a checkout")


@pytest.fixture
def slurm(tmp_path):
    return make_cluster(tmp_path / "slurm", SLURM)


@pytest.fixture
def toy(checkout):
    (checkout / "toy").write_text(TOY)
    return checkout


TOY_RUN = (
    "-s", "toy", "--workflow-profile", "profiles/slurm", "--latency-wait", "5",
    "--slurm-init-seconds-before-status-checks", "1",
)  # fmt: skip


@pytest.mark.parametrize("accounting", ["refuses", "hangs", "is not installed"])
def test_a_cancelled_slurm_job_is_run_again_without_accounting(toy, slurm, tmp_path, accounting):
    """States are asked of squeue. Whoever names no account has it asked of sacct, once."""
    sacct = tmp_path / "slurm" / "sacct"
    if accounting != "refuses":
        sacct.unlink()
    if accounting == "hangs":
        sacct.write_text('#!/bin/sh\ncase "$*" in *Account*) exit 1 ;; esac\nexec sleep 100000\n')
        sacct.chmod(0o755)
    (tmp_path / "slurm" / "cancel").write_text("name=a")
    done = snakemake(toy, *TOY_RUN, PATH=slurm, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "SLURM status is: 'CANCELLED'" in said
    assert (toy / "out/a").exists()
    assert (toy / "out/b").exists()
    states = [path.read_text().strip() for path in (tmp_path / "slurm/jobs").glob("*.state")]
    assert sorted(states) == ["CANCELLED", "COMPLETED", "COMPLETED"]


def test_a_job_that_ended_while_the_main_process_was_suspended_is_found_after_a_restart(
    toy, slurm, tmp_path
):
    """The README's limit: squeue has forgotten the job, so this run waits until it is killed."""
    ended = tmp_path / "slurm" / "jobs" / "1.state"
    with subprocess.Popen(
        [sys.executable, "-m", "snakemake", *TOY_RUN, "out/a"],  # the process that is suspended
        cwd=toy, env=offline(PATH=slurm), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as run:  # fmt: skip
        while not ended.exists():
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGSTOP)
        while ended.read_text().strip() != "COMPLETED":
            time.sleep(0.05)
        (tmp_path / "slurm" / "forget").touch()
        run.send_signal(signal.SIGCONT)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(timeout=10)
        os.killpg(run.pid, signal.SIGKILL)
    unlocked = snakemake(toy, "-s", "toy", "--unlock")
    assert unlocked.returncode == 0, unlocked.stderr
    (tmp_path / "slurm" / "forget").unlink()
    done = snakemake(toy, *TOY_RUN, PATH=slurm, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert (toy / "out/a").exists()
    assert (toy / "out/b").exists()


def test_a_dollar_sign_in_the_folder_is_refused_before_any_job(slurm, tmp_path):
    """Snakemake's own commands on a cluster would expand it."""
    folder = make_checkout(tmp_path / "a $HOME")
    (tmp_path / "slurm" / "jobs").mkdir(exist_ok=True)
    done = snakemake(
        folder, "results/smoke/model.json", "--workflow-profile", "profiles/slurm", *SMOKE,
        PATH=slurm,
    )  # fmt: skip
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error:" in line]
    assert len(said) == 1
    assert f"error: {folder}: has a dollar sign" in said[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (folder / "results/smoke/model.json").exists()


@pytest.mark.parametrize(
    ("profile", "commands", "often"),
    [
        ("generic", PBS, ("--seconds-between-status-checks", "1")),
        ("slurm", SLURM, ("--slurm-init-seconds-before-status-checks", "1")),
    ],
)
def test_cells_are_the_same_bytes_as_on_one_machine(
    smoke_run, checkout, tmp_path, profile, commands, often
):
    """One of the jobs is cancelled, and run again."""
    (tmp_path / profile).mkdir()
    path = make_cluster(tmp_path / profile / "bin", commands)
    word = "evaluate" if profile == "generic" else "name=stock"
    (tmp_path / profile / "bin" / "cancel").write_text(word)
    done = snakemake(
        checkout, "--workflow-profile", f"profiles/{profile}", *SMOKE, *often,
        "--latency-wait", "10", *(f"results/smoke/{cell}.json" for cell in CELLS), PATH=path,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "Trying to restart job" in said
    for cell in CELLS:
        local, there = (folder / "results/smoke" / cell for folder in (smoke_run[0], checkout))
        assert (
            local.with_suffix(".parquet").read_bytes() == there.with_suffix(".parquet").read_bytes()
        )
        records = [json.loads(one.with_suffix(".json").read_text()) for one in (local, there)]
        assert {key for key in records[0] if records[0][key] != records[1][key]} <= {"timings"}
    assert len(pd.read_parquet(there.with_suffix(".parquet"))) == 8
