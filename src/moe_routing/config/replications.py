"""The tables of replications that a config names; no pandas."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from moe_routing.errors import InputError
from moe_routing.files import reading

REPLICATION_COLUMNS = ("run", "quantity", "setting", "budget", "value", "low", "high")


def read_run(path: str) -> str:
    """Return the name of the study that a table of replications is of.

    Raises:
        InputError: it is no such table, or one of several studies.
    """
    with reading(path, "a table") as table, table.open(encoding="utf-8", newline="") as lines:
        columns, *rows = [tuple(row) for row in csv.reader(lines)] or [()]
    runs = sorted({row[0] for row in rows if row})
    if columns != REPLICATION_COLUMNS or len(runs) != 1:
        raise InputError(
            f"{path}: columns {', '.join(columns) or 'none'}, runs {', '.join(runs) or 'none'}; "
            f"allowed: columns {', '.join(REPLICATION_COLUMNS)}, and rows of one run "
            "(replications.csv of another study, without replications of its own)"
        )
    return runs[0]


def check_replications(paths: Sequence[str], study: str, origin: str) -> None:
    """Check the tables that a config names.

    Args:
        paths: their paths.
        study: name of the study.
        origin: how errors name the config file.

    Raises:
        InputError: see :func:`read_run`; or two tables are of one study, or one is of this study.
    """
    seen = [study]
    for path in paths:
        run = read_run(path)
        if run in seen:
            raise InputError(
                f"{origin}: replications has '{path}', a table of '{run}'; allowed: one table of "
                f"each study, and none of '{study}' itself"
            )
        seen.append(run)
