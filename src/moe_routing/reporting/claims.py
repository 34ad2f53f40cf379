"""A finding is made from claims: which metric, set and pair, and in which direction.

Text that compares two strategies is made from claims, so that a test can hold every sentence
against the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from moe_routing.analysis.tables import rows_of
from moe_routing.statistics.verdict import LOSSES, Verdict

Direction = Literal["better", "worse", "open", "same"]
"""Of the first strategy of a pair: better or worse; open: no difference could be shown; same: every
item has the same result."""

DIRECTIONS: Mapping[Verdict, Direction] = {
    Verdict.BETTER: "better",
    **dict.fromkeys(LOSSES, "worse"),
    Verdict.NON_INFERIOR: "open",
    Verdict.INCONCLUSIVE: "open",
    Verdict.IDENTICAL: "same",
}


@dataclass(frozen=True)
class Claim:
    """What a table says about one pair of strategies.

    Attributes:
        source: the table, relative to the results folder.
        strategy: the first of the pair.
        dataset: evaluation set.
        metric: what is compared.
        direction: of the first against the second.
        key: further columns that name the row, such as the scale, with their values.
    """

    source: str
    strategy: str
    dataset: str
    metric: str
    direction: Direction
    key: tuple[tuple[str, str], ...] = ()


def claims(rows: pd.DataFrame, source: str, *key: str) -> tuple[Claim, ...]:
    """Return the claim of each row of a table of comparisons.

    Args:
        rows: columns strategy, dataset, metric and verdict.
        source: the table.
        key: further columns that name a row.
    """
    return tuple(
        Claim(
            source, row.strategy, row.dataset, row.metric, DIRECTIONS[Verdict(row.verdict)],
            tuple((name, str(getattr(row, name))) for name in key),
        )
        for row in rows_of(rows)
    )  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A statement and the file of its numbers.

    Attributes:
        text: one or more sentences of Markdown.
        source: file of its numbers, relative to the results folder.
        verdict: the outcome that chose the sentence.
        claims: the comparisons that it states.
    """

    text: str
    source: str
    verdict: str = ""
    claims: tuple[Claim, ...] = ()

    def __str__(self) -> str:
        return self.text


def distinct(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without strategies that are the same routing as an earlier one."""
    return rows[rows["same_as"].isna()] if "same_as" in rows else rows


def directions(found: Iterable[Claim]) -> set[Direction]:
    """Return the directions of claims."""
    return {claim.direction for claim in found}
