"""Grids of panels, and lines that differ in more than colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.analysis.outputs import Analysis
from moe_routing.figures.style import WIDTH, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F3C8D",
    "#8C8C00", "#666666",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)))
REFERENCE = {"color": "#444444", "ls": (0, (1, 1.5)), "lw": 1.0, "zorder": 1}
"""Look of a line to compare with, such as a theory or a diagonal."""


def series(place: int) -> dict[str, object]:
    """Return colour, marker and dash of the line at a place."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "ls": DASHES[place % len(DASHES)],
    }


def ordered_series(place: int, total: int) -> dict[str, object]:
    """Return the look of a line whose place in an order matters: dark to light."""
    import matplotlib as mpl

    shade = place / max(1, total - 1)
    look = series(place)
    return {**look, "color": mpl.colormaps["cividis"](0.85 * shade)}


def panels(
    names: Sequence[object], *, columns: int, height: float, sharey: bool = False
) -> tuple[Figure, dict[object, Axes]]:
    """Return a figure with one panel per name, in rows of ``columns``."""
    import matplotlib.pyplot as plt

    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    width = WIDTH if columns > 1 else 0.66 * WIDTH
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height * rows), squeeze=False, sharey=sharey,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    return figure, dict(zip(names, axes.flat, strict=False))


def legend_below(figure: Figure, axis: Axes, columns: int = 4, title: str | None = None) -> None:
    """Put the legend of one panel under the figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)),
        frameon=False, title=title,
    )  # fmt: skip


def plain(name: str) -> str:
    """Return an id as words.

    >>> plain("within_token")
    'within token'
    """
    return str(name).replace("_", " ")


def layer_axis(axis: Axes, layers: int) -> None:
    """Label an axis of layers with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set(xlabel="Layer", xlim=(-0.5, layers - 0.5))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def level_axis(axis: Axes, levels: Sequence[float], label: str = "Level alpha") -> None:
    """Use a logarithmic axis with a tick at every level."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    # By hand, since matplotlib cannot scale an axis to a single level.
    axis.set_autoscalex_on(False)
    drawn = [end for end in axis.dataLim.intervalx if end > 0 and math.isfinite(end)]
    axis.set_xlim(min([*levels, *drawn]) / 1.25, max([*levels, *drawn]) * 1.25)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(levels))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    axis.set_xlabel(label)


def experts_axis(axis: Axes, most: int) -> None:
    """Use a logarithmic axis of base 2 for numbers of experts."""
    axis.set_xscale("log", base=2)
    ticks = [2**power for power in range(most.bit_length()) if 2**power <= most]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.minorticks_off()


def save_all(figures: Mapping[str, Figure], folder: Path, analysis: Analysis) -> None:
    """Write the planned figures of an analysis, given by name, under its folder."""
    for plot in analysis.plots:
        save(figures[plot], folder / f"{analysis.name}_plots" / plot)
