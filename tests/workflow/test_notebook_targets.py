"""What a notebook reads is among the files it asks the workflow for, or these are made from it."""

from __future__ import annotations

import ast
import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from workflow_runs import ROOT, SMOKE, snakemake

from moe_routing.reporting.pages import NOTEBOOKS
from moe_routing.reporting.qmd import read_page
from moe_routing.workflow import write_run

STUDY = {"model.json", "comparison/full_routing_results.csv", "comparison/all_metrics.csv"}
"""Files without which an Article cannot be loaded."""

TOPICS = {
    "ablation": "ablation/ablation.csv",
    "recommendation": "bh/recommendation.json",
    "validity": "validity/verdict.csv",
}
"""Files that topics are written from; the others are from the statistics."""


def code_of(name):
    _, notebook = read_page(ROOT / "report" / "notebooks" / f"{name}.qmd")
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def path_of(node, known):
    """The path that an expression such as ``results / "bh" / name`` gives; names become stars."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
        return None
    left = path_of(node.left, known)
    right = node.right.value if isinstance(node.right, ast.Constant) else "*"
    return None if left is None else f"{left}/{right}".lstrip("/")


def paths_read(code):
    """Patterns of the paths under the results folder that code names."""
    known, found = {"results": ""}, set()
    for statement in ast.parse(code).body:
        found |= {path for node in ast.walk(statement) if (path := path_of(node, known))}
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            known[statement.targets[0].id] = path_of(statement.value, known)
        known["results"] = ""
    if "Article.load" in code:
        found |= STUDY
    topics = re.findall(r'\ba\.(?:say|listing)\("(\w+)"', code)
    found |= {TOPICS.get(topic, "statistics/primary.csv") for topic in topics}
    return found


def files_asked(code):
    call = next(
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "start"
    )
    return [argument.value for argument in call.args[1:]]


def test_paths_are_found_in_code():
    code = 'f = results / "a"\nx = f / "b.csv"\nread(f / x / f"{y}.csv", results / "c" / "d")\n'
    assert paths_read(code) == {"a", "a/b.csv", "a/*", "a/*/*", "c", "c/d"}
    assert files_asked('r = start(CONFIG, "a.csv", "b.csv")') == ["a.csv", "b.csv"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_asks_for_what_it_reads(checkout, name):
    code = code_of(name)
    targets = [f"results/smoke/{file}" for file in files_asked(code)]
    plan = snakemake(checkout, *targets, "--summary", *SMOKE)
    assert plan.returncode == 0, plan.stderr
    made = [line.split("\t")[0] for line in plan.stdout.splitlines() if "\t" in line]
    made = {"config.yaml", *(file.removeprefix("results/smoke/") for file in made)}
    read = paths_read(code)
    assert len(read) > 3
    lacking = {
        path
        for path in read
        if not any(fnmatch(file, path) or file.startswith(f"{path}/") for file in made)
    }
    assert lacking == set()


@pytest.mark.parametrize(
    ("files", "changed", "noted"),
    [
        (["config/mine.yaml"], False, "config/mine.yaml"),
        ([Path("config/mine.yaml").absolute], False, "config/mine.yaml"),
        (["config/mine.yaml"], True, "results/mine/config.yaml"),
        (["config/mine.yaml", "config/more.yaml"], False, "results/mine/config.yaml"),
        (["../mine.yaml"], False, "results/mine/config.yaml"),
        ([], True, "results/mine/config.yaml"),
    ],
)
def test_the_config_that_makes_a_study_again_is_noted(tmp_path, monkeypatch, files, changed, noted):
    monkeypatch.chdir(tmp_path)
    files = [file() if callable(file) else file for file in files]
    path = Path("results/mine/run.json")
    write_run(files, changed=changed, path=path)
    assert json.loads(path.read_text()) == {"config_file": noted}


@pytest.mark.parametrize(
    ("more", "noted"),
    [((), "config/smoke.yaml"), (("--config", "seed=3"), "results/smoke/config.yaml")],
)
def test_a_run_notes_its_config(checkout, more, noted):
    target = "results/smoke/model.json"
    done = snakemake(checkout, target, "--cores", "1", *SMOKE, *more)
    assert done.returncode == 0, done.stderr
    assert json.loads((checkout / "results/smoke/run.json").read_text()) == {"config_file": noted}
