"""Read and write tables (CSV, JSON, Markdown), and their rows and groups with usable types.

The stubs of pandas cannot know the columns of a table, so they give each cell and group key every
type a table may hold. Here such values are of any type, because the stages that write the tables
define them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from moe_routing.files import atomic_path, reading

WIDEST = 34
"""Characters that a column of a Markdown table may claim before its text wraps."""
WIDTH, GAP, LONG = 112, 2, 24
"""Characters that fit a page in the size of tables, those between columns, and the longest id that
is not broken."""


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table without its index."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def write_json(value: object, path: Path) -> None:
    """Write indented JSON; NaN becomes null."""
    with atomic_path(path) as temporary:
        text = json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table of a study; the word ``none`` is kept as text.

    Raises:
        InputError: the file is missing, damaged or not a table.
    """
    with reading(path, "a CSV table"):
        return pd.read_csv(path, keep_default_na=False, na_values=[""])


def markdown(table: pd.DataFrame, align: str | None = None) -> str:
    """Return a Markdown pipe table without a newline at its end; numbers have three decimals.

    Cells and names may hold Markdown; a bar in them is escaped. Rules are as long as their columns
    are wide, because pandoc takes relative widths from them: wide enough for the longest word.

    Args:
        table: the cells; the index is left out.
        align: one letter (l, r, c) per column, those without one to the right; None aligns the
            first two left.
    """
    columns = [_cell(str(name)) for name in table.columns]
    align = (align or "ll").ljust(len(columns), "r")[: len(columns)]
    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    widths = _widths(list(zip(columns, *rows, strict=True)))
    rules = [_rule(letter, width) for letter, width in zip(align, widths, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, rules, *rows])


def _cell(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def _widths(columns: Sequence[Sequence[str]]) -> list[int]:
    """Return the widths of columns in characters: no word breaks if all fit the page."""
    plain = [[re.sub(r"[`*]", "", text) for text in column] for column in columns]
    least = [max(map(_longest, column)) + GAP for column in plain]
    full = [max(map(len, column)) + GAP for column in plain]
    more = [max(0, min(WIDEST, n) - word) for n, word in zip(full, least, strict=True)]
    spare = max(0, WIDTH - sum(least))
    part = min(1.0, spare / max(1, sum(more)))
    return [word + int(part * extra) for word, extra in zip(least, more, strict=True)]


def _longest(text: str) -> int:
    """Return the length of the longest part of a text that is not broken into lines."""
    words = text.split(" ")
    return max(
        len(part)
        for word in words
        for part in (re.split(r"(?<=_)", word) if len(word) > LONG else [word])
    )


def _rule(letter: str, length: int) -> str:
    left, right = (":" if letter in pair else "" for pair in ("lc", "rc"))
    return f"{left}{'-' * max(length, 3)}{right}"


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


def rows_with(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    """Return the rows with these values in these columns; a table without rows may lack them."""
    for name, value in values.items():
        table = table[table[name] == value] if len(table) else table
    return table


def largest(table: pd.DataFrame, column: str) -> pd.Series:
    """Return the first row with the largest value in a column."""
    return table.iloc[int(table[column].argmax())]


def truth_values(column: pd.Series) -> pd.Series:
    """Return a column of a CSV file as booleans; it may hold them as words."""
    return column.astype(str).str.lower() == "true"


def _plain(value: object) -> object:
    """Return JSON types only: numpy scalars as Python's, missing numbers as None."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    tolist = getattr(value, "tolist", None)
    if tolist is not None:
        return _plain(tolist())
    if isinstance(value, float) and value != value:
        return None
    return value
