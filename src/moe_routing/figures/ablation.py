"""The figure of the expert ablation."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_routing.analysis.outputs import ABLATION, ALL_LAYERS, NO_NULL
from moe_routing.analysis.tables import groups_of, read_csv
from moe_routing.figures.series import (
    REFERENCE,
    as_words,
    error_bars,
    legend_below,
    level_axis,
    line_style,
    save_all,
)
from moe_routing.figures.style import WIDTH, use_style


def draw_ablation(folder: Path) -> None:
    """Draw the figure of ``ablation/`` into ``ablation/ablation_plots/``."""
    use_style()
    save_all(
        {"false_discoveries": false_discoveries(read_csv(folder / "ablation.csv"))},
        folder,
        ABLATION,
    )


def false_discoveries(ablation: pd.DataFrame) -> Figure:
    """Draw the empirical false discovery proportion and rate against alpha, by null and epsilon.

    The same removals from the stock model are used for every null. The change is that of the
    token's own next-token loss. The grey band is the proportion among all experts that the stock
    router chose. The legend gives the proportion of a null's discoveries that are not among them
    and could not be removed.
    """
    ablation = ablation[
        (ablation["layer"].astype(str) == ALL_LAYERS) & (ablation["scope"] == "own")
    ]
    epsilons = sorted(ablation["epsilon"].unique())
    figure, grid = plt.subplots(
        2, len(epsilons), figsize=(WIDTH, 4.8), squeeze=False, sharex=True, sharey="row",
        layout="constrained",
    )  # fmt: skip
    labels = {"fdp": "False discovery proportion", "fdr": "False discovery rate"}
    for across, epsilon in enumerate(epsilons):
        own = ablation[np.isclose(ablation["epsilon"], epsilon)]
        for axis, (name, label) in zip(grid[:, across], labels.items(), strict=True):
            _proportion(axis, own, name)
            axis.set(ylabel=label if across == 0 else "", ylim=(-0.02, 1.02))
        noisy = "\n(below noise floor)" if epsilon < own["noise_floor"].max() else ""
        grid[0, across].set(title=f"|change| < {epsilon:g} nats{noisy}", xlabel="")
    legend_below(figure, grid[0, 0], columns=3)
    row = ablation.iloc[0]
    removed = row["n_discoveries"] + row["n_undiscovered"]
    figure.suptitle(
        f"Discoveries whose removal changes the next-token loss by less than epsilon\n"
        f"({removed:,} removals from the stock model, {row['n_decisions']:,} decisions in "
        f"{row['n_documents']} passages, the same for every null; bars: intervals)"
    )
    return figure


def _proportion(axis: Axes, own: pd.DataFrame, name: str) -> None:
    stock = own[own["null"] == NO_NULL]
    if len(stock):
        row = stock.iloc[0]
        axis.axhspan(row[f"{name}_low"], row[f"{name}_high"], color="#BBBBBB", alpha=0.6, lw=0,
                     label="all experts that stock chose")  # fmt: skip
    tested = own[own["null"] != NO_NULL]
    alphas = sorted(tested["alpha"].unique())
    for index, (null, rows) in enumerate(groups_of(tested, "null")):
        error = error_bars(rows, name, f"{name}_low", f"{name}_high")
        shift = 1 + 0.06 * index
        axis.errorbar(
            rows["alpha"] * shift, rows[name], yerr=error, capsize=1.5, lw=1, ms=4, elinewidth=0.7,
            label=_with_beyond(null, rows), **line_style(index),
        )  # fmt: skip
    axis.plot(alphas, alphas, label="alpha", **REFERENCE)
    level_axis(axis, alphas)


def _with_beyond(null: str, rows: pd.DataFrame) -> str:
    """Return the name of a null and the proportion of its discoveries that cannot be removed."""
    beyond = rows["n_beyond"].sum()
    every = beyond + rows["n_discoveries"].sum()
    return f"{as_words(null)} ({beyond / every:.0%} beyond stock)" if every else as_words(null)
