"""Figures of the comparison of strategies: quality against experts and max_k.

Every function takes the table of cells (``comparison/full_routing_results.csv``), one row per
strategy and data set, and returns a figure. Nothing is read or written here.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from moe_routing import wording
from moe_routing.analysis.tables import groups_of
from moe_routing.figures.series import (
    REFERENCE,
    error_bars,
    experts_axis,
    legend_in_spare_panel,
    panels,
    wrapped,
)
from moe_routing.figures.style import look
from moe_routing.routing.strategies import family_entry, static_families
from moe_routing.statistics.pareto import pareto_front
from moe_routing.vocabulary import DATASETS, METRICS

_HEADROOM = 1.1
"""Upper end of an axis as a multiple of the highest marker, so that none is cut."""
_INTERVALS = ["value", "ci_low", "ci_high"]


def pareto(
    cells: pd.DataFrame,
    baseline: str,
    curve: pd.DataFrame | None = None,
    rivals: pd.DataFrame | None = None,
) -> Figure:
    """Draw quality against mean experts for each data set, with intervals.

    One line is static top-k with the model's own weights: strategies with these weights are
    compared with it at equal mean experts. Other lines connect the settings of a family. The grey
    step is the Pareto front of all settings drawn. The ring marks the baseline; arrows point to
    better values. The axes cover the strategies and rivals; the static curve may leave them.

    Args:
        cells: table of cells.
        baseline: strategy to mark.
        curve: cells of static top-k, possibly with more k than ``cells``; None takes those in it.
        rivals: cells of rival rules, drawn as further families.
    """
    cells = _in_percent(cells if rivals is None else pd.concat([cells, rivals]))
    static = _one_line(static_cells(cells) if curve is None else _in_percent(curve))
    figure, axes = _panels(cells)
    for dataset, rows in groups_of(cells, "dataset"):
        axis = axes[dataset]
        own = static[static["dataset"] == dataset]
        drawn = pd.concat([rows, own]).drop_duplicates("strategy")
        _front(axis, drawn, "mean_experts", rows["metric"].iloc[0])
        others = rows[~rows["family"].isin(own["family"]) & ~rows["strategy"].isin(own["strategy"])]
        for family, group in groups_of(pd.concat([own, others]), "family"):
            _points(axis, group.sort_values("mean_experts"), "mean_experts", family)
        _ring(axis, rows[rows["strategy"] == baseline], "mean_experts")
        _quality_axis(axis, dataset, rows)
        inside = own[own["value"].between(*axis.get_ylim())]
        experts = pd.concat([rows["mean_experts"], inside["mean_experts"]])
        experts_axis(axis, experts.min(), experts.max())
        axis.set_xlabel("Mean experts per token")
    _legend(figure, axes, cells)
    return figure


def quality_by_max_k(cells: pd.DataFrame) -> Figure:
    """Draw quality against max_k for BH, a line per alpha, null and weighting with several max_k.

    Static top-k is drawn at its k. Numbers beside the points are the mean experts that BH used.
    """
    cells = _in_percent(cells)
    chosen = pd.concat([max_k_sweeps(cells), _one_line(static_cells(cells))])
    figure, axes = _panels(cells)
    for dataset, rows in groups_of(chosen, "dataset"):
        axis = axes[dataset]
        for number, (label, group) in enumerate(_sweep_lines(rows)):
            family = group["family"].iloc[0]
            ordered = group.sort_values("k")
            _points(axis, ordered, "k", family, label=label, hollow=number > 1)
            if family == "bh":
                _counts(axis, ordered)
        _quality_axis(axis, dataset, rows)
        experts_axis(axis, rows["k"].min(), rows["k"].max())
        axis.set_xlabel("Maximum experts per token (k or max_k)")
    legend_in_spare_panel(figure, _legend_entries(axes), 2 * len(axes))
    return figure


def static_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of static top-k with the weights of BH, or with those of the first cell."""
    static = cells[cells["family"].isin(entry.name for entry in static_families().values())]
    bh = cells[cells["family"] == "bh"]
    weighting = (cells if bh.empty else bh)["weighting"].iloc[0]
    return static[static["weighting"] == weighting].drop_duplicates(["dataset", "k"])


def _one_line(static: pd.DataFrame) -> pd.DataFrame:
    """Give static cells of one weighting the family of that weighting, the stock model included."""
    curves = {weighting: entry.name for weighting, entry in static_families().items()}
    return static.assign(family=static["weighting"].map(curves))


def _by_weighting(cells: pd.DataFrame) -> pd.DataFrame:
    """Put the stock model on the static line of its weights, each k once."""
    is_static = cells["family"].isin(entry.name for entry in static_families().values())
    static = _one_line(cells[is_static]).drop_duplicates(["dataset", "family", "k"])
    return pd.concat([static, cells[~is_static]])


