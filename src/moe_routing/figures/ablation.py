"""Figures of the expert ablation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_routing.analysis.outputs import ABLATION, ALL_LAYERS, NO_NULL
from moe_routing.analysis.tables import read_csv
from moe_routing.figures.series import (
    REFERENCE,
    layer_axis,
    legend_below,
    level_axis,
    plain,
    save_all,
    series,
)
from moe_routing.figures.style import WIDTH, use_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_ablation(folder: Path) -> None:
    """Draw the figures of ``ablation/`` into ``ablation/ablation_plots/``."""
    use_style()
    figures = {
        "false_discoveries": false_discoveries(read_csv(folder / "ablation.csv")),
        "weight_importance": weight_importance(read_csv(folder / "weight_importance.csv")),
    }
    save_all(figures, folder, ABLATION)


def false_discoveries(ablation: pd.DataFrame) -> Figure:
    """Draw the empirical false discovery proportion and rate against alpha, by null and epsilon.

    Every null is judged by the same removals in the stock model. The change is that of the token's
    own next-token loss; the grey band is what the stock router chose, all of it. The legend says
    which proportion of a null's discoveries lie beyond that, and so could not be removed. Removals
    that found no expert to remove are left out, and counted in the title.
    """
    import matplotlib.pyplot as plt

    ablation = ablation[
        (ablation["layer"].astype(str) == ALL_LAYERS) & (ablation["scope"] == "own")
    ]
    epsilons = sorted(ablation["epsilon"].unique())
    figure, grid = plt.subplots(
        2, len(epsilons), figsize=(WIDTH, 4.8), squeeze=False, sharex=True, sharey="row",
        layout="constrained",
    )  # fmt: skip
    labels = {"fdp": "False among discoveries", "fdr": "Mean of V / max(R, 1)"}
    for across, epsilon in enumerate(epsilons):
        own = ablation[np.isclose(ablation["epsilon"], epsilon)]
        for axis, (name, label) in zip(grid[:, across], labels.items(), strict=True):
            _proportion(axis, own, name)
            axis.set(ylabel=label if across == 0 else "", ylim=(-0.02, 1.02))
        noisy = "\n(below rounding)" if epsilon < own["noise_floor"].max() else ""
        grid[0, across].set(title=f"|change| < {epsilon:g} nats{noisy}", xlabel="")
    legend_below(figure, grid[0, 0], columns=3)
    row = ablation.iloc[0]
    removed = row["n_discoveries"] + row["n_undiscovered"]
    figure.suptitle(
        f"Discoveries whose removal changes the next-token loss by less than epsilon\n"
        f"({removed:,} removals from the stock model, {row['n_decisions']:,} decisions in "
        f"{row['n_documents']} passages, the same for every null;\nbars: intervals; "
        f"{row['n_missed']:,} removals that hit no expert left out)",
        fontsize=9.5,
    )
    return figure


def weight_importance(table: pd.DataFrame) -> Figure:
    """Draw how well the weight of an expert predicts what its removal does, by layer."""
    import matplotlib.pyplot as plt

    own = table[table["arm"] == table["arm"].iloc[0]].sort_values("layer")
    figure, axis = plt.subplots(figsize=(0.6 * WIDTH, 2.9), layout="constrained")
    error = np.abs(own[["low", "high"]].to_numpy().T - own["rho"].to_numpy())
    axis.errorbar(own["layer"], own["rho"], yerr=error, capsize=2, **series(0))
    axis.axhline(0, **REFERENCE)
    layer_axis(axis, int(own["layer"].max()) + 1)
    axis.set_ylabel("Rank correlation of\nweight and |change|")
    row = own.iloc[0]
    axis.set_title(
        f"Weight and effect of removal, {row['arm']}\n({row['n_removals']:,} removals per layer, "
        f"{row['n_documents']} passages)"
    )
    return figure


def _proportion(axis: Axes, own: pd.DataFrame, name: str) -> None:
    stock = own[own["null"] == NO_NULL]
    if len(stock):
        row = stock.iloc[0]
        axis.axhspan(row[f"{name}_low"], row[f"{name}_high"], color="#BBBBBB", alpha=0.6, lw=0,
                     label=f"all of {row['arm']} (stock)")  # fmt: skip
    tested = own[own["null"] != NO_NULL]
    alphas = sorted(tested["alpha"].unique())
    for place, (null, rows) in enumerate(tested.groupby("null", sort=False)):
        error = np.abs(rows[[f"{name}_low", f"{name}_high"]].to_numpy().T - rows[name].to_numpy())
        shift = 1 + 0.06 * place
        axis.errorbar(rows["alpha"] * shift, rows[name], yerr=error, capsize=1.5, lw=1, ms=4,
                      elinewidth=0.7, label=_with_beyond(null, rows), **series(place))  # fmt: skip
    axis.plot(alphas, alphas, label="alpha", **REFERENCE)
    level_axis(axis, alphas)


def _with_beyond(null: str, rows: pd.DataFrame) -> str:
    """Return the name of a null, and which proportion of its discoveries could not be removed."""
    beyond = rows["n_beyond"].sum()
    every = beyond + rows["n_discoveries"].sum()
    return f"{plain(null)} ({beyond / every:.0%} beyond stock)" if every else plain(null)
