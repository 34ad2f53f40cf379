"""The figure of the consequence law."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from moe_routing import wording
from moe_routing.analysis.outputs import ALL_LAYERS, CONSEQUENCE
from moe_routing.analysis.tables import read_csv
from moe_routing.figures.series import (
    COLOURS,
    REFERENCE,
    layer_axis,
    legend_below,
    line_style,
    save_all,
)
from moe_routing.figures.style import WIDTH, use_style
from moe_routing.files import read_parquet
from moe_routing.statistics.rules import OMITTED

PREDICTORS = {
    "weight": "router weight",
    "weight_norm": "weight \N{MULTIPLICATION SIGN} norm of the output",
    "predicted": "weight \N{MULTIPLICATION SIGN} predicted norm",
}
EFFECTS = {"kl": "with KL", "loss": "with the change of the loss"}
POINTS = 2500
"""Most points of a panel; of more, every nth is drawn."""


def draw_consequence(folder: Path) -> None:
    """Draw the figure of ``consequence/`` into ``consequence/consequence_plots/``."""
    use_style()
    figure = consequence_law(
        read_parquet(folder / "removals.parquet"),
        read_csv(folder / "consequence_law.csv"),
        read_csv(folder / "rank_correlations.csv"),
    )
    save_all({"consequence_law": figure}, folder, CONSEQUENCE)


def consequence_law(
    removals: pd.DataFrame, law: pd.DataFrame, correlations: pd.DataFrame
) -> Figure:
    """Draw KL against weight times norm for three layers, and rank correlations by layer.

    Removed experts are omitted; nothing stands in for them. Every line of the law has slope 2 and
    the constant of its layer.

    Args:
        removals: one row per removal.
        law: ``consequence_law.csv``.
        correlations: ``rank_correlations.csv``.
    """
    removals, law, correlations = (
        table[table["dropped"] == OMITTED] for table in (removals, law, correlations)
    )
    shown = _some_layers(law["layer"])
    figure = plt.figure(figsize=(WIDTH, 5.0), layout="constrained")
    above, below = cast(
        "tuple[SubFigure, SubFigure]", figure.subfigures(2, 1, height_ratios=(1.0, 1.05))
    )
    axes = above.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    for axis, layer in zip(axes, shown, strict=True):
        own = removals[removals["layer"] == layer]
        _cloud(axis, own, law[law["layer"] == layer].iloc[0])
    axes[0].set_ylabel("KL from stock, nats")
    _correlations(below, correlations)
    return figure


def _some_layers(layers: pd.Series) -> list[int]:
    """Return the first layer, a middle one and the last."""
    every = sorted(layers.unique())
    return sorted({every[0], every[len(every) // 2], every[-1]})


def _cloud(axis: Axes, removals: pd.DataFrame, law: pd.Series) -> None:
    drawn = removals[(removals["kl"] > 0) & (removals["weight_norm"] > 0)]
    drawn = drawn.iloc[:: max(1, -(-len(drawn) // POINTS))]
    axis.plot(
        drawn["weight_norm"], drawn["kl"], ".", color=COLOURS[0], ms=3, alpha=0.4, mew=0,
        rasterized=True,
    )  # fmt: skip
    ends = np.array([drawn["weight_norm"].min(), drawn["weight_norm"].max()])
    axis.plot(ends, law["constant"] * ends**2, color="black", lw=1.2)
    constant = wording.scientific(law["constant"])
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="Weight \N{MULTIPLICATION SIGN} norm of the output",
        title=f"Layer {law['layer']}\n$c$ = {constant}, $R^2$ = {law['law_r2']:.2f}",
    )


def _correlations(figure: SubFigure, correlations: pd.DataFrame) -> None:
    layers = correlations[correlations["layer"].astype(str) != ALL_LAYERS]
    layers = layers.assign(layer=layers["layer"].astype(int))
    axes = figure.subplots(1, len(EFFECTS), squeeze=False, sharey=True)[0]
    for axis, (effect, title) in zip(axes, EFFECTS.items(), strict=True):
        own = layers[layers["effect"] == effect]
        for index, (predictor, label) in enumerate(PREDICTORS.items()):
            rows = own[own["predictor"] == predictor].sort_values("layer")
            axis.plot(rows["layer"], rows["spearman"], ms=4, label=label, **line_style(index))
        axis.axhline(0, **REFERENCE)
        layer_axis(axis, layers["layer"].max() + 1)
        axis.set(title=f"Rank correlation {title}", ylim=(min(-0.25, own["spearman"].min()), 1.02))
    axes[0].set_ylabel("Spearman's correlation")
    legend_below(figure, axes[0], columns=3)
