"""Checkouts to run Snakemake in."""

from __future__ import annotations

import pytest
from workflow_runs import make_checkout, make_quarto, snakemake


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a folder whose name a shell would not take as it is."""
    return make_checkout(tmp_path / "it's a $HOME")


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """The smoke study, run once: the folder and Snakemake's own report of the run.

    A stand-in for Quarto is on the PATH.
    """
    folder = make_checkout(tmp_path_factory.mktemp("smoke"))
    path = make_quarto(tmp_path_factory.mktemp("programs") / "bin")
    done = snakemake(folder, "--cores", "2", "--configfile", "config/smoke.yaml", PATH=path)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done
