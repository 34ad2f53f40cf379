"""A notebook asks the workflow for what it lacks, and for no more; then it runs on that alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted_results import add_analyses, planted_config, write_results

from moe_routing.errors import InputError
from moe_routing.evaluation.collect import write_tables
from moe_routing.reporting import notebook
from moe_routing.reporting.notebook import ROWS, prepare, run_workflow, table_markdown
from moe_routing.reporting.pages import VARIABLE
from moe_routing.reporting.qmd import run_page
from moe_routing.reporting.results import StudyResults
from moe_routing.workflow import write_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one config and, in its results, one file."""
    (tmp_path / "Snakefile").touch()
    write_config(planted_config(), tmp_path / "config" / "mine.yaml")
    results = tmp_path / "results" / "planted"
    results.mkdir(parents=True)
    (results / "there.csv").touch()
    (tmp_path / "report").mkdir()
    monkeypatch.chdir(tmp_path / "report")
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def test_every_missing_file_is_asked_for(repository, monkeypatch):
    asked = []
    monkeypatch.setattr(notebook, "run_workflow", lambda *arguments: asked.append(arguments))
    results = prepare("config/mine.yaml", "bh/a.csv", "there.csv", "ablation/b.csv")
    assert results == repository / "results" / "planted"
    files = ("results/planted/bh/a.csv", "results/planted/ablation/b.csv")
    assert asked == [(repository, "config/mine.yaml", *files)]


def test_nothing_is_run_where_nothing_is_missing(repository, monkeypatch):
    monkeypatch.setattr(notebook, "run_workflow", lambda *_: pytest.fail("ran the workflow"))
    assert prepare("config/mine.yaml", "there.csv").name == "planted"


def test_results_that_are_named_are_taken_as_they_are(repository, monkeypatch):
    results = repository / "results" / "planted"
    (results / "config.yaml").touch()
    monkeypatch.setenv(VARIABLE, str(results))
    monkeypatch.setattr(notebook, "run_workflow", lambda *_: pytest.fail("ran the workflow"))
    assert prepare("config/other.yaml", "there.csv", "ablation/gone.csv") == results
    with pytest.raises(InputError, match=r"gone\.csv: missing; run the workflow to make it"):
        prepare("config/other.yaml", "gone.csv", "there.csv")


class Program:
    """Stands for a running Snakemake."""

    def __init__(self, returncode):
        self.stdout = ["1 of 2 steps (50%) done\n", "Error: a rule failed\n"]
        self.returncode = returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_snakemake_takes_files_for_targets_and_the_config_for_a_config(tmp_path, monkeypatch):
    from snakemake.cli import get_argument_parser

    commands = []

    def run(command, **_):
        commands.append(command)
        return Program(0)

    monkeypatch.setattr(notebook.subprocess, "Popen", run)
    run_workflow(tmp_path, "config/mine.yaml", "results/a.csv", "results/b.csv")
    assert commands[0][1:3] == ["-m", "snakemake"]
    arguments = get_argument_parser().parse_args(commands[0][3:])
    assert sorted(arguments.targets) == ["results/a.csv", "results/b.csv"]
    assert [str(path) for path in arguments.configfile] == ["config/mine.yaml"]


SHOWN = """```{python}
import pandas as pd
from IPython.display import HTML, Javascript, Markdown, display
from moe_routing.reporting.notebook import show_markdown

show_markdown()
display(HTML("<b>x</b>"), Javascript("x"), Markdown("*x*"))
pd.DataFrame({"a_b": [1, 2]})
```
"""


def test_a_notebook_shows_tables_as_markdown_and_nothing_as_html(tmp_path):
    path = tmp_path / "page.qmd"
    path.write_text(SHOWN)
    page = run_page(path, echo=False)
    outputs = [output for cell in page.notebook.cells for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output["data"]}
    assert kinds == {"text/plain", "text/markdown"}
    assert outputs[3]["data"]["text/markdown"] == "| a\\_b |\n| ------: |\n| 1 |\n| 2 |\n"
    assert "| a\\_b |" in page.markdown


def test_a_table_says_what_it_has():
    table = pd.DataFrame({"id": ["a|b\n<c>", None], "x": [0.123456789, np.nan], "n": [3, 4]})
    assert table_markdown(table).splitlines()[2:] == [
        r"| a\|b \<c\> | 0.123457 | 3 |",
        "|  |  | 4 |",
    ]
    assert table_markdown(table.set_index("n")).startswith("| n | id | x |\n")
    wide = table.pivot(index="n", columns=["id"], values=["x"])
    assert table_markdown(wide).startswith("| n | x, ")


def test_numbers_of_a_column_have_equal_decimals_and_a_minus_sign():
    table = pd.DataFrame({"x": [1.5, -0.25, np.nan], "tiny": [1e-9, 1.0, 2.0], "n": [-3, 4, 5]})
    assert table_markdown(table).splitlines()[2:] == [
        "| 1.50 | 1e-09 | \N{MINUS SIGN}3 |",
        "| \N{MINUS SIGN}0.25 | 1 | 4 |",
        "|  | 2 | 5 |",
    ]


def test_of_a_long_table_the_first_rows_are_shown():
    text = table_markdown(pd.DataFrame({"a": range(ROWS + 5)}))
    assert text.endswith(f"| {ROWS - 1} |\n\n{ROWS} of {ROWS + 5} rows.\n")
    assert "rows" not in table_markdown(pd.DataFrame({"a": range(ROWS)}))


def test_a_failing_workflow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook.subprocess, "Popen", lambda *_, **__: Program(1))
    with pytest.raises(InputError, match=r"^snakemake a b failed: Error: a rule failed$"):
        run_workflow(tmp_path, "config/mine.yaml", "a", "b")


def test_bh_notebook_takes_the_null_of_its_study_and_needs_no_statistics(
    tmp_path, monkeypatch, nano, outputs, toggles
):
    config = planted_config(
        study="pooled",
        strategies=("stock", "regular_k4", "bh_k8_a005_pooled"),
        primary=("bh_k8_a005_pooled", "hellaswag"),
        nulls=("pooled",),
    )
    folder = write_results(tmp_path / "pooled", config, items=200)
    write_tables(config, folder)
    add_analyses(StudyResults.load(folder), nano, outputs, toggles)
    assert not (folder / "statistics").exists()
    monkeypatch.setenv(VARIABLE, str(folder))
    page = run_page(ROOT / "report" / "notebooks" / "bh_routing.qmd", echo=True)
    assert "bh_k16_a005_pooled; H0:" in page.markdown
    assert "The nulls were not tested in this run." in page.markdown
