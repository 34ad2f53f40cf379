"""The figures of the manuscript: file, caption, alternative text, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass

from moe_routing.reporting.plots import CAPTIONS, FOLDER

CELLS = "comparison/full_routing_results.csv"


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        path: PNG under the results folder.
        caption: what it shows.
        alt: what a reader who cannot see it should know of its make-up.
        source: file that its numbers stand in.
        needs: what is missing where it was not drawn.
    """

    path: str
    caption: str
    alt: str
    source: str
    needs: str


def _comparison(name: str, alt: str, source: str, needs: str) -> Picture:
    return Picture(f"{FOLDER}/{name}.png", CAPTIONS[name], alt, source, needs)


GALLERY: dict[str, Picture] = {
    "fig-pareto": _comparison(
        "pareto",
        "One panel a data set: mean experts a token across, quality up, one marker and line a "
        "family of strategies, vertical bars for intervals, a grey step for the Pareto front.",
        CELLS,
        "the table of cells was not plotted",
    ),
    "fig-forest": _comparison(
        "forest",
        "One panel a data set, one row a strategy: the paired difference from the baseline with a "
        "horizontal interval; the side of losses beyond the margin is shaded.",
        "statistics/paired.csv",
        "there are no paired comparisons",
    ),
    "fig-layers": _comparison(
        "experts_by_layer",
        "One panel a family and data set: layer across, mean experts a token up, one line a "
        "strategy.",
        "cells/<strategy>/<dataset>.json",
        "no strategy of this run varies its number of experts",
    ),
    "fig-tokens": _comparison(
        "experts_per_token",
        "One panel a family and data set: number of experts across, cumulative share of decisions "
        "up, one step line a strategy.",
        "cells/<strategy>/<dataset>.json",
        "no strategy of this run varies its number of experts",
    ),
    "fig-max-k": _comparison(
        "quality_by_max_k",
        "One panel a data set: most experts a token across, quality up, one line for BH and one "
        "for static top-k, with the mean experts BH used written beside its points.",
        CELLS,
        "this run has no BH settings that differ in max_k alone",
    ),
    "fig-ranks": _comparison(
        "critical_difference",
        "Strategies down, average rank across, with a band around the baseline as wide as the "
        "critical difference.",
        "statistics/friedman.csv",
        "ranks need at least two data sets and three strategies",
    ),
    "fig-speed": _comparison(
        "speed",
        "One panel a data set: mean experts a token across, tokens a second up, one marker and "
        "line a family.",
        CELLS,
        "the table of cells was not plotted",
    ),
}
"""By cross-reference label."""
