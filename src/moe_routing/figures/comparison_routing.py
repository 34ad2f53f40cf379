"""Figures of the number of experts per token: by layer, and its distribution.

Shape letters: L layers, C counts of experts (0 ... E).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_routing.figures.series import place, unmarked
from moe_routing.figures.style import WIDTH
from moe_routing.files import read_json
from moe_routing.vocabulary import DATASETS


def read_counts(results: Path, cells: pd.DataFrame) -> pd.DataFrame:
    """Read the numbers of experts per token from the cells of a study.

    Args:
        results: folder of the study.
        cells: table of cells; one file is read per row.

    Returns:
        One row per strategy, data set, layer and count: ``strategy``, ``family``, ``dataset``,
        ``layer``, ``experts`` and ``proportion`` (of the decisions of that layer).

    Raises:
        InputError: a cell is missing.
    """
    tables = []
    for strategy, dataset in zip(cells["strategy"], cells["dataset"], strict=True):
        path = Path(results) / "cells" / strategy / f"{dataset}.json"
        tables.append(_counts_of(read_json(path)))
    return pd.concat(tables, ignore_index=True)


def _counts_of(record: dict) -> pd.DataFrame:
    histogram_LC = np.array(record["routing"]["by_layer"]["count_histogram"], float)
    proportion_LC = histogram_LC / histogram_LC.sum(1, keepdims=True).clip(min=1)
    layer, experts = np.nonzero(proportion_LC)
    return pd.DataFrame(
        {
            "strategy": record["strategy"]["id"],
            "family": record["strategy"]["family"],
            "dataset": record["dataset"],
            "layer": layer,
            "experts": experts,
            "proportion": proportion_LC[layer, experts],
        }
    )


def experts_by_layer(counts: pd.DataFrame, strategies: list[str], baseline: str) -> Figure:
    """Draw the mean experts of each layer, for strategies with a varying number of experts.

    A row per family; the dotted line is the baseline.
    """
    figure, grid = _family_grid(counts, strategies)
    for axis, rows, styles in grid:
        means = _mean_by_layer(rows)
        for strategy, style in styles.items():
            axis.plot(means.columns, means.loc[strategy], label=strategy, **style)
        if baseline in means.index:
            axis.plot(means.columns, means.loc[baseline], ls=":", color="#000000", label=baseline)
        axis.set(xlabel="Layer")
        axis.locator_params(axis="x", integer=True)
    for axis, _, _ in grid:  # after all: a row shares its axis
        axis.set_ylim(bottom=0)
    _finish_grid(grid, "Mean experts per token")
    return figure


def experts_per_token(counts: pd.DataFrame, strategies: list[str]) -> Figure:
    """Draw the cumulative distribution of the number of experts over decisions (token x layer).

    The curve at c is the proportion of decisions with at most c experts. A row per family.
    """
    most = int(counts["experts"].max())
    figure, grid = _family_grid(counts, strategies)
    for axis, rows, styles in grid:
        for strategy, style in styles.items():
            own = rows[rows["strategy"] == strategy]
            proportion = own.groupby("experts")["proportion"].sum() / own["layer"].nunique()
            x = np.concatenate([[0], proportion.index.to_numpy(), [most]])
            y = np.concatenate([[0], proportion.cumsum().to_numpy(), [1]])
            axis.step(x, y, where="post", label=strategy, **unmarked(style))
        axis.set(xlabel="Number of experts c", ylim=(0, 1.02))
        axis.set_xscale("symlog", base=2, linthresh=1)
        axis.set_xticks([0, *(2 ** np.arange(int(np.log2(most)) + 1)).tolist()])
        axis.xaxis.set_major_formatter("{x:.0f}")
    _finish_grid(grid, "Proportion of decisions\nwith at most c experts")
    return figure


Cell = tuple["Axes", pd.DataFrame, dict[str, dict[str, Any]]]


def _family_grid(counts: pd.DataFrame, strategies: list[str]) -> tuple[Figure, list[Cell]]:
    """Return a grid of axes (family x data set) with the rows and line styles of each."""
    varying = counts[counts["strategy"].isin(strategies)]
    families, datasets = varying["family"].unique(), varying["dataset"].unique()
    figure, axes = plt.subplots(
        len(families), len(datasets), squeeze=False, sharex=True, sharey="row",
        layout="constrained", figsize=(min(WIDTH, 2.2 + 2 * len(datasets)), 2.3 * len(families)),
    )  # fmt: skip
    grid = []
    for down, family in enumerate(families):
        names = varying.loc[varying["family"] == family, "strategy"].unique()
        styles = {name: _line(index, len(names)) for index, name in enumerate(names)}
        for across, dataset in enumerate(datasets):
            grid.append((axes[down, across], counts[counts["dataset"] == dataset], styles))
    return figure, grid


def _finish_grid(grid: list[Cell], label: str) -> None:
    for axis, rows, _ in grid:
        position = place(axis)
        if position.is_first_row():
            axis.set_title(DATASETS[rows["dataset"].iloc[0]].label)
        if position.is_first_col():
            axis.set_ylabel(label)
        if not position.is_last_row():
            axis.set_xlabel("")
        if position.is_last_col():
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _mean_by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    weighted = rows.assign(mean=rows["experts"] * rows["proportion"])
    table = weighted.pivot_table(index="strategy", columns="layer", values="mean", aggfunc="sum")
    return table.reindex(rows["strategy"].drop_duplicates())


def _line(index: int, lines: int) -> dict[str, Any]:
    """Return the style of a line of a family: lightness, marker and dashes differ."""
    return {
        "color": mpl.colormaps["viridis"](0.85 * index / max(lines - 1, 1)),
        "marker": "osD^vPX<>h*d"[index % 12],
        "ls": ["-", "--", "-."][index % 3],
        "lw": 1.1,
        "ms": 3.5,
    }
