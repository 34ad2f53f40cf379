"""With Quarto on the PATH the study ends with Quarto's pages, which call no other host."""

from __future__ import annotations

import re
import subprocess

import pytest
from quarto_stand_in import GENERATOR, WIDGETS
from workflow_runs import make_quarto

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
