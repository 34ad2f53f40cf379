"""Tables of the article about discoveries and about orders of experts."""

from __future__ import annotations

import pandas as pd

from moe_routing.analysis.outputs import ADDED, ALL_LAYERS, EITHER, NO_NULL, REMOVED
from moe_routing.analysis.tables import groups_of, rows_of, truth_values
from moe_routing.analysis.together import ORDERS, ROUTER
from moe_routing.config.study import CALIBRATION
from moe_routing.reporting import wording
from moe_routing.reporting.findings_ablation import DISCOVERIES, FEWEST, HEADROOM, at_level
from moe_routing.reporting.results import StudyResults


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
        "Epsilon": f"{own.epsilon:.2g}",
        "False discovery rate": _interval(every, "fdr") if every.n_discoveries else "none made",
        "False by loss": _interval(loss, "false") if loss.n_toggled >= FEWEST else "too few",
        "Harmful": _interval(loss, "harmful") if loss.n_toggled >= FEWEST else "too few",
    }


def _interval(row: object, name: str) -> str:
    middle, low, high = (
        f"{100 * getattr(row, column):.1f}" for column in (name, f"{name}_low", f"{name}_high")
    )
    return f"{middle} [{low}, {high}]"


def headroom_table(study: StudyResults) -> pd.DataFrame:
    """Return the KL of every order of the model's own choice at every k, by text."""
    table = study.table(HEADROOM)
    rows = table[table["text"] == CALIBRATION]
    lines = []
    for row in rows_of(rows):
        middle, low, high = (f"{value:#.3g}" for value in (row.kl, row.kl_low, row.kl_high))
        differences = (row.over_router, row.over_router_low, row.over_router_high)
        difference, least, most = (wording.signed(value, 4) for value in differences)
        is_router = row.order == ROUTER
        closed = (
            wording.signed(100 * x, 0).removeprefix("+") + " %"
            for x in (row.closed, row.closed_low, row.closed_high)
        )
        lines.append(
            {
                "Kept": wording.count(row.k),
                "Order": ORDERS[row.order],
                "KL": f"{middle} [{low}, {high}]",
                "Over the router's": "" if is_router else f"{difference} [{least}, {most}]",
                "Room closed": "" if is_router or pd.isna(row.closed) else _span(*closed),
            }
        )
    return pd.DataFrame(lines)


def _span(middle: str, low: str, high: str) -> str:
    return middle if middle == low == high else f"{middle} [{low}, {high}]"
