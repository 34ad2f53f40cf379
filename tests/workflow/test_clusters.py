"""The cluster profiles, with stand-ins for the schedulers that run the jobs here."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest
from cluster_stand_ins import PBS, SLURM, make_cluster
from warm_python import warm_python
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


def run_toy(folder, path, *arguments, timeout=300):
    profile = ("--workflow-profile", "profiles/slurm", "--slurm-init-seconds-before-status-checks")
    return snakemake(
        folder, "-s", "toy", *profile, "1", "--latency-wait", "5", *arguments, PATH=path,
        timeout=timeout,
    )  # fmt: skip


def test_a_cancelled_slurm_job_is_run_again_without_accounting(toy, slurm, tmp_path):
    (tmp_path / "slurm" / "cancel").write_text("name=a")
    done = run_toy(toy, slurm)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "SLURM status is: 'CANCELLED'" in said
    assert (toy / "out/a").exists()
    assert (toy / "out/b").exists()
    states = [path.read_text().strip() for path in (tmp_path / "slurm/jobs").glob("*.state")]
    assert sorted(states) == ["CANCELLED", "COMPLETED", "COMPLETED"]


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
    with warm_python(offline(PATH=path)) as warm:
        done = snakemake(
            checkout, "--workflow-profile", f"profiles/{profile}", *SMOKE, *often,
            "--latency-wait", "10", *(f"results/smoke/{cell}.json" for cell in CELLS), PATH=warm,
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
