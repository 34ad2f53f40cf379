"""What a run does not hold, so that its texts can say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.analysis.text import text_dataset
from moe_routing.reporting import wording as w
from moe_routing.reporting.findings import CONTROLS_FILE, METRICS_FILE, NOISE_FILE, Finding
from moe_routing.routing.strategies import control_kinds, families
from moe_routing.vocabulary import DATASETS, TASKS, Family

if TYPE_CHECKING:
    from moe_routing.reporting.results import Study


def missing(study: Study) -> list[Finding]:
    """State what the complete comparison has and this run lacks; empty where nothing is missing."""
    return [*_parts(study), *_cells(study), *_tables(study), *_beside(study)]


def _expected() -> list[Family]:
    """Return the families of the complete comparison."""
    return [cls.family for cls in families().values() if cls.family.complete]


def _parts(study: Study) -> list[Finding]:
    findings = []
    absent = [one.words for one in _expected() if one.name not in study.families]
    if absent:
        text = f"This run has {w.listed([f'no {words}' for words in absent])}."
        findings.append(Finding(text, "config.yaml", "family"))
    present = set(study.cells["task"])
    absent = [task.examples for name, task in TASKS.items() if name not in present]
    if absent:
        text = f"This run has {w.listed([f'no data set of {words}' for words in absent])}."
        findings.append(Finding(text, "config.yaml", "dataset"))
    if "perplexity" not in present:
        text = (
            "Without running text, the analyses of the router, of BH, of its nulls and of its "
            f"discoveries read {DATASETS[text_dataset(study.config.datasets)].label} instead: each "
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
    """State what was not scored beside the comparison: controls, numerics arms, divergence."""
    findings = []
    table = study.statistics["controls"]
    kinds = set() if table.empty else set(table["kind"])
    absent = [one.absent for name, one in control_kinds().items() if name not in kinds]
    if absent:
        text = f"Of the controls, this run lacks {w.listed(absent)}."
        findings.append(Finding(text, CONTROLS_FILE, "control"))
    if study.statistics["numerics"].empty:
        text = "The baseline was not scored against itself, so numerical noise is not known."
        findings.append(Finding(text, NOISE_FILE, "numerics"))
    elif not study.statistics["numerics"]["changed"].str.startswith("dtype").any():
        text = (
            "The baseline was not scored in another number format, so it is not known what half "
            "precision would do to these results."
        )
        findings.append(Finding(text, NOISE_FILE, "numerics"))
    if study.divergence.empty:
        text = "Divergence from the baseline's predictions was not measured."
        findings.append(Finding(text, METRICS_FILE, "divergence"))
    return findings


def _cells(study: Study) -> list[Finding]:
    table = study.statistics.get("missing")
    if table is None or table.empty:
        return []
    return [
        Finding(
            f"`{row.strategy}` on {DATASETS[row.dataset].label}: {row.reason}.",
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
