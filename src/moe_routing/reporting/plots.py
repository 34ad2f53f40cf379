"""The figures of the comparison: which ones a study has, their captions and files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_routing.figures.style import save, use_style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from moe_routing.config.study import StudyConfig
    from moe_routing.reporting.results import StudyResults

FOLDER = "comparison/comparison_plots"

CAPTIONS: dict[str, str] = {
    "pareto": "Quality against mean experts per token, with intervals. One line is static top-k "
    "with the model's own weights at every k that was scored (the compared strategies and those of "
    "`comparison/controls.csv`), clipped to the range of the strategies. An adaptive setting with "
    "these weights improves on a fixed number of experts if it lies on the better side of that "
    "line. Other lines connect the settings of a family, rivals included. The grey step is the "
    "Pareto front of all settings drawn. The ring marks the baseline; arrows point to better "
    "values.",
    "forest": "Paired differences from the baseline with intervals. Filled markers: significant "
    "after correction for multiplicity. Shaded: losses at least as large as the non-inferiority "
    "margin.",
    "experts_by_layer": "Mean experts per token in each layer, for strategies with a varying "
    "number of experts; the dotted line is the baseline.",
    "experts_per_token": "Cumulative distribution of the number of experts over routing decisions "
    "(one token in one layer): proportion of decisions with at most c experts.",
    "quality_by_max_k": "Quality against the maximum number of experts per token: BH at fixed "
    "alpha, and static top-k. Numbers beside the points are the mean experts that BH used.",
    "critical_difference": "Average ranks over data sets. Strategies joined by a bar on the right "
    "do not differ significantly by Nemenyi's test; those inside the band do not differ "
    "significantly from the baseline.",
    "speed": "Measured tokens per second against mean experts per token: one run per cell, not "
    "repeated.",
}
"""By file name without suffix."""


def planned(config: StudyConfig) -> list[str]:
    """Return the figures that a complete run of this config has."""
    names = list(CAPTIONS)
    absent = {
        "quality_by_max_k": not _has_sweep(config),
        "experts_by_layer": not varying(config),
        "experts_per_token": not varying(config),
        "forest": len(config.strategies) < 2,
        "critical_difference": len(config.strategies) < 3 or len(config.datasets) < 2,
    }
    return [name for name in names if not absent.get(name, False)]


def varying(config: StudyConfig) -> list[str]:
    """Return the compared strategies whose number of experts may vary over tokens."""
    parsed = config.parsed
    return [
        name for name in config.strategies if parsed[name].min_experts != parsed[name].max_experts
    ]


def _has_sweep(config: StudyConfig) -> bool:
    """Return whether two BH settings differ in max_k only."""
    from moe_routing.routing.strategies.testing import BH

    compared = [config.parsed[name] for name in config.strategies]
    bh = [strategy for strategy in compared if type(strategy) is BH]
    rest = [(s.alpha, s.null, s.weighting, s.min_k) for s in bh]
    return len(set(rest)) < len(rest)


def draw(study: StudyResults) -> dict[str, Callable[[], Figure]]:
    """Return the figures whose inputs this study has: functions that draw them, by name."""
    from moe_routing.figures import comparison, comparison_routing, comparison_statistics

    cells, tables, baseline = study.cells, study.statistics, study.baseline
    families = study.family_of
    counts = comparison_routing.read_counts(study.folder, cells)
    strategies = varying(study.config)
    figures = {
        "pareto": lambda: comparison.pareto(cells, baseline, study.static_curve, _rivals(study)),
        "forest": lambda: comparison_statistics.forest(
            tables["paired"], tables["noninferiority"], families, baseline
        ),
        "experts_by_layer": lambda: comparison_routing.experts_by_layer(
            counts, strategies, baseline
        ),
        "experts_per_token": lambda: comparison_routing.experts_per_token(counts, strategies),
        "quality_by_max_k": lambda: comparison.quality_by_max_k(cells),
        "critical_difference": lambda: comparison_statistics.critical_difference(
            tables["friedman"], families, baseline
        ),
        "speed": lambda: comparison.speed(cells, baseline),
    }
    absent = {
        "forest": tables["paired"].empty,
        "experts_by_layer": not strategies,
        "experts_per_token": not strategies,
        "quality_by_max_k": comparison.max_k_sweeps(cells).empty,
        "critical_difference": tables["friedman"].empty,
    }
    return {name: figures[name] for name in CAPTIONS if not absent.get(name, False)}


def _rivals(study: StudyResults) -> pd.DataFrame | None:
    """Return the cells of rival rules; None without any."""
    controls, table = study.controls, study.statistics["controls"]
    if controls.empty or table.empty:
        return None
    names = table.loc[table["kind"] == "rival", "strategy"]
    rivals = controls[controls["strategy"].isin(names)]
    return None if rivals.empty else rivals


def write_plots(study: StudyResults) -> list[str]:
    """Write every figure this study has inputs for as PNG and SVG; return their names."""
    use_style()
    figures = draw(study)
    for name, figure in figures.items():
        save(figure(), study.folder / FOLDER / name)
    return list(figures)
