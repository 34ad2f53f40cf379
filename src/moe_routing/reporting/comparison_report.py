"""ROUTING_COMPARISON_REPORT.md: the comparison on one page."""

from __future__ import annotations

from moe_routing import wording
from moe_routing.analysis.tables import markdown
from moe_routing.files import atomic_path
from moe_routing.reporting import tables
from moe_routing.reporting.article_figures import CAPTIONS, COMPARISON
from moe_routing.reporting.article_tables import ARTICLE_TABLES
from moe_routing.reporting.missing import missing
from moe_routing.reporting.plan import SHORT_REPORT, findings_on
from moe_routing.reporting.results import StudyResults
from moe_routing.vocabulary import DATASETS

FILE = "comparison/ROUTING_COMPARISON_REPORT.md"

SECTIONS = {
    "Results": "tbl-results",
    "Declared contrasts": "tbl-primary",
    "Rules at matched budgets": "tbl-budgets",
    "All settings at budgets": "tbl-budgets-all",
    "Levers": "tbl-levers",
    "Measured time": "tbl-timing",
    "Certified strategies": "tbl-certified",
    "The consequence law": "tbl-law",
    "Static top-k": "tbl-static",
    "Controls": "tbl-controls",
    "Numerical noise": "tbl-numerics",
    "Divergence from the baseline's predictions": "tbl-divergence",
    "Routing by BH": "tbl-routing",
    "Data": "tbl-data",
}
"""Tables of the report by title."""


def comparison_report(study: StudyResults) -> str:
    """Return the report as Markdown."""
    found = [f"- {x.text} ({x.source})" for x in findings_on(study, SHORT_REPORT)]
    absent = [f"- {x.text}" for x in missing(study)]
    sections = [
        _head(study),
        _section("Findings", *found),
        *(_table(study, title, label) for title, label in SECTIONS.items()),
        _figures(study),
        _section("What is missing", *absent) if absent else "",
        _section("Where the numbers are", _files()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_report(study: StudyResults) -> None:
    """Write the report into the results folder."""
    with atomic_path(study.folder / FILE) as temporary:
        temporary.write_text(comparison_report(study), encoding="utf-8")


def _head(study: StudyResults) -> str:
    model = study.model
    names = wording.listed([DATASETS[name].label for name in tables.datasets_by_task(study)])
    items = wording.listed(
        [
            f"{wording.count(study.cell(study.baseline, name)['n_items'])} ({DATASETS[name].label})"
            for name in tables.datasets_by_task(study)
        ]
    )
    revision = f" at `{model.revision}`" if model.revision else ""
    return (
        f"# Routing strategies compared: {model.name}\n\n"
        f"Model: {model.phrase}, `{model.path}`{revision}; {model.topology}; weights sha256 "
        f"`{model.weights_sha256[:16]}`. The model is frozen: only the router's choice of experts "
        f"and their weights change.\n\n"
        f"Data: {names}. Items: {items}. Strategies: {study.cells['strategy'].nunique()}; cells: "
        f"{len(study.cells)}."
    )


def _section(title: str, *lines: str) -> str:
    return "\n".join([f"## {title}", "", *lines])


def _table(study: StudyResults, title: str, label: str) -> str:
    """Return a table of the article with its caption; nothing if the study has none."""
    table = ARTICLE_TABLES[label]
    if not table.ready(study):
        return ""
    return _section(title, table.caption(study), "", markdown(table.build(study), table.align))


def _figures(study: StudyResults) -> str:
    folder = COMPARISON.split("/")[-1]
    lines = []
    for name, caption in CAPTIONS.items():
        if (study.folder / COMPARISON / f"{name}.png").is_file():
            lines += [f"![{caption}]({folder}/{name}.png)", "", f"*{caption}*", ""]
    return _section("Figures", *lines).rstrip() if lines else ""


def _files() -> str:
    return (
        "`comparison/full_routing_results.csv` (cells), `comparison/controls.csv` (cells of "
        "controls), `comparison/levers.csv` (cells at budgets), `comparison/all_metrics.csv` "
        "(every metric), `statistics/*.csv` (tests; `statistics/columns.csv` explains every "
        "column), `cells/<strategy>/<dataset>.json` (routing by layer, timings, provenance)."
    )
