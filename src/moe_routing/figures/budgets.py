"""Figures of matched budgets: loss against mean experts, and distinct experts per batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

from moe_routing import wording
from moe_routing.analysis.tables import groups_of
from moe_routing.figures.series import (
    COLOURS,
    DASHES,
    MARKERS,
    REFERENCE,
    error_bars,
    legend_in_spare_panel,
    line_style,
    panels,
)
from moe_routing.figures.style import WIDTH
from moe_routing.statistics.rules import AS_IS, CERTIFIED, OMITTED, PLAIN, RuleKind
from moe_routing.vocabulary import DATASETS, METRICS

_STAR: dict[str, Any] = {"marker": "*", "ms": 11, "color": "#CC79A7", "mec": "black", "mew": 0.6}
_STATIC: dict[str, Any] = {"color": "#000000", "marker": "o", "ls": "-", "mfc": "#000000"}


def budgets(table: pd.DataFrame, top_k: int, margin: float, scale: str = AS_IS) -> Figure:
    """Draw loss over the stock model against mean experts, one panel per data set.

    The axis of experts is linear, as is the line between fixed numbers that rules are compared
    with. Kinds with a substitute have the colour and marker of those without, hollow.

    Args:
        table: ``statistics/matched_budgets.csv`` with kinds.
        top_k: experts per token of the model, where the loss of a fixed number is 0.
        margin: non-inferiority margin, nats per token, drawn on sets in that metric.
        scale: as is or fitted.
    """
    rows = table[table["scale"] == scale]
    rows = rows[rows["mean_experts"].notna()]
    other = rows[[kind != PLAIN for kind in rows["kind"]]]
    least = other["mean_experts"].min() - 0.6 if len(other) else 0.0
    rows = rows[rows["mean_experts"] >= least]
    datasets = list(rows["dataset"].drop_duplicates())
    looks = _looks(table)  # of every kind, so that one looks the same at either scale
    figure, axes = panels(datasets, columns=2 if len(datasets) > 1 else 1, height=3.0)
    found: dict[str, Artist] = {}
    for dataset, axis in axes.items():
        own = rows[rows["dataset"] == dataset]
        _panel(axis, own, looks, top_k)
        metric = METRICS[own["metric"].iloc[0]]
        if metric.name == "nats_per_token":
            axis.axhline(margin, label="Margin", **REFERENCE)
        elif metric.is_proportion and (chance := DATASETS[dataset].chance):
            stock = own["value"] - metric.loss(1.0) * own["loss_over_stock"]
            axis.axhline(float(stock.iloc[0]) - chance, label="Guessing", **REFERENCE)
        title = f"{DATASETS[dataset].label} (n = {int(own['n_items'].iloc[0]):,})"
        axis.set(
            title=title,
            xlabel="Mean experts per token",
            xlim=(max(least, 0.5), top_k + 0.3),
            ylabel=f"Loss over stock,\n{metric.unit} \N{DOWNWARDS ARROW}",
        )
        axis.xaxis.set_major_locator(FixedLocator(range(1, top_k + 1)))
        for artist, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, artist)
    order = [wording.capital(kind.words) for kind in looks]
    entries = {label: found[label] for label in [*order, *found] if label in found}
    legend_in_spare_panel(figure, entries, 3)
    return figure


def _looks(table: pd.DataFrame) -> dict[RuleKind, dict[str, Any]]:
    """Return the line style of every kind but certified ones; fixed numbers are black."""
    kinds = [kind for kind in table["kind"].drop_duplicates() if kind.rule != CERTIFIED]
    kinds.sort(key=lambda kind: (kind != PLAIN, kind.rule, kind.score, kind.dropped != OMITTED))
    looks: dict[RuleKind, dict[str, Any]] = {}
    index: dict[tuple[object, ...], int] = {}
    for kind in kinds:
        if kind == PLAIN:
            looks[kind] = {**_STATIC, "mec": "#000000", "zorder": 3}
            continue
        twin = (kind.rule, kind.score, kind.widened, kind.weighting)
        place = index.setdefault(twin, len(index))
        colours = [colour for colour in COLOURS if colour != "#000000"]
        colour = colours[place % len(colours)]
        hollow = kind.dropped != OMITTED
        looks[kind] = {
            "color": colour, "marker": MARKERS[(place + 1) % len(MARKERS)],
            "ls": DASHES[(place + 1) % len(DASHES)], "mec": colour,
            "mfc": "white" if hollow else colour,
        }  # fmt: skip
    return looks


def _panel(
    axis: Axes, rows: pd.DataFrame, looks: Mapping[RuleKind, Mapping[str, Any]], top_k: int
) -> None:
    for kind, own in groups_of(rows, "kind"):
        own = own.sort_values("mean_experts")
        error = error_bars(own, "loss_over_stock", "low", "high")
        if kind.rule == CERTIFIED:
            axis.errorbar(
                own["mean_experts"], own["loss_over_stock"], yerr=error, ls="", elinewidth=0.7,
                zorder=5, label=wording.capital(kind.name), **_STAR,
            )  # fmt: skip
            continue
        axis.errorbar(
            own["mean_experts"], own["loss_over_stock"], yerr=error, lw=1.0, ms=4.5,
            elinewidth=0.7, capsize=1.2, ecolor=(looks[kind]["color"], 0.5), mew=0.9,
            label=wording.capital(kind.words), **looks[kind],
        )  # fmt: skip
        if kind == PLAIN:  # fixed numbers reach the stock model, which loses nothing
            last = own.iloc[-1]
            axis.plot(
                [last["mean_experts"], top_k],
                [last["loss_over_stock"], 0.0],
                color="#000000",
                lw=1.0,
            )
    axis.axhline(0, color="#BBBBBB", lw=0.8, zorder=0)


def unique_experts(table: pd.DataFrame, names: Mapping[str, str]) -> Figure:
    """Draw distinct experts per layer against batch size, one line per strategy.

    The legend has the order of the lines at the largest batch, and each line's experts for one
    token.

    Args:
        table: ``efficiency/unique_experts.csv``: strategy, batch_size, layer, unique_experts.
        names: every strategy in words.
    """
    means = table.groupby(["strategy", "batch_size"])["unique_experts"].mean().unstack()
    means = means.loc[table["strategy"].drop_duplicates()]
    means = means.sort_values(means.columns[-1], ascending=False, kind="stable")
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for index, (strategy, own) in enumerate(means.iterrows()):
        label = f"{wording.capital(names[str(strategy)])} ({own.iloc[0]:.1f})"
        axis.plot(means.columns, own, lw=1.0, ms=4, label=label, **line_style(index))
    sizes = means.columns
    axis.set(
        xscale="log",
        xlabel="Tokens in a batch",
        ylabel="Distinct experts per layer",
        ylim=(0, None),
    )
    axis.xaxis.set_major_locator(FixedLocator(np.asarray(sizes, float).tolist()))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", frameon=False, title="Rule (experts for one token)")
    return figure
