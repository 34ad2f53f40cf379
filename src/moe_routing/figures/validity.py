"""Figures of the validity page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_routing.analysis.outputs import ALL_LAYERS, NOT_VALID, VALIDITY
from moe_routing.analysis.tables import read_csv
from moe_routing.figures.series import (
    REFERENCE,
    layer_axis,
    legend_below,
    level_axis,
    panels,
    plain,
    save_all,
    series,
)
from moe_routing.figures.style import WIDTH, use_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEFT_OUT = "levels too small for the draws of a null are left out"
COLUMNS = 4


def draw_validity(folder: Path) -> None:
    """Draw the figures of ``validity/`` into ``validity/validity_plots/``."""
    use_style()
    size = read_csv(folder / "size.csv")
    binding = read_csv(folder / "binding.csv")
    verdict = read_csv(folder / "verdict.csv")
    figures = {
        "pvalue_histograms": pvalue_histograms(read_csv(folder / "pvalue_histogram.csv"), size),
        "pvalue_qq": pvalue_qq(read_csv(folder / "pvalue_qq.csv"), size),
        "size_by_alpha": size_by_alpha(size, verdict),
        "size_by_layer": size_by_layer(size, verdict),
        "marginal_bound": marginal_bound(binding),
        "binding_by_layer": binding_by_layer(binding, verdict["level"].iloc[0]),
        "simulation": simulation(read_csv(folder / "simulation.csv")),
    }
    save_all(figures, folder, VALIDITY)


def _tokens(size: pd.DataFrame) -> str:
    """Return the number of tokens per layer, or its range."""
    tokens = size.loc[size["layer"].astype(str) != ALL_LAYERS, "n_tokens"]
    low, high = tokens.min(), tokens.max()
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def pvalue_histograms(histogram: pd.DataFrame, size: pd.DataFrame) -> Figure:
    """Draw the density of p-values in every design in which H0 holds, a panel per null.

    Lines are means over layers, bands go from the least to the largest of them.
    """
    names = histogram["null"].unique()
    looks = _looks(histogram["design"])
    figure, axes = panels(names, columns=COLUMNS, height=1.75)
    for null, axis in axes.items():
        own = histogram[histogram["null"] == null]
        bins = own.groupby("low")["low"].first().size
        for design, rows in own.groupby("design", sort=False):
            by_bin = rows.groupby("low")["proportion"].agg(["mean", "min", "max"]) * bins
            edges, look = [*by_bin.index, 1.0], looks[design]
            axis.stairs(by_bin["max"], edges, baseline=by_bin["min"], fill=True, alpha=0.15, lw=0,
                        color=look["color"])  # fmt: skip
            axis.stairs(by_bin["mean"], edges, baseline=None, color=look["color"], ls=look["ls"],
                        lw=1.1, label=plain(design))  # fmt: skip
        axis.axhline(1.0, **REFERENCE)
        axis.set(title=plain(null), ylim=(0, None), xlim=(0, 1), xlabel="p-value")
    _left_labels(figure, axes, names, "Density")
    _all_designs_legend(figure, looks, "line")
    figure.suptitle(
        "p-values where H0 holds, mean over layers; band: range of layers; dotted: uniform\n"
        f"({_tokens(size)} tokens per layer)",
        fontsize=9.5,
    )
    return figure


def pvalue_qq(qq: pd.DataFrame, size: pd.DataFrame) -> Figure:
    """Draw the proportion of p-values below a level against the level; bands: range of layers."""
    names = qq["null"].unique()
    looks = _looks(qq["design"])
    figure, axes = panels(names, columns=COLUMNS, height=1.85, sharey=True)
    for null, axis in axes.items():
        own = qq[qq["null"] == null]
        for design, rows in own.groupby("design", sort=False):
            by_level = rows.groupby("level")["proportion"]
            look = looks[design]
            axis.fill_between(by_level.min().index, by_level.min().clip(1e-6), by_level.max(),
                              color=look["color"], alpha=0.15, lw=0)  # fmt: skip
            mean = by_level.mean()
            axis.plot(mean.index, mean.clip(1e-6), color=look["color"], ls=look["ls"], lw=1.1)
        axis.plot([1e-4, 1], [1e-4, 1], **REFERENCE)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(title=plain(null), xlabel="Level", ylim=(2e-5, 1.5))
    _left_labels(figure, axes, names, "Proportion of p-values")
    _all_designs_legend(figure, looks, "line")
    figure.suptitle(
        "Proportion of p-values at or below a level where H0 holds; band: range of layers; dotted: "
        f"uniform\n({_tokens(size)} tokens per layer)",
        fontsize=9.5,
    )
    return figure


def size_by_alpha(size: pd.DataFrame, verdict: pd.DataFrame) -> Figure:
    """Draw the proportion of tokens with any selection against alpha, over all layers.

    A null's line begins at the smallest level that its draws can reach.
    """
    overall = size[size["layer"].astype(str) == ALL_LAYERS]
    names = overall["null"].unique()
    looks = _looks(overall["design"])
    figure, axes = panels(names, columns=COLUMNS, height=2.05, sharey=True)
    for null, axis in axes.items():
        own = overall[overall["null"] == null]
        for design, rows in own.groupby("design", sort=False):
            axis.plot(rows["alpha"], rows["size"].clip(1e-4), ms=3, lw=1, **looks[design])
        levels = np.array(sorted(own["alpha"].unique()))
        axis.plot(levels, levels, **REFERENCE)
        axis.set_yscale("log")
        level_axis(axis, [0.01, 0.05, 0.2])
        word = _word(verdict[verdict["null"] == null].iloc[0])
        axis.set_title(f"{plain(null)}\n{word}")
    _left_labels(figure, axes, names, "Size P(R > 0)")
    _all_designs_legend(figure, looks, "both")
    figure.suptitle(
        f"Size of BH where H0 holds, all layers ({_tokens(size)} tokens per layer); dotted: alpha\n"
        f"({LEFT_OUT})",
        fontsize=9.5,
    )
    return figure


def _word(verdict: pd.Series) -> str:
    failing = verdict["layers_above"]
    if verdict["call"] == NOT_VALID and failing:
        return f"fails in {failing} {'layer' if failing == 1 else 'layers'}"
    return verdict["call"]


def size_by_layer(size: pd.DataFrame, verdict: pd.DataFrame) -> Figure:
    """Draw the largest size over designs, by null and layer, at the level of the verdict."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    level, allowed = verdict["level"].iloc[0], verdict["largest_size"].iloc[0]
    rows = size[(size["layer"].astype(str) != ALL_LAYERS) & np.isclose(size["alpha"], level)]
    rows = rows.assign(layer=rows["layer"].astype(int))
    worst = rows.pivot_table(
        index="null", columns="layer", values="size", aggfunc="max", sort=False
    ).sort_index(axis=1)
    figure, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.3 * len(worst)), layout="constrained")
    image = axis.imshow(
        worst.clip(lower=1e-3), aspect="auto", cmap="cividis", norm=LogNorm(0.01, 1)
    )
    for (down, across), value in np.ndenumerate(worst.to_numpy()):
        weight = "bold" if value > allowed else "normal"
        colour = "white" if value < 0.15 else "black"
        axis.text(across, down, f"{value:.2f}".lstrip("0"), ha="center", va="center",
                  fontsize=6.5, color=colour, weight=weight)  # fmt: skip
    axis.grid(visible=False)
    axis.set_xticks(range(worst.shape[1]), worst.columns)
    axis.set_yticks(range(len(worst)), [plain(name) for name in worst.index])
    axis.set(xlabel="Layer")
    axis.set_title(
        f"Largest size over designs at alpha {level:g}; bold: above {allowed:g} ({_tokens(size)} "
        "tokens)"
    )
    figure.colorbar(image, label="Size P(R > 0)")
    return figure


