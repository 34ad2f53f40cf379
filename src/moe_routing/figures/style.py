"""The style of every figure: colour-blind safe, and readable in grey.

Each family of strategies has its own colour, marker and dash pattern in every figure, so no figure
depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from moe_routing.files import atomic_path
from moe_routing.routing.strategies import family_entry
from moe_routing.vocabulary import Look

WIDTH = 7.2
"""Width of a full-width figure, inches."""


def look(family: str) -> Look:
    """Return the look of a family.

    Raises:
        InputError: there is no such family here.
    """
    return family_entry(family).look


def use_style() -> None:
    """Set fonts, sizes and lines for all figures drawn afterwards.

    What the user's matplotlibrc sets, such as LaTeX for all text, does not count.
    """
    mpl.rcdefaults()
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind")
    mpl.rcParams.update(
        {
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 9,
            "axes.labelsize": 9,
            "axes.titlesize": 9.5,
            "figure.titlesize": 9.5,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "grid.linewidth": 0.5,
            "grid.color": "#DDDDDD",
            "axes.edgecolor": "#666666",
            "lines.linewidth": 1.3,
            "lines.markersize": 5,
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "savefig.bbox": "tight",
            "svg.hashsalt": "moe-routing-study",  # the same figure is the same file
            "svg.fonttype": "path",
        }
    )


def laid_out(figure: Figure) -> Bbox:
    """Lay out a figure once and for all, and return the box that it fills, in inches.

    For each file, matplotlib would lay it out again and draw it twice to learn this box.
    """
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(None)  # "none" would draw once more for each file
    return figure.get_tightbbox().padded(mpl.rcParams["savefig.pad_inches"])


def save(figure: Figure, path: Path | str, suffixes: Sequence[str] = ("png", "svg")) -> None:
    """Write ``path``.png and ``path``.svg without dates, and close the figure."""
    box = laid_out(figure)
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}
    for suffix in suffixes:
        with atomic_path(Path(path).with_name(f"{Path(path).name}.{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, metadata=metadata[suffix], bbox_inches=box)
    plt.close(figure)
