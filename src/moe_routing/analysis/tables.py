"""Write the tables of an analysis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.errors import InputError
from moe_routing.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd


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
    """Read a table of an analysis.

    Raises:
        InputError: no such file.
    """
    import pandas as pd

    if not path.is_file():
        raise InputError(f"{path}: no such file; run the analysis before its figures")
    return pd.read_csv(path)


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """Return a pipe table; numbers are rounded to ``digits`` decimals."""
    rows = [[str(name) for name in table.columns], ["---"] * table.shape[1]]
    rows += [
        [f"{value:.{digits}f}" if isinstance(value, float) else str(value) for value in row]
        for row in table.itertuples(index=False)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _plain(value: object) -> object:
    """Return JSON types only: numpy scalars as Python's, missing numbers as None."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and value != value:
        return None
    return value
