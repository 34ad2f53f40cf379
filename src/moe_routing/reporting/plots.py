"""The figures of the comparison: which there are, what each shows, and their files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_routing.figures.style import save, use_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_routing.reporting.study import Study

FOLDER = "comparison/comparison_plots"

CAPTIONS: dict[str, str] = {
    "pareto": "Quality against mean experts a token, with intervals. The line of a family joins "
    "its settings; the grey step is the Pareto front; the ring marks the baseline; arrows say "
    "which way is better.",
    "forest": "Paired differences from the baseline with intervals. Filled markers: a difference "
    "was shown after correction for multiplicity. Shaded: losses as large as the non-inferiority "
    "margin.",
    "experts_by_layer": "Mean experts a token in each layer, for the strategies whose number of "
    "experts varies; the dotted line is the baseline.",
    "experts_per_token": "Distribution of the number of experts over decisions (a token in a "
    "layer): share of decisions with at most c experts.",
    "quality_by_max_k": "Quality against the most experts a token may get: BH at fixed alpha, and "
    "static top-k. Numbers beside the points are the mean experts that BH used.",
    "critical_difference": "Average ranks over data sets. Strategies inside the band cannot be "
    "told from the baseline by Nemenyi's test.",
    "speed": "Measured tokens a second against mean experts a token: one run a cell, without "
    "repetition.",
}
"""What each figure shows, by file name without suffix."""


def draw(study: Study) -> dict[str, Callable[[], Figure]]:
    """Return the figures whose inputs this study has, by name, each drawn when called."""
    from moe_routing.figures import comparison, comparison_routing, comparison_statistics

    cells, tables, baseline = study.cells, study.statistics, study.baseline
    families = dict(zip(cells["strategy"], cells["family"], strict=True))
    counts = comparison_routing.read_counts(study.folder, cells)
    figures = {
        "pareto": lambda: comparison.pareto(cells, baseline),
        "speed": lambda: comparison.speed(cells, baseline),
    }
    if not comparison.max_k_sweeps(cells).empty:
        figures["quality_by_max_k"] = lambda: comparison.quality_by_max_k(cells)
    if comparison_routing.varying_strategies(counts):
        figures["experts_by_layer"] = lambda: comparison_routing.experts_by_layer(counts, baseline)
        figures["experts_per_token"] = lambda: comparison_routing.experts_per_token(counts)
    if not tables["paired"].empty:
        figures["forest"] = lambda: comparison_statistics.forest(
            tables["paired"], tables["noninferiority"], families, baseline
        )
    if not tables["friedman"].empty:
        figures["critical_difference"] = lambda: comparison_statistics.critical_difference(
            tables["friedman"], families, baseline
        )
    return {name: figures[name] for name in CAPTIONS if name in figures}


def write_plots(study: Study) -> list[str]:
    """Write every figure this study has inputs for as PNG and SVG; return their names."""
    use_style()
    figures = draw(study)
    for name, figure in figures.items():
        save(figure(), study.folder / FOLDER / name)
    return list(figures)
