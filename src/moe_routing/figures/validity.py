"""Figures of the validity analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from moe_routing import wording
from moe_routing.analysis.outputs import (
    ALL_LAYERS,
    BH_RULE,
    BLOCK_EXACT,
    BY_RULE,
    ROUTED,
    RULE,
    VALIDITY,
)
from moe_routing.analysis.tables import groups_of, read_csv, truth_values
from moe_routing.config.study import CALIBRATION
from moe_routing.figures.series import (
    COLOURS,
    MARKERS,
    REFERENCE,
    error_bars,
    label_left,
    layer_axis,
    legend_below,
    level_axis,
    line_style,
    panels,
    save_all,
)
from moe_routing.figures.style import WIDTH, use_style
from moe_routing.routing.strategies import family_entry
from moe_routing.vocabulary import DATASETS

PANELS = (0.01, 0.05, 0.1)
"""Levels that have a panel of their own."""
PART_LABELS = {RULE: "rule", ROUTED: "floor and cap included"}
PROCEDURE_LABELS = {BH_RULE: "BH", BY_RULE: "BY", BLOCK_EXACT: "BH, block-exact p"}
FILLED: dict[str, Any] = {"color": COLOURS[0], "marker": "o"}
HOLLOW: dict[str, Any] = {"color": COLOURS[1], "marker": "s", "mfc": "white"}


def text_label(text: str) -> str:
    """Return the name of a text of held-out interventions."""
    return "Calibration text" if text == CALIBRATION else DATASETS[text].label


def draw_validity(folder: Path) -> None:
    """Draw the figures of ``validity/`` into ``validity/validity_plots/``."""
    use_style()
    binding = read_csv(folder / "binding.csv")
    designs = read_csv(folder / "verdict_by_design.csv")
    rates = read_csv(folder / "false_discoveries.csv")
    layers, experts = read_csv(folder / "dead_layers.csv"), read_csv(folder / "dead_experts.csv")
    figures = {
        "false_discoveries": false_discoveries(rates, read_csv(folder / "resampled.csv")),
        "false_discoveries_by_level": rates_by_level(rates),
        "dead_experts": dead_experts(layers, experts),
        "size_by_design": size_by_design(designs),
        "marginal_bound": marginal_bound(binding),
        "binding_by_layer": binding_by_layer(binding, designs["level"].iloc[0]),
        "simulation": simulation(read_csv(folder / "simulation.csv")),
    }
    save_all(figures, folder, VALIDITY)


def _by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of single layers, whose numbers are integers."""
    rows = table[table["layer"].astype(str) != ALL_LAYERS]
    return rows.assign(layer=rows["layer"].astype(int)).sort_values("layer", kind="stable")


def _shown_levels(*tables: pd.DataFrame) -> list[float]:
    """Return the levels with a panel that all tables have, or else the largest that they have."""
    common = set.intersection(*(set(table["alpha"]) for table in tables))
    return [alpha for alpha in PANELS if alpha in common] or [max(common)]


def _grid(rows: int, levels: list[float], height: float) -> tuple[Figure, np.ndarray]:
    return plt.subplots(
        rows, len(levels), figsize=(WIDTH, height * rows), squeeze=False, sharex=True,
        sharey="col", layout="constrained",
    )  # fmt: skip


def _intervals(
    axis: Axes, rows: pd.DataFrame, value: str, limits: tuple[str, str], shift: float,
    look: Mapping[str, Any],
) -> None:  # fmt: skip
    """Draw values by layer with bars for their limits, beside the layer's number."""
    axis.errorbar(rows["layer"] + shift, rows[value], yerr=error_bars(rows, value, *limits),
                  **{"ls": "none", "lw": 1, "ms": 3.5, **look})  # fmt: skip


def _cut(axes: Iterable[Axes], values: pd.Series, alpha: float) -> None:
    """Cut panels above their values, since the bars of rare events may reach to 1."""
    for axis in axes:
        axis.set_ylim(0, max(3 * alpha, 1.3 * values.max()))


