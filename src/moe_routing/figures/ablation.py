"""Figures of the expert ablation: false discoveries, needed experts, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from moe_routing import wording
from moe_routing.analysis.outputs import ABLATION, ALL_LAYERS, EITHER, NO_NULL, REMOVED
from moe_routing.analysis.tables import groups_of, read_csv, truth_values
from moe_routing.analysis.together import ORDERS
from moe_routing.config.study import CALIBRATION
from moe_routing.figures.series import (
    COLOURS,
    REFERENCE,
    error_bars,
    layer_axis,
    legend_below,
    level_axis,
    line_style,
    ordered_line_style,
    save_all,
    unmarked,
)
from moe_routing.figures.style import WIDTH, use_style

TOLD: Mapping[str, tuple[str, str, str]] = {
    "fdr": ("kl", EITHER, "False discovery rate\nKL below epsilon"),
    "false": ("loss", REMOVED, "False discoveries\nloss not raised by {epsilon:g} nats"),
    "harmful": ("loss", REMOVED, "Harmful discoveries\nloss lowered by {epsilon:g} nats"),
}
"""What is drawn of a discovery, by column: its effect, the part, and the title."""
FEWEST = 30
"""Proportions of fewer discoveries are not drawn."""


def draw_ablation(folder: Path) -> None:
    """Draw the figures of ``ablation/`` into ``ablation/ablation_plots/``."""
    use_style()
    names = (Path(name).stem for name in ABLATION.files)
    tables = {name: read_csv(folder / f"{name}.csv") for name in names}
    figures = {
        "false_discoveries": false_discoveries(tables["ablation"], tables["states"]["alpha"][0]),
        "needed_experts": needed_experts(tables["needed_experts"]),
        "left_out": left_out(tables["left_out"], tables["joint_removals"], tables["headroom"]),
    }
    save_all(figures, folder, ABLATION)


def false_discoveries(ablation: pd.DataFrame, level: float) -> Figure:
    """Draw the proportions of false and harmful discoveries against alpha, and by layer.

    The same toggled experts are used for every null. The grey band is the proportion among all
    experts that the stock router chose.

    Args:
        ablation: ``ablation.csv``.
        level: alpha of the lower panels; the nearest one of the table is drawn.
    """
    ablation = ablation[truth_values(ablation["primary"])]
    tested = ablation[ablation["null"] != NO_NULL]
    alphas = sorted(tested["alpha"].unique())
    nearest = min(alphas, key=lambda alpha: abs(alpha - level))
    figure, grid = plt.subplots(
        2, len(TOLD), figsize=(WIDTH, 5.2), squeeze=False, layout="constrained"
    )
    looks = {null: line_style(index) for index, null in enumerate(tested["null"].unique())}
    for (above, below), (name, (effect, part, title)) in zip(grid.T, TOLD.items(), strict=True):
        here = ablation[(ablation["effect"] == effect) & (ablation["part"] == part)]
        enough = (tested["n_toggled"] >= FEWEST) | (name == "fdr")
        own = tested[(tested["effect"] == effect) & (tested["part"] == part) & enough]
        everywhere = here["layer"].astype(str) == ALL_LAYERS
        stock = here[everywhere & (here["null"] == NO_NULL)]
        if len(stock) and name != "fdr":
            low, high = stock[[f"{name}_low", f"{name}_high"]].iloc[0]
            above.axhspan(low, high, color="#BBBBBB", alpha=0.6, lw=0)
        if name == "fdr":
            above.plot(alphas, alphas, **REFERENCE)
            below.axhline(nearest, **REFERENCE)
        _against_alpha(above, own[own["layer"].astype(str) == ALL_LAYERS], name, looks)
        level_axis(above, alphas)
        _by_layer(below, own[own["alpha"] == nearest], name, looks)
        above.set(title=title.format(epsilon=here["epsilon"].iloc[0]), xlabel="Level alpha")
        below.set(title=f"By layer, alpha {nearest:g}")
        for axis in (above, below):
            axis.set_ylim(bottom=0, top=max(axis.get_ylim()[1], 0.1))
    grid[0, 0].set_ylabel("Proportion")
    grid[1, 0].set_ylabel("Proportion")
    legend_below(figure, grid[0, 0], columns=4)
    return figure


def _against_alpha(
    axis: Axes, rows: pd.DataFrame, name: str, looks: Mapping[str, dict[str, Any]]
) -> None:
    for index, (null, own) in enumerate(groups_of(rows, "null")):
        axis.errorbar(
            own["alpha"] * (1 + 0.05 * index), own[name],
            yerr=error_bars(own, name, f"{name}_low", f"{name}_high"),
            capsize=1.5, lw=1, ms=4, elinewidth=0.7, label=wording.as_words(null), **looks[null],
        )  # fmt: skip


def _by_layer(
    axis: Axes, rows: pd.DataFrame, name: str, looks: Mapping[str, dict[str, Any]]
) -> None:
    rows = rows[rows["layer"].astype(str) != ALL_LAYERS]
    rows = rows.assign(layer=rows["layer"].astype(int))
    for number, (null, own) in enumerate(groups_of(rows, "null")):
        if number == 0:
            axis.fill_between(
                own["layer"], own[f"{name}_low"], own[f"{name}_high"],
                color=looks[null]["color"], alpha=0.2, lw=0,
            )  # fmt: skip
        axis.plot(own["layer"], own[name], lw=1, ms=3, **looks[null])
    layer_axis(axis, rows["layer"].max() + 1)


def needed_experts(needed: pd.DataFrame) -> Figure:
    """Draw how many experts of the model's own choice a token needs, by layer and token class."""
    own = needed[needed["text"] == CALIBRATION]
    epsilons = sorted(own["epsilon"].unique())
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 3.6), layout="constrained", width_ratios=(1.3, 1)
    )
    everywhere = own["layer"].astype(str) == ALL_LAYERS
    every = own[own["group"] == own["group"].iloc[0]]
    layers = every[every["layer"].astype(str) != ALL_LAYERS]
    classes = own[everywhere & (own["group"] != own["group"].iloc[0])]
    pairs = classes[["group", "class"]].drop_duplicates().to_numpy()
    names = [name if group == "word_start" else f"{group}: {name}" for group, name in pairs]
    for index, epsilon in enumerate(epsilons):
        look = ordered_line_style(index, len(epsilons))
        rows = layers[layers["epsilon"] == epsilon]
        layer = rows["layer"].astype(int)
        left.fill_between(layer, rows["low"], rows["high"], color=look["color"], alpha=0.2, lw=0)
        left.plot(
            layer, rows["mean"], ms=4, label=f"epsilon {wording.scientific(epsilon)} nats", **look
        )
        rows = classes[classes["epsilon"] == epsilon]
        right.errorbar(
            rows["mean"], np.arange(len(rows)), xerr=error_bars(rows, "mean", "low", "high"),
            capsize=1.5, ms=4, elinewidth=0.8, **{**look, "ls": "none"},
        )  # fmt: skip
    layer_axis(left, layers["layer"].astype(int).max() + 1)
    left.set(ylabel="Needed experts per token", title="By layer", ylim=(0, None))
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="Needed experts per token, mean of layers", title="By class of token")
    right.set_xlim(left=0)
    legend_below(figure, left)
    return figure


