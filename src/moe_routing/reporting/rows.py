"""Rows, groups and columns of result tables, with the types that their readers rely on.

The stubs of pandas cannot know the columns of a table, so they give each cell and group key every
type a table may hold. Here such values are of any type, because the stages that write the tables
define them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import pandas as pd


class TableRow(Protocol):
    """A row of a table: its cells are attributes."""

    def __getattr__(self, column: str, /) -> Any: ...  # noqa: ANN401 (a cell)


def rows_of(table: pd.DataFrame) -> Iterable[TableRow]:
    """Return the rows of a table in order; their label is ``Index``."""
    return table.itertuples()


def groups_of(
    table: pd.DataFrame, by: str | list[str], *, sort: bool = False, dropna: bool = True
) -> Iterable[tuple[Any, pd.DataFrame]]:
    """Return the groups of a table's rows with their keys; a list ``by`` makes tuples of keys."""
    return table.groupby(by, sort=sort, dropna=dropna)


def by_name(values: pd.Series) -> dict[str, Any]:
    """Return the values of a column by row label, which is a name."""
    return {str(name): value for name, value in values.items()}


def largest(table: pd.DataFrame, column: str) -> pd.Series:
    """Return the first row with the largest value in a column; row labels are unique."""
    return table.loc[cast("Any", table[column].idxmax())]