def false_discoveries(rates: pd.DataFrame, resampled: pd.DataFrame) -> Figure:
    """Draw the rate of BH by layer, text and level: of the rule, and of what is routed."""
    own = _by_layer(rates[rates["procedure"] == BH_RULE])
    levels, texts = _shown_levels(own), list(own["text"].drop_duplicates())
    figure, grid = _grid(len(texts), levels, 1.75)
    for (down, text), (across, alpha) in product(enumerate(texts), enumerate(levels)):
        axis = grid[down, across]
        here = own[(own["text"] == text) & np.isclose(own["alpha"], alpha)]
        if text == CALIBRATION:
            spread = _by_layer(resampled[np.isclose(resampled["alpha"], alpha)])
            ends = spread.groupby("layer")["fdr"].agg(["min", "max"])
            axis.bar(ends.index, ends["max"] - ends["min"], bottom=ends["min"], width=0.9,
                     color="#d9d9d9", lw=0, label="resampled calibrations, rule")  # fmt: skip
        for part, shift, look in ((RULE, -0.15, FILLED), (ROUTED, 0.2, HOLLOW)):
            _intervals(axis, here[here["part"] == part], "fdr", ("low", "high"), shift,
                       {**look, "label": PART_LABELS[part]})  # fmt: skip
        axis.axhline(alpha, label="alpha", **REFERENCE)
        layer_axis(axis, int(own["layer"].max()) + 1)
        axis.set(xlabel="Layer" if down == len(texts) - 1 else "")
        axis.set_title(f"{text_label(text)}, alpha {alpha:g}")
        axis.set_ylabel("False discovery rate" if across == 0 else "")
    for across, alpha in enumerate(levels):
        _cut(grid[:, across], own.loc[np.isclose(own["alpha"], alpha), "fdr"], alpha)
    legend_below(figure, grid[0, 0])
    return figure


def rates_by_level(rates: pd.DataFrame) -> Figure:
    """Draw the rate over all layers against alpha, by text and procedure."""
    own = rates[rates["layer"].astype(str) == ALL_LAYERS]
    texts = list(own["text"].drop_duplicates())
    figure, axes = plt.subplots(1, len(texts), figsize=(WIDTH, 2.9), squeeze=False, sharey=True,
                                layout="constrained")  # fmt: skip
    for axis, text in zip(axes[0], texts, strict=True):
        here = own[own["text"] == text]
        levels = sorted(here["alpha"].unique())
        for number, (procedure, rows) in enumerate(groups_of(here, "procedure")):
            look = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 4.5, "lw": 1.2}
            for part, extra in ((RULE, {}), (ROUTED, {"mfc": "white", "ls": ":"})):
                line = rows[(rows["part"] == part) & (rows["fdr"] > 0)]
                axis.errorbar(line["alpha"], line["fdr"],
                              yerr=error_bars(line, "fdr", "low", "high"),
                              label=f"{PROCEDURE_LABELS[procedure]}, {PART_LABELS[part]}",
                              **{**look, **extra})  # fmt: skip
        axis.plot(levels, levels, label="alpha", **REFERENCE)
        axis.set_yscale("log")
        level_axis(axis, levels)
        axis.set_title(text_label(text))
    axes[0, 0].set_ylabel("False discovery rate,\nmean over layers")
    legend_below(figure, axes[0, 0], columns=4)
    return figure


def dead_experts(layers: pd.DataFrame, experts: pd.DataFrame) -> Figure:
    """Draw what is selected where experts are dead: all of a layer, or some of each."""
    above = _by_layer(layers[layers["procedure"] == BH_RULE])
    below = _by_layer(experts[(experts["procedure"] == BH_RULE) & (experts["part"] == RULE)])
    levels = _shown_levels(above, below)
    figure, grid = _grid(2, levels, 2.1)
    for across, alpha in enumerate(levels):
        axis, here = grid[0, across], above[np.isclose(above["alpha"], alpha)]
        for number, (score, rows) in enumerate(groups_of(here, "score")):
            look = {"color": COLOURS[2 + number], "marker": MARKERS[2 + number]}
            look["label"] = f"any selection, {wording.as_words(score)}"
            _intervals(axis, rows, "any_proportion", ("low", "high"), 0.35 * number - 0.15, look)
        axis.set_title(f"All of a layer dead, alpha {alpha:g}")
        lower, rows = grid[1, across], below[np.isclose(below["alpha"], alpha)]
        _intervals(lower, rows, "fdr", ("low", "high"), -0.15, {**FILLED, "label": "not needed"})
        _intervals(lower, rows, "dead_slots", ("dead_slots_low", "dead_slots_high"), 0.2,
                   {**HOLLOW, "label": "dead"})  # fmt: skip
        lower.axhline(rows["dead"].iloc[0], color="#777777", ls="--", lw=1,
                      label="dead among all experts")  # fmt: skip
        lower.set_title(f"Some dead, alpha {alpha:g}")
        for panel in (axis, lower):
            panel.axhline(alpha, label="alpha", **REFERENCE)
            layer_axis(panel, int(above["layer"].max()) + 1)
        axis.set_xlabel("")
        _cut((axis, lower), pd.concat([here["any_proportion"], rows["fdr"], rows["dead"]]), alpha)
    grid[0, 0].set_ylabel("Proportion of tokens\nwith any selection")
    grid[1, 0].set_ylabel("Proportion of slots\nkept by BH")
    entries: dict[str, Any] = {}
    for axis in grid[:, 0]:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    return figure


