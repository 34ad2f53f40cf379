"""The figure of the levers: loss against mean experts, as is and at fitted scale."""

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

from moe_routing.analysis.outputs import NATS_PER_TOKEN
from moe_routing.analysis.tables import groups_of
from moe_routing.figures.series import MARKERS, REFERENCE, error_bars
from moe_routing.figures.style import WIDTH
from moe_routing.statistics.lever_kinds import (
    BEYOND,
    CERTIFIED,
    OMITTED,
    OWN_WEIGHTS,
    PLAIN,
    SCALED,
    STATIC,
    THRESHOLD,
    UNSCALED,
    LeverKind,
    curves,
)
from moe_routing.vocabulary import DATASETS, METRICS

SCALES = {UNSCALED: "as is", SCALED: "at fitted scale"}
_LOOKS = {
    (STATIC, "probability"): ("#000000", "o", "-"),
    (STATIC, "norm"): ("#8C8C00", "s", (0, (5, 1.5))),
    (THRESHOLD, "probability"): ("#56B4E9", "^", (0, (1, 1))),
    (THRESHOLD, "norm"): ("#009E73", "D", "-."),
    (THRESHOLD, "consequence"): ("#D55E00", "v", (0, (3, 1, 1, 1, 1, 1))),
}
"""Colour, marker and dash of the usual kinds; others take the next spare ones."""
_SPARE = ("#7F3C8D", "#666666", "#E69F00", "#0072B2")
_STAR: dict[str, Any] = {"marker": "*", "ms": 11, "color": "#CC79A7", "mec": "black", "mew": 0.6}


def drawn(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that the figure shows: data sets whose loss is in nats per token."""
    if table.empty:
        return table
    return table[table["dataset"].map(lambda name: DATASETS[str(name)].task in NATS_PER_TOKEN)]


def levers(table: pd.DataFrame, margin: float, top_k: int) -> Figure:
    """Draw loss over the reference against mean experts: a row per data set, a column per scale.

    One line per kind of lever, with intervals. Compensated kinds have the colour and marker of the
    kind without substitute, hollow. Stars are certified strategies. The dotted line is the margin.

    Args:
        table: rows of ``statistics/levers.csv`` with their kinds
            (:func:`moe_routing.statistics.lever_kinds.with_kinds`).
        margin: non-inferiority margin, nats per token.
        top_k: experts per token of the model.
    """
    table = _in_range(drawn(table))
    datasets = list(table["dataset"].drop_duplicates())
    looks = _looks(table)
    figure, grid = plt.subplots(
        len(datasets), len(SCALES), figsize=(WIDTH, 2.7 * len(datasets) + 1.0), squeeze=False,
        sharex=True, sharey="row", layout="constrained",
    )  # fmt: skip
    found: dict[str, Artist] = {}
    for axes, dataset in zip(grid, datasets, strict=True):
        rows = table[table["dataset"] == dataset]
        for axis, (scale, words) in zip(axes, SCALES.items(), strict=True):
            _panel(axis, rows, scale, looks, margin, top_k)
            n = int(rows["n_items"].iloc[0])
            axis.set_title(f"{DATASETS[dataset].label} (n = {n:,}), {words}")
        unit = METRICS[rows["metric"].iloc[0]].unit
        axes[0].set_ylabel(f"Loss over the reference,\n{unit} \N{DOWNWARDS ARROW}")
        for axis in axes:
            found |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    _experts_axes(grid[-1], table["mean_experts"])
    found["margin"] = found.pop("margin")  # last
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _in_range(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out points of the static curve with fewer experts than any other rule."""
    other = table.loc[table["kind"] != PLAIN, "mean_experts"]
    least = other.min() * (1 - BEYOND) if len(other) else 0.0
    return table[table["mean_experts"] >= least]


def _looks(table: pd.DataFrame) -> dict[LeverKind, dict[str, Any]]:
    """Return the line style of every kind; compensated kinds look like those without, hollow."""
    kinds = [kind for kind in table["kind"].drop_duplicates() if kind.rule != CERTIFIED]
    kinds = sorted(kinds, key=lambda kind: (*_place(kind), kind.widened, kind.dropped != OMITTED))
    looks: dict[LeverKind, dict[str, Any]] = {}
    spare: dict[tuple[object, ...], int] = {}
    for kind in kinds:
        usual = (kind.rule, kind.score)
        if usual in _LOOKS and not kind.widened and kind.weighting == OWN_WEIGHTS:
            colour, marker, dash = _LOOKS[usual]
        else:
            index = spare.setdefault((*usual, kind.widened, kind.weighting), len(spare))
            colour, marker, dash = _SPARE[index % len(_SPARE)], MARKERS[-1 - index % 5], (0, (2, 1))
        hollow = kind.dropped != OMITTED
        looks[kind] = {
            "color": colour, "marker": marker, "ls": dash, "mec": colour,
            "mfc": "white" if hollow else colour,
        }  # fmt: skip
    return looks


def _place(kind: LeverKind) -> tuple[int, str]:
    """Return the place of a kind in the legend: the usual ones first, in their order."""
    usual = list(_LOOKS)
    own = (kind.rule, kind.score)
    known = own in usual and kind.weighting == OWN_WEIGHTS
    return (usual.index(own), "") if known else (len(usual), kind.words)


def _panel(
    axis: Axes,
    rows: pd.DataFrame,
    scale: str,
    looks: Mapping[LeverKind, Mapping[str, Any]],
    margin: float,
    top_k: int,
) -> None:
    lines = dict(curves(rows, scale, top_k))
    for kind, look in looks.items():
        if kind not in lines:
            continue
        own = lines[kind].rows
        axis.errorbar(
            own["mean_experts"], own["difference"], lw=1.0, ms=4.5, elinewidth=0.7, capsize=1.2,
            yerr=error_bars(own, "difference", "low", "high"), ecolor=(look["color"], 0.5),
            label=kind.words, mew=0.9, **look,
        )  # fmt: skip
    certified = np.array([kind.rule == CERTIFIED for kind in rows["kind"]])
    for strategy, own in groups_of(rows[certified & (rows["scale"] == scale)], "strategy"):
        axis.errorbar(
            own["mean_experts"], own["difference"], ls="", elinewidth=0.7, zorder=5,
            yerr=error_bars(own, "difference", "low", "high"), label=str(strategy), **_STAR,
        )  # fmt: skip
    axis.axhline(0, color="#BBBBBB", lw=0.8, zorder=0)
    axis.axhline(margin, label="margin", **REFERENCE)


def _experts_axes(axes: list[Axes], experts: pd.Series) -> None:
    """Use a logarithmic axis of mean experts with a tick at whole numbers."""
    low, high = experts.min() / 1.12, experts.max() * 1.12
    for axis in axes:
        axis.set(xscale="log", xlim=(low, high), xlabel="Mean experts per token")
        ticks = [k for k in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64) if low < k < high]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
