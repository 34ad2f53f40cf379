"""Figures of the validity analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from moe_routing.analysis.outputs import ALL_LAYERS, VALIDITY
from moe_routing.analysis.tables import groups_of, read_csv
from moe_routing.figures.series import (
    REFERENCE,
    as_words,
    label_left,
    layer_axis,
    legend_below,
    level_axis,
    line_style,
    panels,
    save_all,
)
from moe_routing.figures.style import WIDTH, use_style


def draw_validity(folder: Path) -> None:
    """Draw the figures of ``validity/`` into ``validity/validity_plots/``."""
    use_style()
    size = read_csv(folder / "size.csv")
    binding = read_csv(folder / "binding.csv")
    verdict = read_csv(folder / "verdict.csv")
    figures = {
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


def size_by_layer(size: pd.DataFrame, verdict: pd.DataFrame) -> Figure:
    """Draw the largest size over designs, by null and layer, at the level of the verdict."""
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
    axis.set_yticks(range(len(worst)), [as_words(name) for name in worst.index])
    axis.set(xlabel="Layer")
    axis.set_title(
        f"Largest size over designs at alpha {level:g}; bold: above {allowed:g} ({_tokens(size)} "
        "tokens)"
    )
    figure.colorbar(image, label="Size P(R > 0)")
    return figure


def marginal_bound(binding: pd.DataFrame) -> Figure:
    """Draw how often BH selects anything on real text, and the bound for marginal nulls."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True, layout="constrained")
    titles = {"calibration": "Calibration text", "evaluation": "Evaluation text"}
    looks = _looks(binding["null"])
    for axis, (text, title) in zip(axes, titles.items(), strict=True):
        own = binding[binding["text"] == text]
        for null, rows in groups_of(own, "null"):
            by_alpha = rows.groupby("alpha")["any_proportion"]
            axis.plot(by_alpha.mean().index, by_alpha.mean(), label=as_words(null), ms=4, lw=1,
                      **looks[null])  # fmt: skip
        bound = own.groupby("alpha")["bound"].first()
        axis.plot(bound.index, bound, color="black", lw=1.6, label="bound for marginal nulls")
        axis.plot(bound.index, bound.index, label="alpha", **REFERENCE)
        axis.set_yscale("log")
        level_axis(axis, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
        tokens = own["n_tokens"].iloc[0] if len(own) else 0
        axis.set_title(f"{title} ({tokens:,} tokens)")
    axes[0].set_ylabel("Proportion of tokens with any\nselection (mean over layers)")
    figure.suptitle(
        "BH on real text. The bound is exact for empirical nulls, approximate for kernel nulls\n"
        "(levels below the resolution of a null's draws are left out)"
    )
    legend_below(figure, axes[1], columns=5)
    return figure


def binding_by_layer(binding: pd.DataFrame, level: float) -> Figure:
    """Draw the proportion of tokens for which floor or cap binds, by layer, on evaluation text."""
    own = binding[(binding["text"] == "evaluation") & np.isclose(binding["alpha"], level)]
    names = own["null"].unique()
    figure, axes = panels(names, columns=4, height=1.75, sharey=True)
    for null, axis in axes.items():
        rows = own[own["null"] == null].sort_values("layer")
        free = 1 - rows["floor_proportion"] - rows["cap_proportion"]
        layer, bottom = rows["layer"], rows["floor_proportion"]
        axis.bar(layer, bottom, color="#003f5c", label="floor (BH selects nothing)", width=0.9)
        axis.bar(layer, free, bottom=bottom, color="#cfcfcf", label="BH", width=0.9)
        axis.bar(layer, rows["cap_proportion"], bottom=bottom + free, color="#E69F00", hatch="////",
                 ec="white", lw=0, label="cap (max_k)", width=0.9)  # fmt: skip
        layer_axis(axis, len(rows))
        axis.set(title=as_words(null), ylim=(0, 1))
        axis.grid(visible=False)
    label_left(axes, "Proportion of tokens")
    legend_below(figure, axes[names[0]])
    row = own.iloc[0]
    figure.suptitle(
        f"What determines the number of experts at alpha {level:g}, from 1 to {row['max_k']} "
        f"({row['n_tokens']:,} tokens)"
    )
    return figure


def simulation(table: pd.DataFrame) -> Figure:
    """Draw false discovery rate and power against alpha, by correlation and signals."""
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
                for procedure, rows in groups_of(own, "procedure"):
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
        f"Simulated p-values: {row['repeats']:,} tokens per setting, effect {row['effect']:g} SD"
    )
    return figure


def _looks(names: pd.Series) -> dict[str, dict[str, Any]]:
    return {name: line_style(index) for index, name in enumerate(names.unique())}
