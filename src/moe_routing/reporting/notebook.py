"""Helpers of the notebooks: set up, make missing results, show tables and figures, export."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from moe_routing.analysis.tables import markdown
from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.figures.style import laid_out
from moe_routing.reporting.article import results_folder
from moe_routing.reporting.pages import VARIABLE

EXCLUDED_FORMATS = ("text/html", "application/javascript")
"""Output formats that no page has. For these, Quarto adds require.js and jQuery from another host
(quarto-cli, src/core/jupyter/widgets.ts), and the page no longer works offline."""

ROWS = 100
"""Maximum number of rows of a table that are shown."""

CLONE = "moe-routing-study"
"""Folder that a notebook's first cell clones the repository into, outside of it."""

_STEPS = re.compile(r"(\d+) of (\d+) steps \(")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#$~^])")


def start(config: str, needs: str, *also: str) -> Path:
    """Set up a notebook and return the results folder; see :func:`prepare`.

    Raises:
        SystemExit: an installed package was replaced after the session had imported it.
        InputError: see :func:`prepare`.
    """
    for name in ("numpy", "pandas"):  # a hosted session may have imported an older one
        if name in sys.modules and sys.modules[name].__version__ != version(name):
            raise SystemExit(f"New {name}: Runtime > Restart session, then run all cells again.")
    if os.path.isdir(CLONE):
        os.chdir(CLONE)
    print(gpu_line())
    show_markdown()
    return prepare(config, needs, *also)


def gpu_line() -> str:
    """Return which GPU there is, and what that allows."""
    program, found = shutil.which("nvidia-smi"), ""
    if program:
        ask = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        done = subprocess.run(ask, capture_output=True, text=True, check=False)  # noqa: S603
        found = done.stdout.strip()
    if found:
        return f"GPU: {found}. OLMoE-1B-7B needs 24 GB or more."
    return (
        "No GPU. The default study runs on the CPU; a study whose config asks for a GPU, such as "
        "that of OLMoE-1B-7B, stops with an error."
    )


def show_markdown() -> None:
    """Make this notebook show data frames as Markdown, and nothing as HTML or JavaScript."""
    from IPython import get_ipython

    display = get_ipython().display_formatter
    display.active_types = [kind for kind in display.format_types if kind not in EXCLUDED_FORMATS]
    display.formatters["text/markdown"].for_type(pd.DataFrame, table_markdown)


class Figures:
    """Shows the figures of a notebook with their numbers and captions.

    A caption is an output of its own, not an option of the cell: so it is there in Jupyter too, and
    Quarto keeps the figure when it makes an .ipynb file. A cell that is run again keeps its number.
    """

    def __init__(self) -> None:
        self._captions: list[str] = []

    def __call__(self, figure: Figure, caption: str) -> None:
        """Show a figure and below it its caption."""
        from IPython.display import Image, Markdown, display

        if caption not in self._captions:
            self._captions.append(caption)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=figure.dpi, bbox_inches=laid_out(figure))
        display(Image(drawn.getvalue()))
        plt.close(figure)  # or Jupyter would show it again
        display(Markdown(f"*Figure {self._captions.index(caption) + 1}: {caption}*"))


def table_markdown(table: pd.DataFrame) -> str:
    """Return the first rows of a data frame as a Markdown table.

    The numbers of a column have as many decimals as six significant digits of any of them need. The
    index is shown if it has a name.
    """
    shown = table.head(ROWS)
    shown = shown.reset_index() if any(name is not None for name in table.index.names) else shown
    align = "".join("r" if kind.kind in "iuf" else "l" for kind in shown.dtypes)
    cells = {_header(name): _cells(column) for name, column in shown.items()}
    more = f"\n\n{ROWS} of {len(table)} rows." if len(table) > ROWS else ""
    return f"{markdown(pd.DataFrame(cells), align)}{more}\n"


def _cells(column: pd.Series) -> list[str]:
    if column.dtype.kind != "f":
        return [_cell(value) for value in column]
    shortest = [f"{value:.6g}" for value in column.dropna()]
    if any("e" in text for text in shortest):
        return [_cell(value) for value in column]
    decimals = max((len(text.partition(".")[2]) for text in shortest), default=0)
    return ["" if value != value else _signed(f"{value:.{decimals}f}") for value in column]


def _cell(value: object) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, int | float):
        return _signed(f"{value:.6g}" if isinstance(value, float) else str(value))
    return _MARKUP.sub(r"\\\1", " ".join(str(value).split()))


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}", 1) if number.startswith("-") else number


def _header(name: object) -> str:
    """Return the name of a column, its levels separated by commas."""
    parts = name if isinstance(name, tuple) else (name,)
    return ", ".join(_cell(part) for part in parts if part != "")


def prepare(config: str, needs: str, *also: str) -> Path:
    """Return the results folder for a notebook; run the workflow for missing files.

    The workflow downloads model and data if needed. If the environment names the results, as for
    the article, nothing is run: ``needs`` must be there, and the notebook says which files of
    ``also`` are missing.

    Args:
        config: config file of the study, relative to the root of the repository.
        needs: file under the results folder that the notebook requires.
        *also: further files under it that the notebook reads, if the workflow does not make them on
            the way to ``needs``.

    Raises:
        InputError: there is no such config, a file is missing, or the workflow fails.
    """
    if os.environ.get(VARIABLE):
        results = results_folder()
        if not (results / needs).is_file():
            raise InputError(f"{results / needs}: missing; run the workflow to make it")
        return results
    root = repository()
    results = root / "results" / load_config(root / config).study
    missing = [results / name for name in (needs, *also) if not (results / name).is_file()]
    if missing:
        run_workflow(root, config, *(path.relative_to(root).as_posix() for path in missing))
    return results


def repository() -> Path:
    """Return the nearest folder, from here upwards, that has the Snakefile.

    Raises:
        InputError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "Snakefile").is_file():
            return folder
    raise InputError(f"no Snakefile in {here} or above; open the notebook in the repository")


def run_workflow(root: Path, config: str, *targets: str) -> None:
    """Make files with Snakemake, with a progress bar of its jobs.

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

    Weights and item tables are left out.

    Returns:
        The folder written.
    """
    target = Path(folder) / results.name
    keep = (".csv", ".json", ".md", ".png", ".svg", ".html", ".docx", ".ipynb", ".yaml")

    def others(at: str, names: list[str]) -> list[str]:
        return [n for n in names if not n.endswith(keep) and not (Path(at) / n).is_dir()]

    shutil.copytree(results, target, ignore=others, dirs_exist_ok=True)
    return target