def max_k_sweeps(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the BH cells whose alpha, null and weighting occur with at least two max_k."""
    bh = cells[cells["family"] == "bh"]
    if bh.empty:
        return bh
    return bh[bh.groupby(["dataset", "alpha", "null", "weighting"])["k"].transform("nunique") > 1]


def _in_percent(cells: pd.DataFrame) -> pd.DataFrame:
    """Return cells with proportions in percent, as in texts and tables."""
    factor = cells["metric"].map(lambda name: METRICS[str(name)].percent)
    scaled = cells[_INTERVALS].mul(factor, axis=0)
    return cells.assign(**{name: scaled[name] for name in _INTERVALS})


def _panels(cells: pd.DataFrame) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with one panel per data set."""
    return panels(list(cells["dataset"].unique()), columns=2, height=2.9)


def _points(
    axis: Axes,
    rows: pd.DataFrame,
    x: str,
    family: str,
    label: str | None = None,
    hollow: bool = False,
) -> None:
    style = look(family)
    error = error_bars(rows, "value", "ci_low", "ci_high")
    axis.plot(*_chords(rows, x), color=style.colour, ls=style.dash, lw=0.9)
    axis.errorbar(
        rows[x], rows["value"], yerr=error, marker=style.marker, color=style.colour, ls="",
        elinewidth=0.7, capsize=1.2, ecolor=(style.colour, 0.5),
        label=label or family_entry(family).label,
        mfc="white" if hollow else style.colour, mec=style.colour, mew=0.9,
    )  # fmt: skip


def _chords(rows: pd.DataFrame, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the lines between points as comparisons at equal experts take them.

    They are straight in experts and in nats, so that they bend on logarithmic axes of experts.
    """
    at, value = (rows[name].to_numpy(float) for name in (x, "value"))
    dense = np.unique(np.concatenate([np.linspace(a, b, 30) for a, b in pairwise(at)] or [at]))
    if METRICS[rows["metric"].iloc[0]].scale == "exp":
        return dense, np.exp(np.interp(dense, at, np.log(value)))
    return dense, np.interp(dense, at, value)


def _front(axis: Axes, rows: pd.DataFrame, x: str, metric: str) -> None:
    cost, value = rows[x].to_numpy(), rows["value"].to_numpy()
    on_front = pareto_front(cost, -value if METRICS[metric].higher_is_better else value)
    order = np.argsort(cost[on_front])
    axis.plot(
        cost[on_front][order], value[on_front][order], drawstyle="steps-post", color="#BBBBBB",
        lw=5, alpha=0.6, zorder=0, solid_capstyle="round", label="Pareto front",
    )  # fmt: skip


def _ring(axis: Axes, rows: pd.DataFrame, x: str, y: str = "value") -> None:
    axis.plot(rows[x], rows[y], "o", ms=11, mfc="none", mec="#444444", mew=1, label="Baseline")


def _counts(axis: Axes, rows: pd.DataFrame) -> None:
    """Write the mean experts that were used beside each point."""
    for row in rows.itertuples():
        axis.annotate(
            f"{row.mean_experts:.1f}", (row.k, row.value), textcoords="offset points",
            xytext=(3, 4), fontsize=6.5, color="#333333",
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
        )  # fmt: skip


def _sweep_lines(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    is_bh = rows["family"] == "bh"
    lines = [(family_entry(name).label, group) for name, group in groups_of(rows[~is_bh], "family")]
    bh = rows[is_bh]
    for (alpha, null, weighting), group in bh.groupby(["alpha", "null", "weighting"], sort=False):
        lines.append((f"BH, alpha {alpha}, null {null}, weights {weighting}", group))
    return [(label, group) for label, group in lines if not group.empty]


def _title(dataset: str, rows: pd.DataFrame) -> str:
    return f"{DATASETS[dataset].label} (n = {int(rows['n_items'].iloc[0]):,})"


def _quality_axis(axis: Axes, dataset: str, rows: pd.DataFrame) -> None:
    """Label an axis of quality; its limits cover the intervals of ``rows``."""
    metric = METRICS[rows["metric"].iloc[0]]
    unit = ", %" if metric.is_proportion else ""
    label = wrapped(f"{wording.capital(metric.label)}{unit} {metric.arrow}")
    axis.set(title=_title(dataset, rows), ylabel=label)
    low, high = rows["ci_low"].min(), rows["ci_high"].max()
    chance = metric.percent * DATASETS[dataset].chance
    if metric.is_proportion and chance:
        axis.axhline(chance, label="Guessing", **REFERENCE)
        low, high = min(low, chance), max(high, chance)
    if metric.scale == "exp":
        axis.set_yscale("log")
        room = (high / low) ** 0.06
        axis.set_ylim(low / room, high * room)
        _plain_ticks(axis)
    elif high > low:
        room = 0.06 * (high - low)
        axis.set_ylim(low - room, high + room)


def _plain_ticks(axis: Axes) -> None:
    """Label a logarithmic axis with plain numbers, about five of them."""
    low, high = axis.get_ylim()
    decades = np.log10(high / low)
    steps = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
    if decades <= 0.6:
        axis.set_yscale("linear")
        return
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend_entries(axes: dict[str, Axes]) -> dict[str, Artist]:
    handles, labels = next(iter(axes.values())).get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def _legend(figure: Figure, axes: dict[str, Axes], cells: pd.DataFrame) -> None:
    found = _legend_entries(axes)
    order = [family_entry(family).label for family in cells["family"].drop_duplicates()]
    order += [label for label in ("Baseline", "Pareto front", "Guessing") if label in found]
    entries = {label: found[label] for label in order if label in found}
    legend_in_spare_panel(figure, entries, 2 * len(axes))
