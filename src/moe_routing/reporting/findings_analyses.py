"""Findings of the analyses: stock router, BH in depth, validity, ablation.

The analyses write most of their own sentences. These functions read them, or make sentences from
the tables.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.analysis.tables import rows_of
from moe_routing.config.study import StudyConfig
from moe_routing.files import read_json
from moe_routing.reporting import wording
from moe_routing.reporting.findings import Finding

ABLATION_TABLE = "ablation/ablation.csv"
VERDICT_TABLE = "validity/verdict.csv"


def router(folder: Path) -> list[Finding]:
    """Return the statements of the baseline analysis about the stock router."""
    source = "baseline/baseline_findings.json"
    if not (folder / source).is_file():
        return []
    values = read_json(folder / source).values()
    statements = [value["statement"] for value in values
                  if isinstance(value, dict) and "statement" in value]  # fmt: skip
    return [Finding(_typeset(statement), source) for statement in statements]


def recommendation(folder: Path) -> list[Finding]:
    """Return the recommendation of the BH analysis, which may be to change nothing."""
    source = "bh/recommendation.json"
    if not (folder / source).is_file():
        return []
    advice = read_json(folder / source)
    better, worse = advice.get("beats_static_curve", []), advice.get("loses_to_static_curve", [])
    adaptive = len(advice.get("against_static_curve", {}))
    text = _typeset(advice["statement"])
    if adaptive:
        text += (
            f" Of {wording.plural(adaptive, 'adaptive setting')} that static routing of the same "
            f"mean number of experts can be compared with, {len(better) or 'none'} "
            f"{'was' if len(better) == 1 else 'were'} shown to be better and "
            f"{len(worse) or 'none'} worse."
        )
    if line := len(advice.get("beats_line_only", [])):
        text += (
            f" {wording.count(line)} more had a lower loss than the straight line between "
            "neighbouring static settings, but not lower than a convex curve through the static "
            "settings can be there: for these nothing is shown."
        )
    verdict = "mixed" if better and worse else "better" if better else "worse" if worse else "none"
    return [Finding(text, source, verdict)]


def _typeset(text: str) -> str:
    """Write percent and minus signs as in the rest of the article."""
    text = re.sub(r"(?<=\d)%", " %", text)
    return re.sub(r"(?<![\w.])-(?=\d)", wording.MINUS, text)


def validity(verdicts: pd.DataFrame, used: pd.Series) -> list[Finding]:
    """Return the verdict on each null, starting with those that the cells use.

    Args:
        verdicts: ``validity/verdict.csv``.
        used: null of each cell.
    """
    if verdicts.empty:
        return []
    first = verdicts["null"].isin(set(used))
    ordered = pd.concat([verdicts[first], verdicts[~first]])
    return [
        Finding(_as_code(row.verdict, row.null), VERDICT_TABLE, str(row.call))
        for row in rows_of(ordered)
    ]


def _as_code(text: str, null: str) -> str:
    return text.replace(null, f"`{null}`", 1)


def ablation(table: pd.DataFrame, config: StudyConfig) -> list[Finding]:
    """State for the stock router and each null how many of its experts could be removed.

    The config declares threshold and level, so they are not chosen from the results: the threshold
    is ``analysis.ablation.primary_epsilon``; the level is the one of the table nearest to that of
    the primary strategy (the first, if that strategy has none). The scope is the first of
    ``ablation/ablation.csv``, over all layers.
    """
    if table.empty:
        return []
    rows = table[
        (table["layer"].astype(str) == ALL_LAYERS)
        & np.isclose(table["epsilon"], config.analysis.ablation.primary_epsilon)
        & (table["scope"] == table["scope"].iloc[0])
    ]
    wanted = getattr(config.parsed[config.statistics.primary.strategy], "alpha", None)
    tested = rows[rows["alpha"].notna()]
    stock = [_stock(row) for _, row in rows[rows["alpha"].isna()].iterrows()]
    return stock + [
        _discoveries(_at(group, wanted)) for _, group in tested.groupby("null", sort=False)
    ]


def _at(group: pd.DataFrame, alpha: float | None) -> pd.Series:
    """Return the row whose level is nearest to ``alpha``; the first row without one."""
    nearest = 0 if alpha is None else int((group["alpha"] - alpha).abs().argmin())
    return group.iloc[nearest]


def _stock(row: pd.Series) -> Finding:
    text = (
        f"Of {wording.count(row['n_discoveries'])} experts that the stock router had chosen, "
        f"{_false(row)} could be removed with a change of less than {row['epsilon']:g} nats. The "
        "same removals are used for every null."
    )
    return Finding(text, ABLATION_TABLE, "reference")


def _discoveries(row: pd.Series) -> Finding:
    alpha, null = f"{row['alpha']:g}", row["null"]
    under = f"Under `{null}` at alpha {alpha},"
    if not row["n_discoveries"]:
        text = f"{under} BH discovered none of the stock router's experts on the tokens tested."
        return Finding(text + _beyond(row), ABLATION_TABLE, "no discovery")
    held = row["fdr_low"] <= row["alpha"]
    exceeded = "not demonstrably above" if held else "demonstrably above"
    text = (
        f"{under} {_false(row)} of {wording.count(row['n_discoveries'])} of these experts that BH "
        f"discovers could be removed with a change of less than {row['epsilon']:g} nats. The mean "
        f"over decisions, those without discoveries included, is {wording.percent(row['fdr'])} "
        f"[{wording.percent(row['fdr_low'])}, {wording.percent(row['fdr_high'])}], {exceeded} "
        "alpha."
    )
    return Finding(text + _beyond(row), ABLATION_TABLE, "held" if held else "exceeded")


def _false(row: pd.Series) -> str:
    low, high = wording.percent(row["fdp_low"]), wording.percent(row["fdp_high"])
    return f"{wording.percent(row['fdp'])} [{low}, {high}]"


def _beyond(row: pd.Series) -> str:
    """Say how many discoveries could not be tested by removal."""
    if not row["n_beyond"]:
        return ""
    discoveries = "discovery" if row["n_beyond"] == 1 else "discoveries"
    return (
        f" {wording.count(row['n_beyond'])} further {discoveries} beyond the stock router's "
        "experts could not be tested."
    )
