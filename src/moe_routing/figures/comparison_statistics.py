"""The figure of the tests: paired differences against the margin."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from moe_routing import wording
from moe_routing.analysis.tables import truth_values
from moe_routing.figures.series import wrapped
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
    as the non-inferiority margin. Losses are on the right in every panel, so an axis on which more
    is better runs from right to left.

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
    unit = f", {metric.unit}" if metric.is_proportion else ""
    axis.set_xlabel(wrapped(f"{wording.capital(metric.label)}{unit}"))
    if margin is not None:
        _shade(axis, scale * metric.loss(margin))
    if metric.higher_is_better:
        axis.invert_xaxis()


def _shade(axis: Axes, edge: float) -> None:
    low, high = axis.get_xlim()
    if max(abs(low), abs(high)) > _LINEAR_UP_TO * abs(edge):
        axis.set_xscale("symlog", linthresh=5 * abs(edge))
        low, high = 1.3 * low, 1.3 * high  # so that no marker is cut
        axis.xaxis.set_major_locator(FixedLocator(_ticks(axis, abs(edge), low, high)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
    low, high = min(low, 1.5 * edge), max(high, 1.5 * edge)
    axis.axvspan(*((edge, high) if edge > 0 else (low, edge)), color="#BBBBBB", alpha=0.35, lw=0)
    axis.axvline(edge, color="#777777", lw=0.8, ls="--")
    axis.set_xlim(low, high)


def _ticks(axis: Axes, margin: float, low: float, high: float) -> list[float]:
    """Return round numbers on a symlog axis, no two of them so near that their labels touch."""
    powers = 10.0 ** np.arange(6) * 10.0 ** np.floor(np.log10(margin))
    steps = np.concatenate([powers, 3 * powers])
    place = axis.transScale.transform
    width = np.ptp(place([[low, 0], [high, 0]])[:, 0])
    ticks = [0.0]
    for tick in [*np.sort(np.abs(steps))[::-1], *-np.sort(np.abs(steps))[::-1]]:
        apart = [abs(place([[tick, 0]])[0, 0] - place([[one, 0]])[0, 0]) for one in ticks]
        if low <= tick <= high and min(apart) > 0.17 * width:
            ticks.append(float(tick))
    return ticks
