"""The figures of the comparison, drawn from a study's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from moe_routing.config.cells import UNIQUE_FILE
from moe_routing.errors import InputError
from moe_routing.figures import budgets, comparison, comparison_routing, comparison_statistics
from moe_routing.figures.style import save, use_style
from moe_routing.reporting.article_figures import CAPTIONS, COMPARISON, varying
from moe_routing.reporting.names import short_words
from moe_routing.reporting.results import StudyResults
from moe_routing.statistics.rules import FITTED

SMALL_DPI = 110
"""Resolution of a small figure."""


def draw(study: StudyResults) -> dict[str, Callable[[], Figure]]:
    """Return the figures whose inputs this study has: functions that draw them, by name."""
    cells, tables, baseline = study.cells, study.statistics, study.baseline
    families = study.family_of
    counts = comparison_routing.read_counts(study.folder, cells)
    strategies = varying(study.config)
    rows, unique = study.budgets, study.table(UNIQUE_FILE)
    top_k, margin = study.model.top_k, study.config.statistics.margin_nats
    weighting = study.model.rule.weighting
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
        "budgets": lambda: budgets.budgets(rows, top_k, margin),
        "budgets_fitted": lambda: budgets.budgets(rows, top_k, margin, FITTED),
        "unique_experts": lambda: budgets.unique_experts(
            unique, {name: short_words(name, weighting) for name in unique["strategy"].unique()}
        ),
    }
    absent = {
        "forest": tables["paired"].empty,
        "experts_by_layer": not strategies,
        "experts_per_token": not strategies,
        "quality_by_max_k": comparison.max_k_sweeps(cells).empty,
        "budgets": rows.empty,
        "budgets_fitted": rows.empty or not (rows["scale"] == FITTED).any(),
        "unique_experts": unique.empty,
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
        save(figure(), study.folder / COMPARISON / name)
    return list(figures)


def write_small(study: StudyResults, names: Sequence[str], folder: Path) -> None:
    """Write some of the figures as small PNG files, as a README shows them.

    Args:
        study: the results.
        names: of figures, as in :func:`draw`.
        folder: where to write.

    Raises:
        InputError: this study has no such figure.
    """
    use_style()
    figures = draw(study)
    for name in names:
        if name not in figures:
            raise InputError(f"figure '{name}'; this study has: {', '.join(figures)}")
        with mpl.rc_context({"savefig.dpi": SMALL_DPI}):
            save(figures[name](), folder / name, ["png"])
