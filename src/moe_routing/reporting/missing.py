"""What a run does not hold, so that its texts can say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.figures.labels import dataset_label
from moe_routing.reporting import wording as w
from moe_routing.reporting.findings import Finding

if TYPE_CHECKING:
    from moe_routing.reporting.study import Study

FAMILIES = {
    "regular": "static top-k with softmax weights",
    "normalized": "static top-k with renormalised weights",
    "uniform": "static top-k with uniform weights",
    "adaptive": "adaptive top-k",
    "bh": "Benjamini-Hochberg routing",
}
"""The families of the complete comparison."""

TASKS = {
    "perplexity": "running text (WikiText-2 or Wikipedia)",
    "multiple_choice": "multiple choice (HellaSwag)",
    "last_word": "last words (LAMBADA)",
}
"""The kinds of evaluation set of the complete comparison."""


def missing(study: Study) -> list[Finding]:
    """State what the complete comparison has and this run lacks; empty where nothing is missing."""
    return [*_parts(study), *_cells(study), *_tables(study)]


def _parts(study: Study) -> list[Finding]:
    findings = []
    absent = [text for name, text in FAMILIES.items() if name not in study.families]
    if absent:
        text = f"This run has {w.listed([f'no {words}' for words in absent])}."
        findings.append(Finding(text, "config.yaml", "family"))
    present = set(study.cells["task"])
    absent = [text for name, text in TASKS.items() if name not in present]
    if absent:
        text = f"This run has {w.listed([f'no data set of {words}' for words in absent])}."
        findings.append(Finding(text, "config.yaml", "dataset"))
    if "wikipedia" in study.datasets and "wikitext" not in study.datasets:
        text = (
            "WikiText-2 was not scored; passages of Wikipedia stand in, and their perplexity is "
            "not comparable with published WikiText numbers."
        )
        findings.append(Finding(text, "config.yaml", "dataset"))
    return findings


def _cells(study: Study) -> list[Finding]:
    table = study.statistics.get("missing")
    if table is None or table.empty:
        return []
    return [
        Finding(
            f"`{row.strategy}` on {dataset_label(row.dataset)}: {row.reason}.",
            "statistics/missing.csv",
            "cell",
        )
        for row in table.itertuples()
    ]


def _tables(study: Study) -> list[Finding]:
    needed = ("paired", "noninferiority", "matched_compute", "primary")
    absent = [f"`statistics/{name}.csv`" for name in needed if study.statistics[name].empty]
    if not absent:
        return []
    return [Finding(f"Not computed, or without rows: {w.listed(absent)}.", "statistics/", "table")]
