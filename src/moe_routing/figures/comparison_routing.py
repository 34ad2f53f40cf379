"""Figures of how many experts tokens get: by layer, and over tokens.

Shape letters: L layers, C counts of experts (0 ... E).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_routing.errors import InputError
from moe_routing.figures.comparison import _panels, _place_legend
from moe_routing.figures.labels import dataset_label
from moe_routing.figures.style import look

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_counts(results: Path, strategies: Iterable[str], datasets: Iterable[str]) -> pd.DataFrame:
    """Read how many experts tokens got from the cells of a study.

    Returns:
        One row a strategy, data set, layer and count: ``strategy``, ``family``, ``dataset``,
        ``layer``, ``experts`` and ``share`` (of the decisions of that layer).

    Raises:
        InputError: a cell is missing.
    """
    tables = []
    for strategy in strategies:
        for dataset in datasets:
            path = Path(results) / "cells" / strategy / f"{dataset}.json"
            if not path.is_file():
                raise InputError(f"{path}: no such cell; run the workflow again to make it")
            tables.append(_counts_of(json.loads(path.read_text(encoding="utf-8"))))
    return pd.concat(tables, ignore_index=True)


def _counts_of(record: dict) -> pd.DataFrame:
    histogram_LC = np.array(record["routing"]["by_layer"]["count_histogram"], float)
    share_LC = histogram_LC / histogram_LC.sum(1, keepdims=True).clip(min=1)
    layer, experts = np.nonzero(share_LC)
    return pd.DataFrame(
        {
            "strategy": record["strategy"]["id"],
            "family": record["strategy"]["family"],
            "dataset": record["dataset"],
            "layer": layer,
            "experts": experts,
            "share": share_LC[layer, experts],
        }
    )


def experts_by_layer(counts: pd.DataFrame, baseline: str) -> Figure:
    """Draw the mean experts of each layer, for the strategies whose number varies over tokens.

    The dotted line is the baseline.
    """
    figure, axes = _panels(counts)
    varying = varying_strategies(counts)
    for axis, (dataset, rows) in zip(axes, counts.groupby("dataset", sort=False), strict=True):
        means = _mean_by_layer(rows)
        for number, strategy in enumerate(varying):
            series = means.loc[strategy]
            style = _line(number, rows.loc[rows["strategy"] == strategy, "family"].iloc[0])
            axis.plot(series.index, series.values, label=strategy, **style)
        if baseline in means.index:
            axis.plot(means.loc[baseline], ls=":", color="#000000", label=f"{baseline} (baseline)")
        axis.set(title=dataset_label(dataset), xlabel="Layer", ylabel="Mean experts a token")
        axis.set_ylim(0, None)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0].get_legend_handles_labels()
    _place_legend(figure, dict(zip(labels, handles, strict=True)))
    return figure


def experts_per_token(counts: pd.DataFrame) -> Figure:
    """Draw the distribution of experts over all decisions (tokens x layers), cumulated.

    The curve at c is the share of decisions with at most c experts.
    """
    figure, axes = _panels(counts)
    varying = varying_strategies(counts)
    for axis, (dataset, rows) in zip(axes, counts.groupby("dataset", sort=False), strict=True):
        for number, strategy in enumerate(varying):
            own = rows[rows["strategy"] == strategy]
            share = own.groupby("experts")["share"].sum() / own["layer"].nunique()
            style = _line(number, own["family"].iloc[0]) | {"marker": ""}
            x = np.concatenate([[0], share.index.to_numpy(), [counts["experts"].max()]])
            y = np.concatenate([[0], share.cumsum().to_numpy(), [1]])
            axis.step(x, y, where="post", label=strategy, **style)
        axis.set(title=dataset_label(dataset), xlabel="Experts c", ylim=(0, 1.02))
        axis.set_ylabel("Share of decisions with at most c")
        axis.set_xscale("symlog", base=2, linthresh=1)
        axis.set_xticks([0, *2 ** np.arange(int(np.log2(counts["experts"].max())) + 1)])
        axis.xaxis.set_major_formatter("{x:.0f}")
    handles, labels = axes[0].get_legend_handles_labels()
    _place_legend(figure, dict(zip(labels, handles, strict=True)))
    return figure


def varying_strategies(counts: pd.DataFrame) -> list[str]:
    """Return the strategies that give different tokens different numbers of experts."""
    numbers = counts.groupby("strategy", sort=False)["experts"].nunique()
    return list(numbers.index[numbers > 1])


def _mean_by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    weighted = rows.assign(mean=rows["experts"] * rows["share"])
    table = weighted.pivot_table(index="strategy", columns="layer", values="mean", aggfunc="sum")
    return table.reindex(rows["strategy"].drop_duplicates())


def _line(number: int, family: str) -> dict[str, object]:
    """Tell lines of one family apart by lightness, dashes and markers."""
    import matplotlib as mpl

    ramp = mpl.colormaps["viridis"]
    markers = "osD^vPX<>h*d"
    dashes = ["-", "--", "-.", ":"]
    return {
        "color": look(family).colour if family != "bh" else ramp((number * 0.37) % 0.9),
        "marker": markers[number % len(markers)],
        "ls": dashes[number % len(dashes)],
        "lw": 1.0,
        "ms": 3.5,
    }
