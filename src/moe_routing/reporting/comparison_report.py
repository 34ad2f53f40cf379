"""ROUTING_COMPARISON_REPORT.md: the comparison on one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.files import atomic_path
from moe_routing.reporting import findings as f
from moe_routing.reporting import findings_controls as c
from moe_routing.reporting import findings_routing as g
from moe_routing.reporting import tables
from moe_routing.reporting import wording as w
from moe_routing.reporting.article_tables import SHEETS
from moe_routing.reporting.missing import missing
from moe_routing.reporting.plots import CAPTIONS, FOLDER
from moe_routing.vocabulary import DATASETS

if TYPE_CHECKING:
    from moe_routing.reporting.results import Study

FILE = "comparison/ROUTING_COMPARISON_REPORT.md"

SECTIONS = {
    "Results": "tbl-results",
    "Static top-k": "tbl-static",
    "Controls": "tbl-controls",
    "The baseline against itself": "tbl-numerics",
    "Divergence from the baseline's predictions": "tbl-divergence",
    "How BH routed": "tbl-routing",
    "Data": "tbl-data",
}
"""Tables of the report by title."""


def comparison_report(study: Study) -> str:
    """Return the report as Markdown."""
    sections = [
        _head(study),
        _section("Findings", *(f"- {finding.text} ({finding.source})" for finding in said(study))),
        *(_table(study, title, label) for title, label in SECTIONS.items()),
        _figures(study),
        _section("What is missing", *(f"- {finding.text}" for finding in missing(study)))
        if missing(study)
        else "",
        _section("Where the numbers are", _files()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_report(study: Study) -> None:
    """Write the report into the results folder."""
    with atomic_path(study.folder / FILE) as temporary:
        temporary.write_text(comparison_report(study), encoding="utf-8")


def headline(study: Study) -> list[f.Finding]:
    """Return what was found on the primary contrast: difference, compute, matched compute.

    A difference no larger than the numerical noise is said to be so at once.
    """
    primary, numerics = study.statistics["primary"], study.statistics["numerics"]
    drowned = c.primary_noise_floor(primary, numerics, study.main_measures)
    return [
        f.primary(primary, study.config.statistics.confidence),
        *([drowned] if drowned and drowned.verdict == "within" else []),
        f.compute(primary),
        f.matched(primary),
    ]


def said(study: Study) -> list[f.Finding]:
    """Return every finding of the comparison, in the order of the report."""
    tables_ = study.statistics
    families = study.family_of
    top_k, baseline, main = study.model.top_k, study.baseline, study.main_measures
    found = [
        *headline(study),
        f.detectable(tables_["primary"]),
        *f.chance(study.cells, baseline, study.config.statistics.margin_accuracy),
        *f.against_baseline(tables_["paired"], tables_["noninferiority"], families, baseline),
        *g.matched_summary(tables_["matched_compute"], families),
        *c.controls(tables_["controls"], main, study.config.parsed),
        *c.static_curve(study.static_curve, tables_["controls"], main, top_k),
        *c.numerics(tables_["numerics"], main),
        *c.beyond_noise_floor(tables_["numerics"], tables_["paired"], main),
        c.divergence(study.divergence, baseline),
        *f.fewest_static(tables_["noninferiority"], study.cells, top_k),
        f.weighting(tables_["paired"], top_k),
        g.binding(study.cells, study.config.parsed),
        g.cap(study.cells),
        *g.pareto(tables_["pareto"], baseline),
        g.ranks(tables_["friedman"], study.config.statistics.confidence),
        g.speed(study.cells, baseline),
        *g.pareto(tables_["pareto_time"], baseline, "seconds_per_1000_tokens"),
    ]
    return [finding for finding in found if finding is not None]


def _head(study: Study) -> str:
    model = study.model
    names = w.listed([DATASETS[name].label for name in tables.datasets_by_task(study)])
    items = w.listed(
        [
            f"{w.count(study.cell(study.baseline, name)['n_items'])} ({DATASETS[name].label})"
            for name in tables.datasets_by_task(study)
        ]
    )
    revision = f" at `{model.revision}`" if model.revision else ""
    return (
        f"# Routing strategies compared: {model.name}\n\n"
        f"Model: {model.phrase}, `{model.path}`{revision}; {model.topology}; weights sha256 "
        f"`{model.weights_sha256[:16]}`. It is frozen: only the router's choice of experts and "
        f"their weights change.\n\n"
        f"Data: {names}. Items: {items}. Strategies: {study.cells['strategy'].nunique()}; cells: "
        f"{len(study.cells)}."
    )


def _section(title: str, *lines: str) -> str:
    return "\n".join([f"## {title}", "", *lines])


def _table(study: Study, title: str, label: str) -> str:
    """Return a table of the article with its caption; nothing if the study has none."""
    sheet = SHEETS[label]
    if not sheet.ready(study):
        return ""
    body = tables.markdown(sheet.build(study), sheet.align)
    return _section(title, sheet.caption(study), "", body)


def _figures(study: Study) -> str:
    folder = FOLDER.split("/")[-1]
    lines = []
    for name, caption in CAPTIONS.items():
        if (study.folder / FOLDER / f"{name}.png").is_file():
            lines += [f"![{caption}]({folder}/{name}.png)", "", f"*{caption}*", ""]
    return _section("Figures", *lines).rstrip() if lines else ""


def _files() -> str:
    return (
        "`comparison/full_routing_results.csv` (cells), `comparison/controls.csv` (cells scored "
        "beside them), `comparison/all_metrics.csv` (every metric), `statistics/*.csv` (tests; "
        "`statistics/columns.csv` explains every column), "
        "`cells/<strategy>/<dataset>.json` (routing by layer, timings, provenance)."
    )
