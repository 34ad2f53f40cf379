"""The figures and tables of the manuscript: caption, source, and what each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_routing.reporting import tables
from moe_routing.reporting import wording as w
from moe_routing.reporting.plots import CAPTIONS, FOLDER

if TYPE_CHECKING:
    import pandas as pd

    from moe_routing.reporting.study import Study

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


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        build: makes it.
        caption: what it shows and where its numbers stand.
        align: a letter (l, r, c) a column; None aligns numbers right.
        ready: whether a study has its inputs.
        needs: what is missing where it has not.
    """

    build: Callable[[Study], pd.DataFrame]
    caption: Callable[[Study], str]
    align: str | None = None
    ready: Callable[[Study], bool] = lambda _: True
    needs: str = ""


def _results_caption(study: Study) -> str:
    confidence = w.percent(study.config.statistics.confidence, 0)
    return (
        f"Every strategy on every data set, with {confidence} intervals. Bold: best of its column. "
        f"{tables.DAGGER}: a difference from `{study.baseline}` was shown after correction for "
        f"multiplicity. Mean experts are averaged over data sets. From `{CELLS}`."
    )


SHEETS: dict[str, Sheet] = {
    "tbl-results": Sheet(tables.results_table, _results_caption),
    "tbl-data": Sheet(
        tables.data_table,
        lambda _: "Evaluation sets. Tokens: all that the model read, contexts included.",
        "llrrll",
    ),
    "tbl-strategies": Sheet(
        tables.strategy_table, lambda _: "The strategies of this run, by family.", "llll"
    ),
    "tbl-environment": Sheet(
        tables.environment_table,
        lambda _: "What produced the numbers. From the provenance of the cells.",
        "ll",
    ),
    "tbl-nulls": Sheet(
        tables.null_table,
        lambda _: (
            "Nulls that were fitted, and what they look like over layers: the spread above "
            "the median over that below it (1 if symmetric), and the smallest p-value they can "
            "give. From `calibration/nulls/<null>.csv`."
        ),
        "llrr",
        lambda study: any((study.folder / "calibration" / "nulls").glob("*.csv")),
        "this run has no diagnostics of its nulls",
    ),
    "tbl-primary": Sheet(
        tables.contrast_table,
        lambda _: "The primary contrast. From `statistics/primary.csv`.",
        "ll",
        lambda study: not study.statistics["primary"].empty,
        "the primary contrast was not computed",
    ),
    "tbl-routing": Sheet(
        tables.routing_table,
        lambda _: (
            "How BH routed, averaged over data sets. A decision is a token in a layer. "
            "Nothing rejected: BH kept no expert, so that the floor gave one. At floor, at cap: "
            f"exactly the fewest or the most experts allowed. From `{CELLS}`."
        ),
        "llrrrrr",
        lambda study: "bh" in study.families,
        "this run has no Benjamini-Hochberg routing",
    ),
}
"""By cross-reference label."""
