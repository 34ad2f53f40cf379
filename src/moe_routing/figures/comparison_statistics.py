"""Figures of the tests: paired differences against the margin, and ranks over data sets."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_routing.analysis.tables import truth_values
from moe_routing.figures.style import WIDTH, look
from moe_routing.statistics.verdict import SHOWN
from moe_routing.vocabulary import DATASETS, METRICS

_LINEAR_UP_TO = 25
"""An axis that covers more than this many margins is logarithmic outside 5 margins."""


def forest(
    paired: pd.DataFrame, margins: pd.DataFrame, families: dict[str, str], baseline: str
) -> Figure:
    """Draw paired differences from the baseline with intervals, one panel per data set.

    Filled markers: significant after correction for multiplicity. Shaded: losses at least as large
    as the non-inferiority margin.

    Args:
        paired: ``statistics/paired.csv``.
        margins: ``statistics/noninferiority.csv``.
        families: family of each strategy.
        baseline: the strategy compared with.
    """
    main = paired[truth_values(paired["main"])]
    names = list(main["strategy"].drop_duplicates())
    datasets = list(main["dataset"].drop_duplicates())
    figure, axes = plt.subplots(
        1, len(datasets), squeeze=False, sharey=True, layout="constrained",
        figsize=(max(WIDTH * len(datasets) / 3, WIDTH / 2), 1.4 + 0.19 * len(names)),
    )  # fmt: skip
    for axis, dataset in zip(axes.flat, datasets, strict=True):
        rows = main[main["dataset"] == dataset].set_index("strategy")
        own = margins[margins["dataset"] == dataset] if len(margins) else margins
        margin = float(own["margin"].iloc[0]) if len(own) else None
        _forest_panel(axis, rows, names, families, margin)
        axis.set_title(f"{DATASETS[dataset].label} (n = {int(rows['n_items'].iloc[0]):,})")
    axes.flat[0].set_yticks(range(len(names)), names)
    axes.flat[0].set_ylim(len(names) - 0.4, -0.6)  # the first on top, no marker cut
    figure.supxlabel(f"Difference from {baseline}; shaded: losses beyond the margin", fontsize=9)
    return figure


def _forest_panel(
    axis: Axes, rows: pd.DataFrame, names: list[str], families: dict[str, str], margin: float | None
) -> None:
    metric = METRICS[rows["metric"].iloc[0]]
    scale = metric.percent
    for index, name in enumerate(names):
        if name not in rows.index:
            continue
        row, style = rows.loc[name], look(families[name])
        middle = scale * row["difference"]
        error = [[middle - scale * row["low"]], [scale * row["high"] - middle]]
        axis.errorbar(
            middle, index, xerr=np.maximum(error, 0), marker=style.marker, ls="none",
            color=style.colour, mfc=style.colour if row["verdict"] in SHOWN else "white",
            capsize=1.5, elinewidth=0.8,
        )  # fmt: skip
    axis.axvline(0, color="#444444", lw=0.8)
    axis.set_xlabel(f"{metric.label},\n{metric.unit}" if metric.is_proportion else metric.label)
    if margin is not None:
        _shade(axis, scale * metric.loss(margin))


def _shade(axis: Axes, edge: float) -> None:
    low, high = axis.get_xlim()
    if max(abs(low), abs(high)) > _LINEAR_UP_TO * abs(edge):
        axis.set_xscale("symlog", linthresh=5 * abs(edge))
        low, high = 1.3 * low, 1.3 * high  # so that no marker is cut
        axis.xaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", labelrotation=45)
    low, high = min(low, 1.5 * edge), max(high, 1.5 * edge)
    axis.axvspan(*((edge, high) if edge > 0 else (low, edge)), color="#BBBBBB", alpha=0.35, lw=0)
    axis.axvline(edge, color="#777777", lw=0.8, ls="--")
    axis.set_xlim(low, high)


def critical_difference(friedman: pd.DataFrame, families: dict[str, str], baseline: str) -> Figure:
    """Draw average ranks over data sets, with a bar for each group without significant differences.

    A critical-difference diagram (Demsar 2006, figure 1) with a row per strategy: the bars on the
    right join the largest groups whose average ranks differ by no more than Nemenyi's critical
    difference. The shaded band is one critical difference on either side of the baseline.

    Args:
        friedman: ``statistics/friedman.csv``.
        families: family of each strategy.
        baseline: the strategy compared with.
    """
    ranked = friedman.sort_values("average_rank", kind="stable").reset_index(drop=True)
    distance, last = float(ranked["critical_difference"].iloc[0]), len(ranked)
    figure, axis = plt.subplots(figsize=(WIDTH * 0.8, 1.5 + 0.19 * last), layout="constrained")
    own = ranked.loc[ranked["strategy"] == baseline, "average_rank"]
    if len(own):
        axis.axvspan(
            own.iloc[0] - distance, own.iloc[0] + distance, color="#BBBBBB", alpha=0.35, lw=0,
            label=f"{baseline} \N{PLUS-MINUS SIGN} critical difference ({distance:.1f})",
        )  # fmt: skip
        axis.axvline(own.iloc[0], color="#777777", lw=0.8, ls="--")
    points = zip(ranked["strategy"], ranked["average_rank"], strict=True)
    for index, (strategy, rank) in enumerate(points):
        style = look(families[strategy])
        axis.plot(rank, index, marker=style.marker, color=style.colour, ls="none")
    bars = cliques(ranked["average_rank"], distance)
    step = 0.03 * last
    for number, (first, end) in enumerate(bars):
        axis.plot(
            [last + 0.5 + (number + 1) * step] * 2, [first - 0.25, end + 0.25], color="#222222",
            lw=2.5, solid_capstyle="butt", label=None if number else "Not significantly different",
        )  # fmt: skip
    axis.set_yticks(range(last), ranked["strategy"])
    axis.set_ylim(last - 0.4, -0.6)  # the best on top, no marker cut
    axis.set(
        xlabel=f"Average rank over {int(ranked['n_datasets'].iloc[0])} data sets (1 is best)",
        xlim=(0.5, last + 0.5 + (len(bars) + 1) * step),
    )
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    return figure


def cliques(ranks: pd.Series, distance: float) -> list[tuple[int, int]]:
    """Return the largest groups of two or more ranks that span no more than a distance.

    Args:
        ranks: average ranks, ascending.
        distance: critical difference.

    Returns:
        First and last position of each group; none lies within another.
    """
    values = ranks.to_numpy()
    ends = np.searchsorted(values, values + distance + 1e-9, side="right") - 1
    before = np.concatenate([[-1], ends[:-1]])
    return [(i, int(end)) for i, end in enumerate(ends) if end > i and end > before[i]]
