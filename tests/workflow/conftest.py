"""Checkouts to run Snakemake in."""

from __future__ import annotations

import shutil

import pytest
from shared import shared_folder
from workflow_runs import make_checkout, make_quarto, make_smoke_study


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a folder whose name a shell would not take as it is."""
    return make_checkout(tmp_path / "it's a $HOME")


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """The smoke study, once killed and then finished: the folder and Snakemake's report.

    The study is run once, and every worker has a copy of its own.
    """
    made = shared_folder(tmp_path_factory, "smoke_study", make_smoke_study)
    folder = tmp_path_factory.mktemp("smoke") / "checkout"
    shutil.copytree(made / "checkout", folder, symlinks=True)
    make_quarto(folder.parent / "bin")
    return folder, (made / "snakemake.out").read_text(encoding="utf-8")
