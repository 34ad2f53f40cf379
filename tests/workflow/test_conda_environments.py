"""Which environments ``--sdm conda`` would make for a study."""

from __future__ import annotations

import json
import os
import re

import pytest
from workflow_runs import SMOKE, make_checkout, snakemake

CONDA = """\
#!/bin/sh
case "$*" in
"info --json") echo '{information}' ;;
"--version") echo "conda 26.7.0" ;;
*) echo '{{"get": {{"channel_priority": "strict"}}}}' ;;
esac
"""
"""A stand-in that answers what Snakemake asks before it plans."""


@pytest.fixture
def with_conda(tmp_path):
    """A PATH with the stand-in."""
    folder = tmp_path / "conda" / "bin"
    folder.mkdir(parents=True)
    about = {"conda_prefix": str(folder.parent), "platform": "linux-64", "conda_version": "26.7.0"}
    program = folder / "conda"
    program.write_text(CONDA.format(information=json.dumps(about)))
    program.chmod(0o755)
    (folder / "activate").touch()
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(("gpu", "model"), [(0, "model"), (1, "model-gpu")])
def test_a_study_on_gpus_takes_the_environment_for_gpus(tmp_path, with_conda, gpu, model):
    folder = make_checkout(tmp_path / "checkout")
    resources = ("--config", f"resources={{gpu: {gpu}}}")
    planned = snakemake(folder, "-n", "--sdm", "conda", *SMOKE, *resources, PATH=with_conda)
    said = planned.stdout + planned.stderr
    assert planned.returncode == 0, said[-4000:]
    made = re.findall(r"Conda environment \S*envs/([\w-]+)\.yaml will be created", said)
    reports = {"report", "report-preview"}
    assert {*made} - reports == {"analysis", model}
    assert len({*made} & reports) == 1
