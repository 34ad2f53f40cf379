"""The files of the report: its sources, what is rendered from them, and results that it cites."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

VARIABLE = "MOE_ROUTING_RESULTS"
"""Environment variable that names the results folder."""

FIGURES = "_figures"
"""Folder beside a page that its figures are copied into: Typst reads no file outside."""

ARTICLE = "index"
NOTEBOOKS = ("baseline", "bh_routing", "comparison")

MODEL_FILE = "model.json"
PRIMARY_FILE = "statistics/primary.csv"
PAIRED_FILE = "statistics/paired.csv"
NONINFERIORITY_FILE = "statistics/noninferiority.csv"
MATCHED_FILE = "statistics/matched_compute.csv"
CELLS_FILE = "comparison/full_routing_results.csv"
METRICS_FILE = "comparison/all_metrics.csv"
CONTROLS_FILE = "statistics/controls.csv"
NUMERICS_FILE = "statistics/numerics.csv"
BUDGETS_FILE = "statistics/matched_budgets.csv"
TIMING_FILE = "statistics/timing.csv"
LEVERS_FILE = "statistics/levers.csv"
CERTIFICATES = "calibration/certificates"


def collected(results: Path) -> str:
    """Return the day on which the results of a study were collected."""
    seconds = (results / CELLS_FILE).stat().st_mtime
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def sources() -> list[str]:
    """Return the source files of the report, relative to report/."""
    pages = [f"{ARTICLE}.qmd", *(f"notebooks/{name}.qmd" for name in NOTEBOOKS)]
    return ["_quarto.yml", "references.bib", "styles.css", "dark.scss", "page.html", *pages]


def pdf_sources() -> list[str]:
    """Return the source files of the article as a PDF that no other format has."""
    return ["_quarto-pdf.yml", "tables.typ"]


def outputs() -> list[str]:
    """Return the files of a rendered report, relative to its folder."""
    pages = [f"notebooks/{name}.{suffix}" for name in NOTEBOOKS for suffix in ("html", "ipynb")]
    return [f"{ARTICLE}.html", f"{ARTICLE}.docx", *pages]


def renderer() -> str:
    """Return what would render the report on this machine: Quarto and its version, or preview."""
    quarto = shutil.which("quarto")
    if not quarto:
        return "preview"
    asked = subprocess.run(  # noqa: S603 (our own arguments)
        [quarto, "--version"], capture_output=True, text=True, check=False
    )
    return f"quarto {asked.stdout.strip()}"
