"""ROUTING_COMPARISON_REPORT.md: the comparison on one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.figures.labels import dataset_label
from moe_routing.files import atomic_path
from moe_routing.reporting import findings as f
from moe_routing.reporting import findings_routing as g
from moe_routing.reporting import tables
from moe_routing.reporting import wording as w
from moe_routing.reporting.missing import missing
from moe_routing.reporting.plots import CAPTIONS, FOLDER

if TYPE_CHECKING:
    from moe_routing.reporting.study import Study

FILE = "comparison/ROUTING_COMPARISON_REPORT.md"


def comparison_report(study: Study) -> str:
    """Return the report as Markdown."""
    sections = [
        _head(study),
        _section("Findings", *(f"- {finding.text} ({finding.source})" for finding in said(study))),
        _section("Results", _caption(study), "", tables.markdown(tables.results_table(study))),
        _section(
            "How BH routed", tables.markdown(tables.routing_table(study), "llrrrrr"), "", _legend()
        )
        if "bh" in study.families
        else "",
        _section("Data", tables.markdown(tables.data_table(study), "llrrll")),
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
    """Return what was found on the primary contrast: difference, compute, matched compute."""
    primary = study.statistics["primary"]
    return [
        f.primary(primary, study.config.statistics.confidence),
        f.compute(primary),
        f.matched(primary),
    ]


def said(study: Study) -> list[f.Finding]:
    """Return every finding of the comparison, in the order of the report."""
    tables_ = study.statistics
    families = dict(zip(study.cells["strategy"], study.cells["family"], strict=True))
    native_k, baseline = study.model.native_k, study.baseline
    found = [
        *headline(study),
        f.detectable(tables_["primary"]),
        *f.chance(study.cells, baseline, study.config.statistics.margin_accuracy),
        *f.against_baseline(tables_["paired"], tables_["noninferiority"], families, baseline),
        *g.matched_summary(tables_["matched_compute"], families),
        *f.fewest_static(tables_["noninferiority"], study.cells, native_k),
        f.weighting(tables_["paired"], native_k),
        g.binding(study.cells),
        g.cap(study.cells),
        *g.pareto(tables_["pareto"], baseline),
        g.ranks(tables_["friedman"]),
        g.speed(study.cells, baseline),
    ]
    return [finding for finding in found if finding is not None]


def _head(study: Study) -> str:
    model = study.model
    names = w.listed([dataset_label(name) for name in tables.datasets_by_task(study)])
    items = w.listed(
        [
            f"{w.count(study.cell(study.baseline, name)['n_items'])} ({dataset_label(name)})"
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


def _caption(study: Study) -> str:
    confidence = w.percent(study.config.statistics.confidence, 0)
    return (
        f"Values with {confidence} intervals; bold: best of its column; \N{DAGGER}: a difference "
        f"from `{study.baseline}` was shown after correction for multiplicity. Mean experts are "
        "averaged over data sets."
    )


def _legend() -> str:
    return (
        "Averages over data sets. Nothing rejected: decisions (a token in a layer) for which BH "
        "kept no expert, so that the floor gave one. At floor, at cap: decisions with exactly the "
        "fewest or the most experts allowed."
    )


def _figures(study: Study) -> str:
    folder = FOLDER.split("/")[-1]
    lines = []
    for name, caption in CAPTIONS.items():
        if (study.folder / FOLDER / f"{name}.png").is_file():
            lines += [f"![{caption}]({folder}/{name}.png)", "", f"*{caption}*", ""]
    return _section("Figures", *lines).rstrip() if lines else ""


def _files() -> str:
    return (
        "`comparison/full_routing_results.csv` (cells), `comparison/all_metrics.csv` (every "
        "metric), `statistics/*.csv` (tests; `statistics/columns.csv` explains every column), "
        "`cells/<strategy>/<dataset>.json` (routing by layer, timings, provenance)."
    )
