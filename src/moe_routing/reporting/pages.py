"""Which files the manuscript is made from, and which it becomes."""

from __future__ import annotations

ARTICLE = "index"
NOTEBOOKS = ("baseline", "bh_routing", "comparison")


def sources() -> list[str]:
    """Return every file that a rendered report is made from, relative to report/."""
    pages = [f"{ARTICLE}.qmd", *(f"notebooks/{name}.qmd" for name in NOTEBOOKS)]
    return ["_quarto.yml", "references.bib", "styles.css", *pages]


def outputs() -> list[str]:
    """Return every file of a rendered report, relative to its folder."""
    pages = [f"notebooks/{name}.{suffix}" for name in NOTEBOOKS for suffix in ("html", "ipynb")]
    return [f"{ARTICLE}.html", f"{ARTICLE}.docx", *pages]
