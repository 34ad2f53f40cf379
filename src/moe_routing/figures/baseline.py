"""Figures of the baseline analysis: the stock router by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_routing.analysis.outputs import BASELINE
from moe_routing.analysis.tables import groups_of, read_csv
from moe_routing.figures.series import (
    REFERENCE,
    layer_axis,
    legend_below,
    line_style,
    save_all,
    text_caption,
)
from moe_routing.figures.style import WIDTH, use_style


def draw_baseline(folder: Path) -> None:
    """Draw the figures of ``baseline/`` into ``baseline/baseline_plots/``."""
    use_style()
    stats = read_csv(folder / "baseline_routing_stats.csv")
    prompts = read_csv(folder / "baseline_prompts.csv")
    histogram = read_csv(folder / "logit_histogram.csv")
    figures = {
        "router_logit_distributions": logit_distributions(histogram, stats, prompts),
        "expert_usage": expert_usage(
            read_csv(folder / "expert_usage.csv"), stats, read_csv(folder / "prompt_usage.csv")
        ),
        "entropy_by_layer": entropy_by_layer(stats, prompts),
        "weight_concentration": weight_concentration(stats, prompts),
    }
    save_all(figures, folder, BASELINE)


def logit_distributions(
    histogram: pd.DataFrame, stats: pd.DataFrame, prompts: pd.DataFrame
) -> Figure:
    """Draw the density of router logits, one ridge per layer, the first layer on top.

    Markers show means: black for the text, in colour below it for each prompt.
    """
    layers = stats["layer"].tolist()
    figure, axis = plt.subplots(
        figsize=(0.75 * WIDTH, 1.9 + 0.24 * len(layers)), layout="constrained"
    )
    scale = 1.8 / histogram["density"].max()
    for key, rows in histogram.groupby("layer"):
        layer = cast("int", key)
        middle = (rows["low"] + rows["high"]) / 2
        top = -layer + scale * rows["density"]
        shade = mpl.colormaps["cividis"](layer / max(1, len(layers) - 1))
        axis.fill_between(middle, -layer, top, color=shade, alpha=0.8, lw=0, zorder=layer + 2)
        axis.plot(middle, top, color="white", lw=0.8, zorder=layer + 2)
    above: dict[str, Any] = {"mec": "white", "ls": "none", "zorder": len(layers) + 3}
    axis.plot(stats["logit_mean"], -stats["layer"], "o", color="black", ms=4.5, mew=0.7,
              label="mean, evaluation text", **above)  # fmt: skip
    for index, label, rows in _by_prompt(prompts):
        look = line_style(index) | above
        axis.plot(rows["logit_mean"], -rows["layer"] - 0.3, ms=4, mew=0.5, label=label, **look)
    axis.set_yticks([-layer for layer in layers], [str(layer) for layer in layers])
    axis.grid(visible=False, axis="y")
    axis.set(xlabel="Router logit", ylabel="Layer (height of a ridge: density)")
    axis.set_title(f"Router logits by layer\n({text_caption(stats)})")
    legend_below(figure, axis, columns=2)
    return figure


def expert_usage(usage: pd.DataFrame, stats: pd.DataFrame, prompts: pd.DataFrame) -> Figure:
    """Draw how often each expert is selected, relative to uniform use: on text, and on prompts.

    The prompts are pooled. They have few tokens, so uneven use is partly due to chance there.
    """
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 5.6), sharex=True, layout="constrained")
    per_token = usage.loc[usage["layer"] == 0, "tokens"].sum() / stats["n_tokens"].iloc[0]
    tokens = prompts.loc[prompts["layer"] == 0, "tokens"].sum() / per_token
    titles = [
        f"Selections of each expert, stock router\n({text_caption(stats)})",
        f"The same on {prompts['prompt'].nunique()} prompts, {tokens:.0f} tokens in total",
    ]
    for axis, table, title in zip(axes, (usage, prompts), titles, strict=True):
        load_LE = table.pivot_table(index="layer", columns="expert", values="tokens", aggfunc="sum")
        relative_LE = load_LE.to_numpy() / load_LE.to_numpy().mean(1, keepdims=True)
        image = axis.imshow(relative_LE, aspect="auto", cmap="cividis", vmin=0)
        figure.colorbar(image, ax=axis, label="Load relative to uniform use")
        axis.grid(visible=False)
        axis.set(ylabel="Layer", yticks=range(0, len(load_LE), 3), title=title)
    axes[-1].set_xlabel("Expert")
    return figure


def entropy_by_layer(stats: pd.DataFrame, prompts: pd.DataFrame) -> Figure:
    """Draw the mean entropy of the router's softmax by layer, on text and on prompts."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.1), layout="constrained")
    _band(axis, stats, "entropy", 0, "evaluation text")
    for index, label, rows in _by_prompt(prompts):
        axis.plot(rows["layer"], rows["entropy"], lw=0.7, ms=3.5, alpha=0.9, label=label,
                  **line_style(index))  # fmt: skip
    uniform = (stats["entropy"] / stats["relative_entropy"]).iloc[0]
    axis.axhline(uniform, label="uniform router", **REFERENCE)
    layer_axis(axis, len(stats))
    axis.set(
        ylabel="Entropy (nats)", title=f"Entropy of the router's softmax\n({text_caption(stats)})"
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def weight_concentration(stats: pd.DataFrame, prompts: pd.DataFrame) -> Figure:
    """Draw the largest weight and the mass of the selected experts by layer, with intervals."""
    mass = next(name for name in stats.columns if name.startswith("top") and name.endswith("_mass"))
    k = mass.removeprefix("top").removesuffix("_mass")
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.9), layout="constrained")
    titles = {"avg_max_weight": "Largest weight", mass: f"Mass of the top {k}"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        _band(axis, stats, name, 0, "evaluation text")
        by_layer = prompts.groupby("layer")[name]
        axis.fill_between(
            by_layer.min().index, by_layer.min(), by_layer.max(), color="#BBBBBB", alpha=0.5,
            lw=0, label="range of the prompts", zorder=0,
        )  # fmt: skip
        layer_axis(axis, len(stats))
        axis.set(title=title, ylabel="Softmax probability", ylim=(0, None))
    axes[0].legend(frameon=False, loc="upper left")
    figure.suptitle(f"Concentration of the router's weights\n({text_caption(stats)})")
    return figure


def _band(axis: Axes, stats: pd.DataFrame, name: str, index: int, label: str) -> None:
    look = line_style(index)
    low, high = stats[f"{name}_low"], stats[f"{name}_high"]
    if np.isfinite(low).all():
        axis.fill_between(stats["layer"], low, high, color=look["color"], alpha=0.25, lw=0)
    axis.plot(stats["layer"], stats[name], label=label, **look)


def _by_prompt(prompts: pd.DataFrame) -> Iterator[tuple[int, str, pd.DataFrame]]:
    """Yield index, label and rows of each prompt."""
    for index, (prompt, rows) in enumerate(groups_of(prompts, "prompt"), start=1):
        label = f"\N{LEFT DOUBLE QUOTATION MARK}{_short(prompt)}\N{RIGHT DOUBLE QUOTATION MARK}"
        yield index, f"{label} ({rows['n_tokens'].iloc[0]} tokens)", rows


def _short(text: str) -> str:
    parts = text.replace("$", r"\$").split()  # a dollar sign would begin a formula
    return " ".join(parts[:4]) + (" ..." if len(parts) > 4 else "")
