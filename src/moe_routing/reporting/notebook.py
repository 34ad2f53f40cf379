"""What the notebooks call: make missing results, export them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from moe_routing.errors import InputError
from moe_routing.reporting.article import VARIABLE, results_folder

_STEPS = re.compile(r"(\d+) of (\d+) steps \(")


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
    from moe_routing.config import load_config

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
