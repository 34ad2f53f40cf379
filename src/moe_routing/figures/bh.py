"""Figures of the BH analysis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_routing import wording
from moe_routing.analysis.outputs import BH
from moe_routing.analysis.tables import groups_of, read_csv
from moe_routing.figures.series import (
    MARKERS,
    REFERENCE,
    error_bars,
    experts_axis,
    label_left,
    layer_axis,
    legend_below,
    level_axis,
    ordered_line_style,
    paired_panels,
    panels,
    place,
    save_all,
    text_caption,
    unmarked,
)
from moe_routing.figures.style import WIDTH, look, use_style

FEW = 4
"""Nulls up to which panels are two in a row; more are smaller."""
_LOSS = "Loss minus baseline\n(nats per token, lower is better)"


def draw_bh(folder: Path) -> None:
    """Draw the seven figures of ``bh/`` into ``bh/bh_plots/``."""
    use_style()
    table = read_csv(folder / "bh_routing_results.csv")
    counts = read_csv(folder / "bh_counts.csv")
    static = read_csv(folder / "bh_static_curve.csv")
    figures = {
        "counts_distribution": counts_distribution(counts, table),
        "alpha_sensitivity": alpha_sensitivity(table),
        "quality_vs_experts": quality_vs_experts(table, static),
        "bh_vs_topk_by_max_k": bh_vs_topk(table),
        "heatmap_alpha_max_k": heatmap(table),
        "saturation_curve": saturation_curve(read_csv(folder / "bh_saturation.csv"), table),
        "reduction_percent": reduction(table),
    }
    save_all(figures, folder, BH)


def counts_distribution(counts: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Draw the number of experts per token at the largest max_k: distribution, and by layer.

    Above: proportion of decisions with at least c experts. Below: mean experts by layer, with a
    band from the 5 % to the 95 % quantile over tokens at the middle alpha.
    """
    widest = _widest(counts)
    figure, pairs = paired_panels(widest["null"].unique(), height=2.7)
    for null, (above, below) in pairs.items():
        own = widest[widest["null"] == null]
        _at_least(above, own)
        _by_layer(below, own)
        above.set_title(wording.as_words(null))
        if place(above).is_first_col():
            above.set_ylabel("Proportion of decisions\nwith at least c experts")
            below.set_ylabel("Experts per token")
    below.set_ylim(0, None)  # after all have been drawn: it ends the scaling of these panels
    legend_below(figure, below)
    figure.suptitle(
        f"Experts per token and layer by null, max_k {widest['max_k'].iloc[0]}\n"
        f"({text_caption(table)})"
    )
    return figure


def _at_least(axis: Axes, widest: pd.DataFrame) -> None:
    for style, _, rows in _by_alpha(widest):
        proportion = rows.groupby("experts")["proportion"].sum() / rows["layer"].nunique()
        at_least = proportion[::-1].cumsum()[::-1]
        axis.step(at_least.index, at_least, where="pre", **unmarked(style))
    experts_axis(axis, 1, int(widest["max_k"].iloc[0]))
    axis.set_yscale("log")
    axis.set_xlabel("Number of experts c")


