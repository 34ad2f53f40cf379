"""Tables of the article about discoveries and about orders of experts."""

from __future__ import annotations

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.outputs import ADDED, ALL_LAYERS, EITHER, NO_NULL, REMOVED
from moe_routing.analysis.tables import TableRow, groups_of, rows_of, truth_values
from moe_routing.analysis.together import ORDERS, ROUTER
from moe_routing.config.study import CALIBRATION
from moe_routing.reporting.findings_ablation import DISCOVERIES, FEWEST, HEADROOM, at_level
from moe_routing.reporting.results import StudyResults
from moe_routing.vocabulary import DIVERGENCE


def discoveries_table(study: StudyResults) -> pd.DataFrame:
    """Return what the discoveries of every null are worth, over all layers."""
    table = study.table(DISCOVERIES)
    rows = table[truth_values(table["primary"]) & (table["layer"].astype(str) == ALL_LAYERS)]
    stock = rows[rows["null"] == NO_NULL]
    tested = rows[rows["null"] != NO_NULL]
    lines = [_line("the model's own choice", stock)]
    for null, own in groups_of(tested, "null"):
        lines.append(_line(f"`{null}`", at_level(own, study.config)))
    return pd.DataFrame(lines)


def _line(name: str, rows: pd.DataFrame) -> dict[str, str]:
    by = {(row.effect, row.part): row for row in rows_of(rows)}
    every, own, others = (by["kl", part] for part in (EITHER, REMOVED, ADDED))
    loss = by["loss", REMOVED]
    return {
        "Null": name,
        "Own": wording.experts(own.mean_discoveries),
        "Others": wording.experts(others.mean_discoveries),
        "Epsilon": wording.scientific(own.epsilon),
        "False discovery rate": _interval(every, "fdr") if every.n_discoveries else "none made",
        "False by loss": _interval(loss, "false") if loss.n_toggled >= FEWEST else "too few",
        "Harmful": _interval(loss, "harmful") if loss.n_toggled >= FEWEST else "too few",
    }


def _interval(row: TableRow, name: str) -> str:
    columns = (name, f"{name}_low", f"{name}_high")
    return wording.percentage(*(getattr(row, column) for column in columns))


def headroom_table(study: StudyResults) -> pd.DataFrame:
    """Return the KL of every order of the model's own choice at every k, by text."""
    table = study.table(HEADROOM)
    rows = table[table["text"] == CALIBRATION]
    lines = []
    for row in rows_of(rows):
        versus = (row.over_router, row.over_router_low, row.over_router_high)
        is_router = row.order == ROUTER
        lines.append(
            {
                "Kept": wording.count(row.k),
                "Order": ORDERS[row.order],
                "KL": wording.interval(row.kl, row.kl_low, row.kl_high),
                "Over the router's": ""
                if is_router
                else wording.difference(*versus, DIVERGENCE.name, unit=False),
                "Room closed": "" if is_router or pd.isna(row.closed) else _closed(row),
            }
        )
    return pd.DataFrame(lines)


def _closed(row: TableRow) -> str:
    """Return the part of the room that an order closes; the best order closes all of it."""
    ends = (row.closed, row.closed_low, row.closed_high)
    return wording.percent(row.closed, 0) if len(set(ends)) == 1 else wording.share(*ends)
