"""The source files of the report, and the files that are rendered from them."""

from __future__ import annotations

ARTICLE = "index"
NOTEBOOKS = ("baseline", "bh_routing", "comparison")


def sources() -> list[str]:
    """Return the source files of the report, relative to report/."""
    pages = [f"{ARTICLE}.qmd", *(f"notebooks/{name}.qmd" for name in NOTEBOOKS)]
    return ["_quarto.yml", "references.bib", "styles.css", *pages]


def outputs() -> list[str]:
    """Return the files of a rendered report, relative to its folder."""
    pages = [f"notebooks/{name}.{suffix}" for name in NOTEBOOKS for suffix in ("html", "ipynb")]
    return [f"{ARTICLE}.html", f"{ARTICLE}.docx", *pages]
