"""With Quarto on the PATH the study ends with Quarto's pages, which call no other host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from quarto_stand_in import GENERATOR, WIDGETS
from workflow_runs import SMOKE, make_quarto, snakemake

from moe_routing.reporting.pages import ARTICLE, NOTEBOOKS, outputs

PAGES = [f"{ARTICLE}.html", *(f"notebooks/{name}.html" for name in NOTEBOOKS)]


def test_the_study_ends_with_the_pages_of_quarto(smoke_run):
    report = smoke_run[0] / "results" / "smoke" / "report"
    assert {path.relative_to(report).as_posix() for path in report.rglob("*.*")} == set(outputs())
    log = (smoke_run[0] / "results" / "smoke" / "logs" / "render_article.log").read_text()
    assert "results/smoke/report/index.html (quarto)\n" in log
    assert "warning" not in log
    assert "results/smoke/report/index.html (quarto)\n" in smoke_run[1]


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_quarto_have_tables_and_call_no_other_host(smoke_run, page):
    text = (smoke_run[0] / "results" / "smoke" / "report" / page).read_text(encoding="utf-8")
    assert GENERATOR in text
    assert "<table" in text
    assert re.findall(r"<script[^>]*\bsrc=[^>]*>", text) == []


def test_the_stand_in_adds_scripts_where_an_output_is_html(tmp_path):
    """Or the tests above would show nothing."""
    (tmp_path / "_quarto.yml").write_text(
        "project: {output-dir: out, render: [page.qmd]}\n"
        "execute: {echo: true}\nformat: {html: {}}\n"
    )
    code = "import pandas as pd\npd.DataFrame({'a': [1]})"
    (tmp_path / "page.qmd").write_text(f"---\ntitle: x\n---\n\n```{{python}}\n{code}\n```\n")
    path = make_quarto(tmp_path / "bin").split(":")[0]
    subprocess.run([f"{path}/quarto", "render", tmp_path], check=True)
    assert WIDGETS in (tmp_path / "out" / "page.html").read_text(encoding="utf-8")


def test_without_quarto_or_with_another_the_article_is_made_again(smoke_run, tmp_path):
    def planned(**variables):
        done = snakemake(smoke_run[0], "-n", *SMOKE, **variables)
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"^(\w+) +1$", done.stdout + done.stderr, re.MULTILINE))

    assert planned() == set()
    assert planned(PATH=os.environ["PATH"]) == {"all", "render_article"}
    (tmp_path / "quarto").write_text("#!/bin/sh\necho 1.12.0\n")
    (tmp_path / "quarto").chmod(0o755)
    other = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert planned(PATH=other) == {"all", "render_article"}


def test_an_article_that_cannot_be_rendered_leaves_the_last_one(smoke_run, tmp_path):
    folder = shutil.copytree(smoke_run[0], tmp_path / "checkout", symlinks=True)
    report = folder / "results" / "smoke" / "report"
    before = {path: path.read_bytes() for path in report.rglob("*.*")}
    (folder / "report" / "index.qmd").write_text("```{python}\n1 / 0\n```\n", encoding="utf-8")
    done = snakemake(folder, "--cores", "1", *SMOKE)
    assert done.returncode != 0
    assert "index.qmd: cell 0: ZeroDivisionError: division by zero" in done.stdout + done.stderr
    assert {path: path.read_bytes() for path in report.rglob("*.*")} == before
    assert set(before) >= {report / "index.html", report / "index.docx"}
