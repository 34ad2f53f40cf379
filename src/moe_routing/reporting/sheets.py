"""The tables of the manuscript: caption, source, and what each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_routing.reporting import tables
from moe_routing.reporting import wording as w
from moe_routing.reporting.findings import CELLS

if TYPE_CHECKING:
    import pandas as pd

    from moe_routing.reporting.study import Study


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