def marginal_bound(binding: pd.DataFrame) -> Figure:
    """Draw how often BH finds anything on real text, and the bound of marginal nulls."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True, layout="constrained")
    titles = {
        "calibration": "On the text they were fitted on",
        "evaluation": "On evaluation text",
    }
    looks = _looks(binding["null"])
    for axis, (text, title) in zip(axes, titles.items(), strict=True):
        own = binding[binding["text"] == text]
        for null, rows in own.groupby("null", sort=False):
            by_alpha = rows.groupby("alpha")["any_proportion"]
            axis.plot(by_alpha.mean().index, by_alpha.mean(), label=plain(null), ms=4, lw=1,
                      **looks[null])  # fmt: skip
        bound = own.groupby("alpha")["bound"].first()
        axis.plot(bound.index, bound, color="black", lw=1.6, label="bound of marginal nulls")
        axis.plot(bound.index, bound.index, label="alpha", **REFERENCE)
        axis.set_yscale("log")
        level_axis(axis, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
        tokens = own["n_tokens"].iloc[0] if len(own) else 0
        axis.set_title(f"{title} ({tokens:,} tokens)")
    axes[0].set_ylabel("Tokens with any selection,\nmean over layers")
    figure.suptitle(
        f"The bound is exact for empirical laws, approximate for kernel ones\n({LEFT_OUT})",
        fontsize=9.5,
    )
    legend_below(figure, axes[1], columns=5)
    return figure


def binding_by_layer(binding: pd.DataFrame, level: float) -> Figure:
    """Draw the proportion of tokens that floor or cap decide, by layer, on evaluation text."""
    own = binding[(binding["text"] == "evaluation") & np.isclose(binding["alpha"], level)]
    names = own["null"].unique()
    figure, axes = panels(names, columns=COLUMNS, height=1.75, sharey=True)
    for null, axis in axes.items():
        rows = own[own["null"] == null].sort_values("layer")
        free = 1 - rows["floor_proportion"] - rows["cap_proportion"]
        layer, bottom = rows["layer"], rows["floor_proportion"]
        axis.bar(layer, bottom, color="#003f5c", label="floor (empty set)", width=0.9)
        axis.bar(layer, free, bottom=bottom, color="#cfcfcf", label="BH decides", width=0.9)
        axis.bar(layer, rows["cap_proportion"], bottom=bottom + free, color="#E69F00", hatch="////",
                 ec="white", lw=0, label="cap", width=0.9)  # fmt: skip
        layer_axis(axis, len(rows))
        axis.set(title=plain(null), ylim=(0, 1))
        axis.grid(visible=False)
    _left_labels(figure, axes, names, "Proportion of tokens")
    legend_below(figure, axes[names[0]])
    row = own.iloc[0]
    figure.suptitle(
        f"Who decides at alpha {level:g}, at least 1 and at most {row['max_k']} experts "
        f"({row['n_tokens']:,} tokens)",
        fontsize=9.5,
    )
    return figure


def simulation(table: pd.DataFrame) -> Figure:
    """Draw false discovery rate and power against alpha, by correlation and signals."""
    import matplotlib.pyplot as plt

    correlations = sorted(table["correlation"].unique())
    signals = [count for count in sorted(table["signals"].unique()) if count > 0]
    signals = signals or sorted(table["signals"].unique())
    figure, grid = plt.subplots(
        2 * len(signals), len(correlations), figsize=(WIDTH, 3.6 * len(signals)), squeeze=False,
        sharex=True, sharey="row", layout="constrained",
    )  # fmt: skip
    looks = _looks(table["procedure"])
    labels = {"fdr": "False discovery rate", "power": "Power"}
    for across, correlation in enumerate(correlations):
        for down, count in enumerate(signals):
            own = table[(table["correlation"] == correlation) & (table["signals"] == count)]
            for axis, (name, label) in zip(
                grid[2 * down : 2 * down + 2, across], labels.items(), strict=True
            ):
                for procedure, rows in own.groupby("procedure", sort=False):
                    error = 1.96 * rows["fdr_se"] if name == "fdr" else None
                    axis.errorbar(rows["alpha"], rows[name], yerr=error, ms=4, lw=1, capsize=1.5,
                                  label=procedure, **looks[procedure])  # fmt: skip
                alphas = sorted(own["alpha"].unique())
                if name == "fdr":
                    axis.plot(alphas, alphas, label="alpha", **REFERENCE)
                    axis.set_title(f"{count} signals, correlation {correlation:g}")
                level_axis(axis, alphas)
                axis.set_ylabel(label if across == 0 else "")
                axis.set_xlabel("" if axis is not grid[-1, across] else "Level alpha")
    legend_below(figure, grid[0, 0], columns=7)
    row = table.iloc[0]
    figure.suptitle(
        f"Known truth: {row['repeats']:,} simulated tokens per setting, effect "
        f"{row['effect']:g} sd",
        fontsize=9.5,
    )
    return figure


def _looks(names: pd.Series) -> dict[str, dict[str, object]]:
    return {name: series(place) for place, name in enumerate(names.unique())}


def _left_labels(figure: Figure, axes: dict, names: np.ndarray, label: str) -> None:
    for place, name in enumerate(names):
        if place % COLUMNS == 0:
            axes[name].set_ylabel(label)


def _all_designs_legend(figure: Figure, looks: dict[str, dict], kind: str) -> None:
    """One legend for all panels, since not every panel has every design."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=plain(name), color=look["color"], ls=look["ls"],
               marker=look["marker"] if kind == "both" else None)
        for name, look in looks.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
