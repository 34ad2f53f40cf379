"""One look for every figure: colour-blind safe, and readable in grey.

A family of strategies has one colour, one marker and one dash pattern everywhere, so that no
figure depends on colour alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.2
"""Width of a full-width figure, inches."""


@dataclass(frozen=True)
class Look:
    """How a family of strategies is drawn.

    Attributes:
        colour: hexadecimal; no two families have the same lightness.
        marker: matplotlib marker.
        dash: matplotlib line style.
    """

    colour: str
    marker: str | tuple[int, int, int]
    dash: str | tuple[int, tuple[int, ...]] = "-"


LOOKS: dict[str, Look] = {
    # The families of the comparison: Okabe & Ito's palette.
    "regular": Look("#000000", "o", "-"),
    "normalized": Look("#0072B2", "s", "--"),
    "uniform": Look("#56B4E9", "^", ":"),
    "adaptive": Look("#009E73", "D", "-."),
    "bh": Look("#D55E00", "P", (0, (5, 1))),
    # Rivals without p-values.
    "topp": Look("#DB9100", "X"),
    "dynskip": Look("#BF3AC2", "*"),
    "minp": Look("#B01A1A", "v"),
    "entropy": Look("#1C591B", "<"),
    "perlayer": Look("#49A3A3", "h"),
    # Other procedures on p-values.
    "threshold": Look("#786112", ">"),
    "hc": Look("#FF9EBB", "d"),
    "by": Look("#5C18A1", "p"),
    "ebh": Look("#DBC500", "8"),
    "storey": Look("#63EB23", (4, 1, 0)),
    # Controls.
    "shuffle": Look("#172C4D", (6, 1, 0)),
    "layermean": Look("#473320", "H"),
    "randomid": Look("#400A24", (3, 1, 0)),
}
_UNKNOWN = Look("#8A8A8A", "$?$")


def look(family: str) -> Look:
    """Return the look of a family; one that is not listed is a grey question mark."""
    return LOOKS.get(family, _UNKNOWN)


def use_style() -> None:
    """Set fonts, sizes and lines for every figure drawn from here on."""
    import matplotlib as mpl
    import seaborn as sns

    sns.set_theme(context="paper", style="whitegrid", palette="colorblind")
    mpl.rcParams.update(
        {
            "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine has it
            "font.size": 9,
            "axes.labelsize": 9,
            "axes.titlesize": 9.5,
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
            "svg.hashsalt": "moe-routing-study",  # equal figures are equal files
            "svg.fonttype": "path",
        }
    )


def save(figure: Figure, path: Path | str) -> None:
    """Write ``path``.png and ``path``.svg without dates, and close the figure."""
    import matplotlib.pyplot as plt

    metadata = {"png": {"Software": None}, "svg": {"Date": None}}
    for suffix, about in metadata.items():
        with atomic_path(Path(path).with_name(f"{Path(path).name}.{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, metadata=about)
    plt.close(figure)