def left_out(missed: pd.DataFrame, joint: pd.DataFrame, orders: pd.DataFrame) -> Figure:
    """Draw what the study's BH arm leaves out, and how much better an order of experts could be.

    Args:
        missed: ``left_out.csv``.
        joint: ``joint_removals.csv``.
        orders: ``headroom.csv``.
    """
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.5), layout="constrained")
    _missed(axes[0], missed[truth_values(missed["bounded"])])
    _joint(axes[1], joint[joint["text"] == CALIBRATION])
    _orders(axes[2], orders[orders["text"] == CALIBRATION])
    for axis in axes:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, handlelength=2.5)
    return figure


def _missed(axis: Axes, arm: pd.DataFrame) -> None:
    arm = arm[arm["epsilon"] == arm["epsilon"].iloc[0]]
    layers = arm[arm["layer"].astype(str) != ALL_LAYERS]
    for index, (part, label) in enumerate(
        {REMOVED: "of the model's own choice", EITHER: "of all experts"}.items()
    ):
        rows = layers[layers["part"] == part]
        look = line_style(index)
        layer = rows["layer"].astype(int)
        axis.fill_between(layer, rows["low"], rows["high"], color=look["color"], alpha=0.2, lw=0)
        axis.plot(layer, rows["left_out"], ms=4, label=label, **look)
    own, look = layers[layers["part"] == REMOVED], unmarked(line_style(2))
    axis.plot(
        own["layer"].astype(int), own["effect_left_out"], label="share of its KL left out", **look
    )
    layer_axis(axis, layers["layer"].astype(int).max() + 1)
    axis.set(title="Needed experts left out", ylabel="Proportion", ylim=(0, None))


def _joint(axis: Axes, joint: pd.DataFrame) -> None:
    layers = joint[joint["layer"].astype(str) != ALL_LAYERS]
    every = joint[joint["layer"].astype(str) == ALL_LAYERS].iloc[0]
    last = layers["layer"].astype(int).max() + 2
    for index, (name, label) in enumerate(
        {"kl": "removed together", "sum_kl": "sum of single removals"}.items()
    ):
        look = line_style(index)
        axis.plot(layers["layer"].astype(int), layers[name], ms=4, label=label, **look)
        axis.plot([last + 0.8 * index], [every[name]], ms=5, **{**look, "ls": "none"})
    axis.vlines(last, every["kl_low"], every["kl_high"], color=COLOURS[0], lw=1)
    axis.fill_between(
        layers["layer"].astype(int), layers["kl_low"], layers["kl_high"], color=COLOURS[0],
        alpha=0.2, lw=0,
    )  # fmt: skip
    step = max(1, (last - 1) // 4)
    ticks = list(range(0, last - 1, step))
    axis.set_xticks([*ticks, last], [*map(str, ticks), "all"])
    axis.set(title="All that is left out", xlabel="Layer", ylabel="KL, nats")
    _log_nats(axis)


def _orders(axis: Axes, orders: pd.DataFrame) -> None:
    for index, (order, label) in enumerate(ORDERS.items()):
        rows = orders[orders["order"] == order]
        axis.errorbar(
            rows["k"] + 0.05 * (index - 1.5), rows["kl"],
            yerr=error_bars(rows, "kl", "kl_low", "kl_high"), capsize=1.5, lw=1, ms=4,
            elinewidth=0.7, label=label, **line_style(index),
        )  # fmt: skip
    axis.set_xticks(sorted(orders["k"].unique()))
    axis.set(title="Order at equal k", xlabel="Experts kept per layer", ylabel="KL, nats")
    _log_nats(axis)


def _log_nats(axis: Axes) -> None:
    """Use a logarithmic axis of nats with ticks at 1, 2 and 5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
