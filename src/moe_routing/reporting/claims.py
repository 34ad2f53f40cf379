"""A finding is made from claims: which metric, set and pair, and in which direction.

Text that compares two strategies is made from claims. Before a text is shown, each of its claims is
held against the numbers of its table, so that a sentence never says what they do not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from moe_routing.analysis.tables import rows_of
from moe_routing.errors import InputError
from moe_routing.reporting.pages import BUDGETS_FILE, LEVERS_FILE
from moe_routing.statistics.verdict import LOSSES, Verdict
from moe_routing.vocabulary import METRICS

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


Row = Mapping[Hashable, Any]
_NAMES = ("strategy", "dataset", "metric")
"""The columns that name a row in every table."""


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


def hold(found: Iterable[Finding], tables: Mapping[str, pd.DataFrame], level: float) -> int:
    """Hold every claim of findings against the numbers of its row, and return how many there are.

    Args:
        found: findings.
        tables: the tables of ``statistics/`` by name.
        level: of significance.

    Raises:
        InputError: a row is missing, or its difference and p-value say something else.
    """
    stated = {claim for finding in found for claim in finding.claims}
    rows: dict[tuple[str, tuple[str, ...]], Mapping[tuple[str, ...], list[Row]]] = {}
    for claim in stated:
        columns = (*_NAMES, *(name for name, _ in claim.key))
        place = (claim.source, columns)
        if place not in rows:
            rows[place] = _by_name(tables[Path(claim.source).stem], columns)
        shown = _shown(claim, rows[place], level)
        if shown != claim.direction:
            what = f"'{claim.strategy}' on '{claim.dataset}' by '{claim.metric}'"
            raise InputError(
                f"{claim.source}: the verdict on {what} is '{claim.direction}' and its numbers say "
                f"'{shown}'; allowed: what the numbers say. Compute the statistics again"
            )
    return len(stated)


def _by_name(table: pd.DataFrame, columns: Sequence[str]) -> Mapping[tuple[str, ...], list[Row]]:
    """Return the rows of a table by what names them, for every claim about it at once."""
    rows: dict[tuple[str, ...], list[Row]] = {}
    for row in table.to_dict("records"):
        rows.setdefault(tuple(str(row[name]) for name in columns), []).append(row)
    return rows


def _shown(claim: Claim, rows: Mapping[tuple[str, ...], list[Row]], level: float) -> str:
    """Return what difference and p-value of the row of a claim say."""
    names = (claim.strategy, claim.dataset, claim.metric, *(value for _, value in claim.key))
    found = rows.get(names, [])
    if len(found) != 1:
        return "nothing"
    row = found[0]
    difference = row["versus_static" if claim.source == BUDGETS_FILE else "difference"]
    # Of a loss, less is better, whatever the metric.
    loss = claim.source in (BUDGETS_FILE, LEVERS_FILE)
    better = (difference > 0) == (METRICS[claim.metric].higher_is_better and not loss)
    if claim.direction == "same" and difference == 0:
        return "same"
    if difference == 0 or not row.get("p_adjusted", row["p_value"]) <= level:
        return "open"
    return "better" if better else "worse"


def distinct(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without strategies that are the same routing as an earlier one."""
    return rows[rows["same_as"].isna()] if "same_as" in rows else rows


def directions(found: Iterable[Claim]) -> set[Direction]:
    """Return the directions of claims."""
    return {claim.direction for claim in found}
