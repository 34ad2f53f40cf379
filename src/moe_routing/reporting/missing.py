"""What a run lacks of the complete comparison."""

from __future__ import annotations

from moe_routing.analysis.tables import rows_of
from moe_routing.analysis.text import text_dataset
from moe_routing.reporting import wording
from moe_routing.reporting.findings import Finding
from moe_routing.reporting.pages import CONTROLS_FILE, METRICS_FILE, NUMERICS_FILE
from moe_routing.reporting.results import StudyResults
from moe_routing.routing.strategies import control_kinds, families
from moe_routing.vocabulary import DATASETS, TASKS, Family


def missing(study: StudyResults) -> list[Finding]:
    """State what the complete comparison has and this run lacks; empty if nothing is missing."""
    return [*_parts(study), *_cells(study), *_tables(study), *_additional(study)]


def _expected() -> list[Family]:
    """Return the families of the complete comparison."""
    return [cls.family for cls in families().values() if cls.family.complete]


def _parts(study: StudyResults) -> list[Finding]:
    findings = []
    absent = [family.words for family in _expected() if family.name not in study.families]
    if absent:
        text = f"This run has {wording.listed([f'no {words}' for words in absent])}."
        findings.append(Finding(text, "config.yaml", "family"))
    present = set(study.cells["task"])
    absent = [task.examples for name, task in TASKS.items() if name not in present]
    if absent:
        text = f"This run has {wording.listed([f'no data set of {words}' for words in absent])}."
        findings.append(Finding(text, "config.yaml", "dataset"))
    if "perplexity" not in present:
        text = (
            "Without running text, the analyses of the router, of BH, of its nulls and of its "
            f"discoveries read {DATASETS[text_dataset(study.config.datasets)].label} instead: each "
            "context with its correct ending."
        )
        findings.append(Finding(text, "config.yaml", "dataset"))
    if "wikipedia" in study.datasets and "wikitext" not in study.datasets:
        text = (
            "WikiText-2 was not scored; passages of Wikipedia replace it. Their perplexity is not "
            "comparable with published WikiText numbers."
        )
        findings.append(Finding(text, "config.yaml", "dataset"))
    return findings


def _additional(study: StudyResults) -> list[Finding]:
    """State what was not scored in addition: controls, numerics arms, divergence."""
    findings = []
    table = study.statistics["controls"]
    kinds = set() if table.empty else set(table["kind"])
    absent = [kind.absent for name, kind in control_kinds().items() if name not in kinds]
    if absent:
        text = f"Of the controls, this run lacks {wording.listed(absent)}."
        findings.append(Finding(text, CONTROLS_FILE, "control"))
    if study.statistics["numerics"].empty:
        text = (
            "The baseline was not scored against itself, so the numerical noise floor is not known."
        )
        findings.append(Finding(text, NUMERICS_FILE, "numerics"))
    elif not study.statistics["numerics"]["changed"].str.startswith("dtype").any():
        text = (
            "The baseline was not scored in another number format, so the effect of half "
            "precision on these results is not known."
        )
        findings.append(Finding(text, NUMERICS_FILE, "numerics"))
    if study.divergence.empty:
        text = "Divergence from the baseline's predictions was not measured."
        findings.append(Finding(text, METRICS_FILE, "divergence"))
    return findings


def _cells(study: StudyResults) -> list[Finding]:
    table = study.statistics.get("missing")
    if table is None or table.empty:
        return []
    return [
        Finding(
            f"`{row.strategy}` on {DATASETS[row.dataset].label}: {row.reason}.",
            "statistics/missing.csv",
            "cell",
        )
        for row in rows_of(table)
    ]


def _tables(study: StudyResults) -> list[Finding]:
    needed = ("paired", "noninferiority", "matched_compute", "primary")
    absent = [f"`statistics/{name}.csv`" for name in needed if study.statistics[name].empty]
    if not absent:
        return []
    return [
        Finding(f"Not computed, or without rows: {wording.listed(absent)}.", "statistics/", "table")
    ]