def size_by_design(designs: pd.DataFrame) -> Figure:
    """Draw the size of each null in the layer where it is largest, by design."""
    level, allowed = designs["level"].iloc[0], designs["largest_size"].iloc[0]
    noise = set(designs.loc[truth_values(designs["if_noise"]), "design"])
    found = list(designs["design"].drop_duplicates())
    names = sorted(found, key=lambda name: (name in noise, found.index(name)))
    table = designs.pivot_table(
        index="null", columns="design", values="worst_layer_size", sort=False
    ).reindex(columns=names)
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.3 * len(table)), layout="constrained")
    image = axis.imshow(table.clip(lower=1e-3), aspect="auto", cmap="cividis",
                        norm=LogNorm(0.01, 1))  # fmt: skip
    for (down, across), value in np.ndenumerate(table.to_numpy()):
        if np.isnan(value):
            continue
        axis.text(across, down, f"{100 * value:.1f}", ha="center", va="center", fontsize=8,
                  color="white" if value < 0.15 else "black",
                  weight="bold" if value > allowed else "normal")  # fmt: skip
    axis.axvline(len(names) - len(noise) - 0.5, color="black", lw=2)
    axis.grid(visible=False)
    axis.set_xticks(
        range(len(names)), [wording.as_words(name) for name in names], rotation=35, ha="right"
    )
    axis.set_yticks(range(len(table)), [wording.as_words(name) for name in table.index])
    axis.set_title(
        f"Size of BH at alpha {level:g} in the worst layer, in percent; bold: above "
        f"{wording.percent(allowed, 0)}.\nRight of the line: if all of the real logits were noise "
        "(no part in the verdict)"
    )
    bar = figure.colorbar(image, label="Tokens with any selection (%)")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
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
            look = {"label": wording.as_words(null), "ms": 4, "lw": 1, **looks[null]}
            axis.plot(by_alpha.mean().index, by_alpha.mean(), **look)
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
        axis.set(title=wording.as_words(null), ylim=(0, 1))
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
    """Draw false discovery rate and power against alpha, by dependence and signals."""
    dependences = list(table["dependence"].drop_duplicates())
    signals = [count for count in sorted(table["signals"].unique()) if count > 0]
    signals = signals or sorted(table["signals"].unique())
    figure, grid = plt.subplots(
        2 * len(signals), len(dependences), figsize=(WIDTH, 3.6 * len(signals)), squeeze=False,
        sharex=True, sharey="row", layout="constrained",
    )  # fmt: skip
    looks = _looks(table["procedure"])
    labels = {"fdr": "False discovery rate", "power": "Power"}
    for across, dependence in enumerate(dependences):
        for down, count in enumerate(signals):
            own = table[(table["dependence"] == dependence) & (table["signals"] == count)]
            for axis, (name, label) in zip(
                grid[2 * down : 2 * down + 2, across], labels.items(), strict=True
            ):
                for procedure, rows in groups_of(own, "procedure"):
                    error = 1.96 * rows["fdr_se"] if name == "fdr" else None
                    axis.errorbar(rows["alpha"], rows[name], yerr=error, ms=4, lw=1, capsize=1.5,
                                  label=family_entry(procedure).label,
                                  **looks[procedure])  # fmt: skip
                alphas = sorted(own["alpha"].unique())
                if name == "fdr":
                    axis.plot(alphas, alphas, label="alpha", **REFERENCE)
                    axis.set_title(f"{count} signals, {dependence}")
                level_axis(axis, alphas)
                axis.set_ylabel(label if across == 0 else "")
                axis.set_xlabel("" if axis is not grid[-1, across] else "Level alpha")
    legend_below(figure, grid[0, 0])
    row = table.iloc[0]
    figure.suptitle(
        f"Simulated p-values: {row['repeats']:,} tokens per setting, effect {row['effect']:g} SD"
    )
    return figure


def _looks(names: pd.Series) -> dict[str, dict[str, Any]]:
    return {name: line_style(index) for index, name in enumerate(names.unique())}