def _by_layer(axis: Axes, widest: pd.DataFrame) -> None:
    alphas = sorted(widest["alpha"].unique())
    for style, alpha, rows in _by_alpha(widest):
        by_layer = rows.groupby("layer")
        mean = by_layer.apply(lambda group: (group["experts"] * group["proportion"]).sum())
        axis.plot(mean.index, mean, label=f"alpha {alpha:g}", **style)
        if alpha == alphas[len(alphas) // 2]:
            low, high = np.array([_central(group) for _, group in by_layer]).T
            axis.fill_between(mean.index, low, high, color=style["color"], alpha=0.15, lw=0,
                              label=f"5 to 95 % of tokens, alpha {alpha:g}")  # fmt: skip
    layer_axis(axis, widest["layer"].nunique())


def alpha_sensitivity(table: pd.DataFrame) -> Figure:
    """Draw mean experts, and loss relative to the baseline, against alpha; a line per max_k."""
    bh = table[table["kind"] == "bh"]
    figure, pairs = paired_panels(bh["null"].unique(), height=2.3)
    labels = {"mean_experts": "Experts per token", "nats_vs_baseline": _LOSS}
    for null, pair in pairs.items():
        own = bh[bh["null"] == null]
        for axis, (name, label) in zip(pair, labels.items(), strict=True):
            caps = sorted(own["max_k"].unique())
            for index, max_k in enumerate(caps):
                rows = own[own["max_k"] == max_k].sort_values("alpha")
                shift = 1 + 0.04 * (index - (len(caps) - 1) / 2)
                _errorbar(axis, rows, rows["alpha"] * shift, name, f"max_k {max_k}",
                          ordered_line_style(index, len(caps)))  # fmt: skip
            level_axis(axis, sorted(own["alpha"].unique()))
            axis.set_ylabel(label if place(axis).is_first_col() else "")
        pair[0].set(title=wording.as_words(null), xlabel="")
    legend_below(figure, pair[0])
    figure.suptitle(
        "Sensitivity to alpha by null; bars: intervals, shifted sideways for "
        f"legibility\n({text_caption(table)})"
    )
    return figure


def quality_vs_experts(table: pd.DataFrame, static: pd.DataFrame) -> Figure:
    """Draw the loss against mean experts: BH, and static top-k as a curve.

    The loss is the paired difference from the baseline, so its interval does not contain the
    variance between documents. The axis on the right gives the perplexity.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 3.7), layout="constrained")
    rows = static.dropna(subset="k")
    stock = look("regular")
    _errorbar(axis, rows, rows["mean_experts"], "nats_vs_baseline", "static top-k",
              {"color": stock.colour, "marker": stock.marker, "ls": stock.dash})  # fmt: skip
    bh = table[table["kind"] == "bh"]
    for index, (null, own) in enumerate(groups_of(bh, "null")):
        shape: dict[str, Any] = {"marker": MARKERS[1:][index % len(MARKERS[1:])], "ls": "none"}
        for style, _, rows in _by_alpha(own):
            _errorbar(axis, rows, rows["mean_experts"], "nats_vs_baseline", "",
                      {"color": style["color"], **shape})  # fmt: skip
        axis.plot([], [], color="#444444", label=wording.as_words(null), **shape)
    for style, alpha, _ in _by_alpha(bh):
        axis.plot([], [], color=style["color"], lw=5, label=f"alpha {alpha:g}")
    experts = pd.concat([bh["mean_experts"], static["mean_experts"]])
    experts_axis(axis, experts.min(), experts.max())
    axis.axhline(0, **REFERENCE)
    axis.set(xlabel="Mean experts per token", ylabel=_LOSS)
    row = table.iloc[0]
    stock = row["token_perplexity"] / np.exp(row["nats_vs_baseline"])
    right = axis.secondary_yaxis(
        "right",
        functions=(
            lambda nats: stock * np.exp(nats),
            lambda value: np.log(np.maximum(value, 1e-9) / stock),
        ),
    )
    right.set_ylabel("Token perplexity")
    axis.set_title(f"Loss against mean experts, every max_k\n({text_caption(table)})")
    legend_below(figure, axis)
    return figure


def bh_vs_topk(table: pd.DataFrame) -> Figure:
    """Draw mean experts of top-k and of BH at each max_k, as bars."""
    return _bars(
        table, "mean_experts", "Mean experts per token", "Mean experts of BH and of top-k", True
    )


def reduction(table: pd.DataFrame) -> Figure:
    """Draw the reduction of experts against top-k at the same max_k, in percent."""
    title = "Reduction of experts against top-k at k = max_k"
    return _bars(table, "reduction_pct", "Reduction (%)", title, False)


def heatmap(table: pd.DataFrame) -> Figure:
    """Draw mean experts and perplexity over alpha and max_k, a row of panels per null."""
    bh = table[table["kind"] == "bh"]
    names = bh["null"].unique()
    figure, grid = plt.subplots(
        len(names), 2, squeeze=False, sharex=True, layout="constrained",
        figsize=(WIDTH, 1.4 + len(names) * (0.3 + 0.25 * bh["alpha"].nunique())),
    )  # fmt: skip
    labels = {"mean_experts": ("Mean experts", 2), "token_perplexity": ("Token perplexity", 1)}
    for across, (value, (label, decimals)) in enumerate(labels.items()):
        limits = {"vmin": bh[value].min(), "vmax": bh[value].max()}
        for down, null in enumerate(names):
            cells = bh[bh["null"] == null].pivot_table(index="alpha", columns="max_k", values=value)
            axis = grid[down, across]
            _cells(axis, cells, decimals, **limits)
            last = down == len(names) - 1
            axis.set(xlabel="max_k" if last else "", ylabel="" if across else "alpha")
            axis.set_title(f"Null {wording.as_words(null)}: {label.lower()}", fontsize=9)
        figure.colorbar(grid[0, across].collections[0], ax=grid[:, across], label=label,
                        location="bottom", aspect=30, fraction=0.03, pad=0.02,
                        ticks=MaxNLocator(5))  # fmt: skip
    figure.suptitle(f"BH over alpha and max_k\n({text_caption(table)})")
    return figure


def _cells(axis: Axes, cells: pd.DataFrame, decimals: int, vmin: float, vmax: float) -> None:
    """Draw a table as colours with the value in each cell.

    seaborn's heatmap does that, too, but draws the whole figure for each panel.
    """
    axis.pcolormesh(cells, cmap="cividis", vmin=vmin, vmax=vmax)
    for (row, column), value in np.ndenumerate(cells.to_numpy()):
        dark = (value - vmin) < 0.5 * (vmax - vmin)
        text = f"{value:.{decimals}f}"
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=8,
                  color="white" if dark else "black")  # fmt: skip
    axis.set_xticks(np.arange(cells.shape[1]) + 0.5, [f"{name:g}" for name in cells.columns])
    axis.set_yticks(np.arange(cells.shape[0]) + 0.5, [f"{name:g}" for name in cells.index])
    axis.invert_yaxis()
    axis.grid(visible=False)


def saturation_curve(saturation: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Draw mean experts against max_k, and the max_k at which they saturate."""
    names = saturation["null"].unique()
    figure, axes = panels(names, columns=_columns(names), height=_height(names))
    for null, axis in axes.items():
        points = []
        for style, alpha, rows in _by_alpha(saturation[saturation["null"] == null]):
            point = rows["saturation_point"].iloc[0]
            axis.plot(rows["max_k"], rows["mean_experts"], **unmarked(style))
            axis.plot(rows["max_k"], rows["measured"], style["marker"], color=style["color"], ms=4)
            axis.plot([], [], label=f"alpha {alpha:g}", **{**style, "ms": 4})
            height = rows.loc[rows["max_k"] == point, "mean_experts"].item()
            axis.vlines(point, 0, height, color=style["color"], lw=0.8, ls=":")
            points.append(str(point))
        experts_axis(axis, 1, int(rows["max_k"].max()))
        title = f"Null {wording.as_words(null)}:\n95 % at max_k {', '.join(points)}"
        axis.set(title=title, xlabel="max_k", ylim=(0, None))
    label_left(axes, "Mean experts per token")
    legend_below(figure, axes[names[0]])
    figure.suptitle(
        f"Saturation: 95 % of the mean without cap. Lines: one run, truncated; markers: runs\n"
        f"({text_caption(table)})"
    )
    return figure


def _bars(table: pd.DataFrame, value: str, label: str, title: str, with_topk: bool) -> Figure:
    names = table["null"].unique()
    figure, axes = panels(names, columns=_columns(names), height=_height(names), sharey=True)
    for null, axis in axes.items():
        own = table[table["null"] == null]
        caps = sorted(own["max_k"].unique())
        series = [(f"BH, alpha {alpha:g}", own[own["alpha"] == alpha], style)
                  for style, alpha, _ in _by_alpha(own[own["kind"] == "bh"])]  # fmt: skip
        if with_topk:
            topk = own[own["kind"] == "topk"]
            series.insert(0, ("top-k", topk, {"color": "#BBBBBB"}))
        width = 0.84 / len(series)
        for index, (name, rows, style) in enumerate(series):
            heights = rows.set_index("max_k").loc[caps, value]
            x = np.arange(len(caps)) + (index - (len(series) - 1) / 2) * width
            bars = axis.bar(x, heights, width, label=name, color=style["color"], ec="white", lw=0.4)
            axis.bar_label(bars, fmt="%.3g", fontsize=6.5, rotation=90, padding=2)
        axis.set_xticks(range(len(caps)), [str(cap) for cap in caps])
        axis.grid(visible=False, axis="x")
        axis.margins(y=0.3)
        axis.set(title=f"Null {wording.as_words(null)}", xlabel="max_k")
    label_left(axes, label)
    legend_below(figure, axes[names[0]])
    figure.suptitle(f"{title}\n({text_caption(table)})")
    return figure


def _columns(names: Sequence[str]) -> int:
    return 2 if len(names) <= FEW else 3


def _height(names: Sequence[str]) -> float:
    return 2.9 if len(names) <= FEW else 2.3


def _errorbar(
    axis: Axes, rows: pd.DataFrame, x: pd.Series, name: str, label: str, style: dict[str, Any]
) -> None:
    error = error_bars(rows, name, f"{name}_low", f"{name}_high")
    axis.errorbar(x, rows[name], yerr=error, elinewidth=0.7, capsize=1.5, label=label, **style)


def _widest(counts: pd.DataFrame) -> pd.DataFrame:
    return counts[counts["max_k"] == counts["max_k"].max()]


def _by_alpha(rows: pd.DataFrame) -> list[tuple[dict[str, Any], float, pd.DataFrame]]:
    alphas = sorted(rows["alpha"].unique())
    return [
        (ordered_line_style(index, len(alphas)), alpha, rows[rows["alpha"] == alpha])
        for index, alpha in enumerate(alphas)
    ]


def _central(group: pd.DataFrame) -> tuple[int, int]:
    """Return the 5 % and 95 % quantiles of the experts of one layer."""
    ordered = group.sort_values("experts")
    below = ordered["proportion"].cumsum() / ordered["proportion"].sum()
    low, high = np.searchsorted(below, [0.05, 0.95])
    return ordered["experts"].iloc[low], ordered["experts"].iloc[min(high, len(ordered) - 1)]
