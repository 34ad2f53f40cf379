"""What a run lacks of the complete comparison."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import groups_of
from moe_routing.reporting.claims import Finding
from moe_routing.reporting.pages import (
    BUDGETS_FILE,
    CERTIFICATES,
    CONTROLS_FILE,
    METRICS_FILE,
    NUMERICS_FILE,
    TIMING_FILE,
)
from moe_routing.reporting.results import StudyResults
from moe_routing.routing.strategies import control_kinds, families
from moe_routing.vocabulary import DATASETS, TASKS, text_dataset


def missing(study: StudyResults) -> list[Finding]:
    """State what the complete comparison has and this run lacks; empty if nothing is missing."""
    return [*_parts(study), *_cells(study), *_tables(study), *_additional(study), *_mixed(study)]


def _parts(study: StudyResults) -> Iterator[Finding]:
    complete = [cls.family for cls in families().values() if cls.family.complete]
    absent = [family.words for family in complete if family.name not in study.families]
    if absent:
        text = f"This run has {wording.listed([f'no {words}' for words in absent])}."
        yield Finding(text, "config.yaml", "family")
    present = set(study.cells["task"])
    absent = [task.examples for name, task in TASKS.items() if name not in present]
    if absent:
        text = f"This run has {wording.listed([f'no data set of {words}' for words in absent])}."
        yield Finding(text, "config.yaml", "dataset")
    if "perplexity" not in present:
        text = (
            "Without running text, the analyses of the router, of BH and of its nulls read "
            f"{DATASETS[text_dataset(study.config.datasets)].label} instead: each context with its "
            "correct ending."
        )
        yield Finding(text, "config.yaml", "dataset")
    if "wikipedia" in study.datasets and "wikitext" not in study.datasets:
        text = (
            "WikiText-2 was not scored; passages of Wikipedia replace it. Their perplexity is not "
            "comparable with published WikiText numbers."
        )
        yield Finding(text, "config.yaml", "dataset")


def _additional(study: StudyResults) -> Iterator[Finding]:
    """State what was not scored in addition: controls, numerics arms, divergence."""
    table, numerics = study.statistics["controls"], study.statistics["numerics"]
    kinds = set() if table.empty else set(table["kind"])
    absent = [kind.absent for name, kind in control_kinds().items() if name not in kinds]
    if absent:
        text = f"Of the controls, this run lacks {wording.listed(absent)}."
        yield Finding(text, CONTROLS_FILE, "control")
    if study.statistics["matched_budgets"].empty:
        text = "No rules were compared at matched budgets."
        yield Finding(text, BUDGETS_FILE, "budget")
    if study.statistics["timing"].empty:
        text = "Time was not measured in repeats, so nothing is said about it."
        yield Finding(text, TIMING_FILE, "time")
    if not study.certificates:
        text = "No strategy was certified, so none has a bound on its damage."
        yield Finding(text, CERTIFICATES, "lever")
    if numerics.empty:
        text = (
            "The baseline was not scored against itself, so the numerical noise floor is not known."
        )
        yield Finding(text, NUMERICS_FILE, "numerics")
    elif not numerics["changed"].str.startswith("dtype").any():
        text = (
            "The baseline was not scored in another number format, so the effect of half "
            "precision on these results is not known."
        )
        yield Finding(text, NUMERICS_FILE, "numerics")
    if study.divergence.empty:
        text = "Divergence from the baseline's predictions was not measured."
        yield Finding(text, METRICS_FILE, "divergence")


def _mixed(study: StudyResults) -> Iterator[Finding]:
    """State what differs between the cells in how they were made."""
    for difference in study.mixed:
        yield Finding(f"Caution: {difference}.", "comparison/provenance.csv")


def _cells(study: StudyResults) -> Iterator[Finding]:
    """State which cells are missing, those of one reason and the same sets together."""
    rows = study.statistics.get("missing", pd.DataFrame())
    if rows.empty:
        return
    by_strategy = {
        key: tuple(DATASETS[name].label for name in own["dataset"].dropna())
        for key, own in groups_of(rows, ["reason", "strategy"])
    }
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, strategy), sets in by_strategy.items():
        groups.setdefault((reason, sets), []).append(strategy)
    for (reason, sets), names in groups.items():
        where = f" on {wording.listed(sets)}" if sets else ""
        text = f"{wording.code(names)}{where}: {reason.removeprefix('left out: ')}."
        yield Finding(text, "statistics/missing.csv", "cell")


def _tables(study: StudyResults) -> Iterator[Finding]:
    needed = ("paired", "noninferiority", "matched_compute", "primary")
    absent = [f"`statistics/{name}.csv`" for name in needed if study.statistics[name].empty]
    if absent:
        text = f"Not computed, or without rows: {wording.listed(absent)}."
        yield Finding(text, "statistics/", "table")
