"""What several figures share: line styles, panels, legends, axes, captions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from moe_routing.analysis.outputs import Analysis
from moe_routing.figures.style import WIDTH, save
from moe_routing.vocabulary import DATASETS

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F3C8D",
    "#8C8C00", "#666666",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)))
REFERENCE: dict[str, Any] = {"color": "#444444", "ls": (0, (1, 1.5)), "lw": 1.0, "zorder": 1}
"""Look of a reference line, such as a theory or a diagonal."""

_SPARE = "spare"
"""Label of an empty panel."""


def line_style(index: int) -> dict[str, Any]:
    """Return colour, marker and dash of the line at an index."""
    again = index // len(COLOURS)  # the same colour has another marker and dash
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + again) % len(MARKERS)],
        "ls": DASHES[(index + again) % len(DASHES)],
    }


def ordered_line_style(index: int, total: int) -> dict[str, Any]:
    """Return the style of a line in an ordered series: dark to light."""
    shade = index / max(1, total - 1)
    return {**line_style(index), "color": mpl.colormaps["cividis"](0.85 * shade)}


def unmarked(style: Mapping[str, Any]) -> dict[str, Any]:
    """Return the style of a line without its marker."""
    return {**style, "marker": ""}


def error_bars(rows: pd.DataFrame, value: str, low: str, high: str) -> np.ndarray:
    """Return the distances of interval limits from a value, shape 2 x rows, for ``yerr``."""
    return np.abs(rows[[low, high]].to_numpy().T - rows[value].to_numpy())


def text_caption(table: pd.DataFrame) -> str:
    """Return the text that was read: data set, window, tokens and passages."""
    row = table.iloc[0]
    return (
        f"{DATASETS[row['dataset']].label}, window {row['window']:,.0f}: {row['n_tokens']:,.0f} "
        f"tokens of {row['n_documents']:.0f} passages"
    )


def panels(
    names: Sequence[str], *, columns: int, height: float, sharey: bool = False
) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with one panel per name, in rows of ``columns``."""
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    width = WIDTH if columns > 1 else 0.66 * WIDTH
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height * rows), squeeze=False, sharey=sharey,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
        axis.set_label(_SPARE)
    return figure, dict(zip(names, axes.flat, strict=False))


def paired_panels(
    names: Sequence[str], *, height: float, columns: int = 4
) -> tuple[Figure, dict[str, tuple[Axes, Axes]]]:
    """Return a figure with two panels per name, one above the other, ``columns`` names in a row.

    All upper panels share their y-axis, and so do all lower ones.

    Args:
        names: one per pair.
        height: of a row of panels, inches.
        columns: most pairs side by side.
    """
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(
        2 * rows, columns, figsize=(WIDTH, height * 2 * rows), squeeze=False, layout="constrained"
    )
    pairs: list[tuple[Axes, Axes]] = [
        pair for row in range(rows) for pair in zip(grid[2 * row], grid[2 * row + 1], strict=True)
    ]
    for number, pair in enumerate(pairs):
        for axis, first in zip(pair, pairs[0], strict=True):
            if number >= len(names):
                axis.set_axis_off()
            elif number:
                axis.sharey(first)
                axis.tick_params(labelleft=place(axis).is_first_col())
    return figure, dict(zip(names, pairs, strict=False))


def place(axis: Axes) -> SubplotSpec:
    """Return the place of a panel in the grid of its figure."""
    return cast("SubplotSpec", axis.get_subplotspec())


def label_left(axes: Mapping[str, Axes], label: str) -> None:
    """Label the y-axes of the panels in the first column."""
    for axis in axes.values():
        if place(axis).is_first_col():
            axis.set_ylabel(label)


def legend_below(figure: Figure | SubFigure, axis: Axes, columns: int = 4) -> None:
    """Put the legend of one panel under the figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False
    )


def legend_in_spare_panel(figure: Figure, entries: Mapping[str, Artist], columns: int) -> None:
    """Put a legend of handles by label into an empty panel, or under the figure without one."""
    spare = [axis for axis in figure.axes if axis.get_label() == _SPARE]
    if spare:
        spare[0].legend(entries.values(), entries.keys(), loc="center", frameon=False)
        return
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", frameon=False,
        ncols=min(columns, len(entries)),
    )  # fmt: skip


def wrapped(label: str) -> str:
    r"""Return a label of an axis in lines that fit a panel.

    >>> wrapped("Bits per byte of the right continuation")
    'Bits per byte of the\nright continuation'
    """
    return textwrap.fill(label, 24)


def layer_axis(axis: Axes, layers: int) -> None:
    """Label an axis of layers with whole numbers."""
    axis.set(xlabel="Layer", xlim=(-0.5, layers - 0.5))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def level_axis(axis: Axes, levels: Sequence[float]) -> None:
    """Use a logarithmic axis with a tick at every level."""
    # The limits are set by hand: matplotlib cannot scale an axis to a single level.
    axis.set_autoscalex_on(False)
    drawn = [end for end in axis.dataLim.intervalx if end > 0 and math.isfinite(end)]
    axis.set_xlim(min([*levels, *drawn]) / 1.25, max([*levels, *drawn]) * 1.25)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(levels))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    axis.set_xlabel("Level alpha")


def experts_axis(axis: Axes, low: float, high: float) -> None:
    """Cover numbers of experts, on a logarithmic axis of base 2 if they span a factor of 3."""
    if high <= 3 * low:
        room = 0.08 * (high - low) or 0.5
        axis.set_xlim(low - room, high + room)
        return
    axis.set_xscale("log", base=2)
    axis.set_xticks(2.0 ** np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1))
    room = (high / low) ** 0.1
    axis.set_xlim(low / room, high * room)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())


def save_all(figures: Mapping[str, Figure], folder: Path, analysis: Analysis) -> None:
    """Write the planned figures of an analysis, given by name, under its folder."""
    for plot in analysis.plots:
        save(figures[plot], folder / f"{analysis.name}_plots" / plot)
