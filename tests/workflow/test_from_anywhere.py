"""The workflow from another folder, as a module, read-only, and on a machine with results only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from without_torch import without_torch
from workflow_runs import ROOT, make_checkout, offline, snakemake

from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.workflow import checkout_of, finished_elsewhere, located

MODULE = """
configfile: "my.yaml"

module study:
    snakefile: {snakefile!r}
    config: config

use rule * from study as study_*

onstart:
    study.onstart()

rule all:
    default_target: True
    input: rules.study_all.input
"""
DEPLOYED = """
configfile: "my.yaml"

module deployed:
    snakefile:
        {snakefile!r}
    config:
        config

use rule * from deployed

onstart:
    deployed.onstart()
"""
"""What snakedeploy writes, with the two changes that README.md names."""
ITEMS = "results/smoke/data/lambada.parquet"


@pytest.fixture
def read_only(tmp_path):
    """A checkout in which nothing may change."""
    folder = make_checkout(tmp_path / "somebody's $HOME" / "checkout")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def contents(folder):
    found = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return {path: path.stat().st_mtime_ns for path in found if path.is_file()}


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    return folder


def test_another_working_directory(read_only, here, tmp_path):
    done = snakemake(
        tmp_path, ITEMS, "-s", str(read_only / "Snakefile"), "-d", str(here), "--cores", "2",
        "--configfile", str(read_only / "config/smoke.yaml"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (here / ITEMS).is_file()
    assert (here / "results/smoke/run.json").read_text() == (
        '{"config_file": "results/smoke/config.yaml"}\n'
    )


def test_another_working_directory_has_the_default_study(read_only, here):
    done = snakemake(here, "-s", str(read_only / "Snakefile"), "-n")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Scoring absolute_k8_b3 on wikipedia" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "snakefile", "rule"),
    [
        (MODULE, "Snakefile", "study_render_article"),
        (DEPLOYED, "workflow/Snakefile", "render_article"),
    ],
    ids=["module", "snakedeploy"],
)
def test_a_module_of_another_workflow(read_only, here, text, snakefile, rule):
    shutil.copy(read_only / "config/smoke.yaml", here / "my.yaml")
    (here / "workflow").mkdir()
    main = here / "workflow" / "Snakefile"
    main.write_text(text.format(snakefile=str(read_only / snakefile)))
    planned = snakemake(here, "-n")
    assert planned.returncode == 0, planned.stderr[-4000:]
    assert re.search(rf"\b{rule}\b", planned.stdout + planned.stderr)
    done = snakemake(here, "--cores", "2", ITEMS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (here / ITEMS).is_file()


def test_a_module_that_is_not_on_this_machine_is_refused():
    rules = "https://github.com/owner/name/raw/v1/workflow/rules"
    with pytest.raises(InputError) as refused:
        checkout_of(rules)
    assert str(refused.value) == (
        f"{rules}: the jobs run scripts of the checkout; allowed as the snakefile of a module: the "
        "Snakefile of a clone on this machine"
    )


def test_an_archive_makes_tables_and_figures_without_torch(smoke_run, here, tmp_path):
    """Unpacked beside nothing but a config; the tables come out as they were.

    The article, which takes longest, is planned only; test_without_torch_scripts.py renders one.
    """
    folder = smoke_run[0]
    subprocess.run(
        ["python", "scripts/archive.py", "--results", "results/smoke", "--out", tmp_path / "a.tgz"],
        cwd=folder, env=offline(PYTHONPATH=str(folder / "src")), check=True,
    )  # fmt: skip
    with tarfile.open(tmp_path / "a.tgz") as archive:
        archive.extractall(here / "results", filter="data")
    results = here / "results" / "smoke"
    assert not list((results / "calibration").glob("*.safetensors"))
    names = [
        f"{folder.name}/{path.name}"
        for folder in results.iterdir()
        for path in folder.glob("*.csv")
    ]
    before = {name: (results / name).read_bytes() for name in names}
    for name in ("site", "bin"):
        (tmp_path / name).mkdir()
    # The jobs get a PYTHONPATH of their own.
    program = tmp_path / "bin" / "python"
    words = f'export PYTHONPATH="{tmp_path / "site"}:$PYTHONPATH"; exec "{sys.executable}"'
    program.write_text(f'#!/bin/sh\n{words} "$@"\n')
    program.chmod(0o755)

    def run(*arguments):
        done = snakemake(
            here, *arguments, "-s", str(folder / "Snakefile"),
            "--configfile", "results/smoke/config.yaml",
            environment=without_torch(tmp_path / "site", folder / "src"),
            PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout + done.stderr

    pages = ("comparison/ROUTING_COMPARISON_REPORT.md", "validity/validity_plots/simulation.png")
    targets = [f"results/smoke/{name}" for name in pages]
    run(*targets, "--cores", "2", "--forcerun", "collect", "plot_validity")
    for name in pages:
        assert (results / name).stat().st_mtime > (results / "model.json").stat().st_mtime
    assert {name: (results / name).read_bytes() for name in names} == before
    assert set(re.findall(r"^(\w+) +1$", run("-n"), re.MULTILINE)) == {"all", "render_article"}


def test_results_without_their_model_are_not_made_again(smoke_run, tmp_path):
    """A plain copy of them, in a checkout without the model: no metadata, other times."""
    folder = make_checkout(tmp_path / "checkout")
    (folder / "resources").unlink()
    shutil.copytree(smoke_run[0] / "results", folder / "results", copy_function=shutil.copyfile)
    done = snakemake(folder, "-n", "--configfile", "config/smoke.yaml")
    plan = done.stdout + done.stderr
    assert done.returncode == 0, plan[-4000:]
    for rule in ("fetch_model", "sample_logits", "evaluate", "bh "):
        assert f"\n{rule}" not in plan


def test_relative_paths_are_looked_up_here_and_then_in_the_checkout(tmp_path, monkeypatch):
    study = load_config(ROOT / "config/smoke.yaml")
    monkeypatch.chdir(tmp_path)
    found = located(study, ROOT)
    assert found.model.path == str(ROOT / study.model.path)
    lambada = "tests/data_files/lambada.jsonl"
    assert found.datasets["lambada"].source.path == str(ROOT / lambada)
    Path(lambada).parent.mkdir(parents=True)
    Path(lambada).touch()
    assert located(study, ROOT).datasets["lambada"].source.path == lambada
    assert located(study, tmp_path / "nowhere") == study  # the job reports what is missing


def test_a_checkout_in_the_working_directory_is_named_relative_to_it(tmp_path, monkeypatch):
    rules = tmp_path / "checkout" / "workflow" / "rules"
    rules.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkout")
    assert checkout_of(str(rules)) == Path()
    monkeypatch.chdir(rules)
    assert checkout_of(str(rules)) == tmp_path / "checkout"


def test_unfinished_results_are_never_taken_for_finished_ones(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_routing.workflow.find_spec", lambda name: None)
    monkeypatch.chdir(smoke_run[0])
    study = load_config("config/smoke.yaml")
    results = tmp_path / "smoke"
    shutil.copytree("results/smoke", results, ignore=shutil.ignore_patterns("*.safetensors"))
    assert finished_elsewhere(study, results, own_python=True)
    assert not finished_elsewhere(study, results, own_python=False)  # jobs may have torch
    (results / "cells/stock/lambada.json").unlink()
    assert not finished_elsewhere(study, results, own_python=True)
    (results / "archived.txt").touch()
    assert finished_elsewhere(study, results, own_python=False)
