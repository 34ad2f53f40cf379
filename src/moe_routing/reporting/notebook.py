"""What the notebooks call: show tables as Markdown, make missing results, export them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.analysis.tables import markdown
from moe_routing.errors import InputError
from moe_routing.reporting.article import VARIABLE, results_folder

if TYPE_CHECKING:
    import pandas as pd

NOT_SHOWN = ("text/html", "application/javascript")
"""Kinds of output that no page has. To a page with any, Quarto adds require.js and jQuery from
another host (quarto-cli, src/core/jupyter/widgets.ts), and the page no longer works offline."""

ROWS = 100
"""The most rows of a table that are shown."""

_STEPS = re.compile(r"(\d+) of (\d+) steps \(")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#$~^])")


def show_markdown() -> None:
    """Let this notebook show data frames as Markdown, and nothing as HTML or JavaScript."""
    import pandas as pd
    from IPython import get_ipython

    display = get_ipython().display_formatter
    display.active_types = [kind for kind in display.format_types if kind not in NOT_SHOWN]
    display.formatters["text/markdown"].for_type(pd.DataFrame, table_markdown)


def table_markdown(table: pd.DataFrame) -> str:
    """Return the first rows of a data frame as a Markdown table, numbers to six digits.

    The index is shown if it has a name.
    """
    shown = table.head(ROWS)
    shown = shown.reset_index() if any(name is not None for name in table.index.names) else shown
    align = "".join("r" if kind.kind in "iuf" else "l" for kind in shown.dtypes)
    shown = shown.map(_cell).set_axis([_header(name) for name in shown.columns], axis=1)
    more = f"\n\n{ROWS} of {len(table)} rows." if len(table) > ROWS else ""
    return f"{markdown(shown, align)}{more}\n"


def _cell(value: object) -> str:
    if value is None or value != value:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _header(name: object) -> str:
    """Return a column's name, the parts of one with several levels separated by commas."""
    parts = name if isinstance(name, tuple) else (name,)
    return ", ".join(_cell(part) for part in parts if part != "")


def prepare(config: str, needs: str, *also: str) -> Path:
    """Return a results folder for a notebook; run the workflow for files that it lacks.

    The workflow downloads model and data by itself. Run it in the root of the repository. Where the
    environment names the results, as for the article, nothing is run: ``needs`` must be there, and
    of ``also`` the notebook says what is missing.

    Args:
        config: config file of the study.
        needs: file under the results folder that the notebook cannot do without.
        *also: further files under it. With ``needs`` and all that these are made from, they are
            every file that the notebook reads.

    Raises:
        InputError: there is no such config, a file is missing, or the workflow fails.
    """
    if os.environ.get(VARIABLE):
        results = results_folder()
        if not (results / needs).is_file():
            raise InputError(f"{results / needs}: missing; run the workflow to make it")
        return results
    from moe_routing.config.study import load_config

    root = repository()
    results = root / "results" / load_config(root / config).study
    missing = [results / name for name in (needs, *also) if not (results / name).is_file()]
    if missing:
        run_workflow(root, config, *(path.relative_to(root).as_posix() for path in missing))
    return results


def repository() -> Path:
    """Return the nearest folder above this one that holds the Snakefile.

    Raises:
        InputError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "Snakefile").is_file():
            return folder
    raise InputError(f"no Snakefile in {here} or above; open the notebook in the repository")


def run_workflow(root: Path, config: str, *targets: str) -> None:
    """Make files with Snakemake, showing a progress bar of its jobs.

    Raises:
        InputError: Snakemake fails.
    """
    from tqdm.auto import tqdm

    command = [
        sys.executable, "-m", "snakemake", *targets, "--cores", "all", "--configfile", config,
    ]  # fmt: skip
    last = ""
    with (
        subprocess.Popen(  # noqa: S603 (our own arguments)
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
        tqdm(total=1, desc="workflow", unit="job") as bar,
    ):
        for line in process.stdout or ():
            last = line.strip() or last
            if match := _STEPS.search(line):
                bar.total = int(match[2])
                bar.update(int(match[1]) - bar.n)
    if process.returncode:
        raise InputError(f"snakemake {' '.join(targets)} failed: {last}")


def export(results: Path, folder: Path | str) -> Path:
    """Copy the tables, figures and texts of a study to another folder, such as a mounted drive.

    Weights and item tables stay behind.

    Returns:
        The folder that was written.
    """
    target = Path(folder) / results.name
    keep = (".csv", ".json", ".md", ".png", ".svg", ".html", ".docx", ".ipynb", ".yaml")

    def others(at: str, names: list[str]) -> list[str]:
        return [n for n in names if not n.endswith(keep) and not (Path(at) / n).is_dir()]

    shutil.copytree(results, target, ignore=others, dirs_exist_ok=True)
    return target
