"""What a run does not hold, so that its texts can say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.analysis.text import text_dataset
from moe_routing.figures.labels import dataset_label
from moe_routing.reporting import wording as w
from moe_routing.reporting.findings import STATIC, Finding

if TYPE_CHECKING:
    from moe_routing.reporting.study import Study

FAMILIES = {
    **STATIC,
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


CONTROLS = {
    "static": "the longer static curve",
    "shuffle": "counts shuffled over tokens",
    "layermean": "one number of experts a layer",
    "randomid": "experts drawn at random",
    "weighting": "mass-matched weights",
    "rival": "rival rules",
}
"""The controls of the complete comparison, by kind."""


def missing(study: Study) -> list[Finding]:
    """State what the complete comparison has and this run lacks; empty where nothing is missing."""
    return [*_parts(study), *_cells(study), *_tables(study), *_beside(study)]


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
    if "perplexity" not in present:
        text = (
            "Without running text, the analyses of the router, of BH, of its nulls and of its "
            f"discoveries read {dataset_label(text_dataset(study.config.datasets))} instead: each "
            "context with its right ending."
        )
        findings.append(Finding(text, "config.yaml", "dataset"))
    if "wikipedia" in study.datasets and "wikitext" not in study.datasets:
        text = (
            "WikiText-2 was not scored; passages of Wikipedia stand in, and their perplexity is "
            "not comparable with published WikiText numbers."
        )
        findings.append(Finding(text, "config.yaml", "dataset"))
    return findings


def _beside(study: Study) -> list[Finding]:
    """State what was not scored beside the comparison: controls, noise arms, divergence."""
    findings = []
    table = study.statistics["controls"]
    kinds = set() if table.empty else set(table["kind"])
    absent = [words for kind, words in CONTROLS.items() if kind not in kinds]
    if absent:
        text = f"Of the controls, this run lacks {w.listed(absent)}."
        findings.append(Finding(text, "statistics/controls.csv", "control"))
    if study.statistics["noise"].empty:
        text = "The baseline was not scored against itself, so numerical noise is not known."
        findings.append(Finding(text, "statistics/noise.csv", "noise"))
    elif not study.statistics["noise"]["changed"].str.startswith("dtype").any():
        text = (
            "The baseline was not scored in another number format, so it is not known what half "
            "precision would do to these results."
        )
        findings.append(Finding(text, "statistics/noise.csv", "noise"))
    if study.divergence.empty:
        text = "Divergence from the baseline's predictions was not measured."
        findings.append(Finding(text, "comparison/all_metrics.csv", "divergence"))
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
