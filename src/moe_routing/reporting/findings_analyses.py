"""What may be said from the analyses: stock router, BH in depth, validity, ablation.

The analyses choose most of their own sentences; here they are read, or made from their tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.files import read_json
from moe_routing.reporting import wording as w
from moe_routing.reporting.findings import Finding

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig

ABLATION_TABLE = "ablation/ablation.csv"


def router(folder: Path) -> list[Finding]:
    """Return what the baseline analysis found about the stock router."""
    source = "baseline/baseline_findings.json"
    if not (folder / source).is_file():
        return []
    values = read_json(folder / source).values()
    answers = [value for value in values if isinstance(value, dict) and "statement" in value]
    return [Finding(_spaced(answer["statement"]), source) for answer in answers]


def recommendation(folder: Path) -> list[Finding]:
    """Return what the BH analysis recommends, or that it recommends nothing."""
    source = "bh/recommendation.json"
    if not (folder / source).is_file():
        return []
    advice = read_json(folder / source)
    better, worse = advice.get("beats_static_curve", []), advice.get("loses_to_static_curve", [])
    adaptive = len(advice.get("against_static_curve", {}))
    text = _spaced(advice["statement"])
    if adaptive:
        text += (
            f" Of {w.plural(adaptive, 'adaptive setting')} that static routing of the same mean "
            f"number of experts can be compared with, {len(better) or 'none'} "
            f"{'was' if len(better) == 1 else 'were'} shown to be better and "
            f"{len(worse) or 'none'} worse."
        )
    if line := len(advice.get("beats_line_only", [])):
        text += (
            f" {w.count(line)} more had a lower loss than the straight line between the static "
            "settings around them, but no lower one than a convex curve through the static "
            "settings could have there: of these nothing is shown."
        )
    verdict = "mixed" if better and worse else "better" if better else "worse" if worse else "none"
    return [Finding(text, source, verdict)]


def _spaced(text: str) -> str:
    """Write percent and minus signs as the rest of the article does."""
    text = re.sub(r"(?<=\d)%", " %", text)
    return re.sub(r"(?<![\w.])-(?=\d)", w.MINUS, text)


def validity(verdicts: pd.DataFrame, used: pd.Series) -> list[Finding]:
    """Return the verdict on each null, those that the cells use first.

    Args:
        verdicts: ``validity/verdict.csv``.
        used: null of each cell.
    """
    if verdicts.empty:
        return []
    first = verdicts["null"].isin(set(used))
    ordered = pd.concat([verdicts[first], verdicts[~first]])
    return [
        Finding(
            _as_code(row.verdict, row.null),
            "validity/verdict.csv",
            str(row.call),
        )
        for row in ordered.itertuples()
    ]


def _as_code(text: str, null: str) -> str:
    return text.replace(null, f"`{null}`", 1)


def ablation(table: pd.DataFrame, config: StudyConfig) -> list[Finding]:
    """State for the stock router and for each null how many of its experts make no difference.

    What the sentences are about is declared in the config, not chosen from the results: the
    threshold ``analysis.ablation.primary_epsilon``, and the level of the primary strategy or the
    audited one nearest to it (the first, if that strategy has none). The first scope of
    ``ablation/ablation.csv`` is taken, over all layers.
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
    return stock + [_audited(_at(group, wanted)) for _, group in tested.groupby("null", sort=False)]


def _at(group: pd.DataFrame, alpha: float | None) -> pd.Series:
    """Return the row whose level is nearest to one; the first row without one."""
    place = 0 if alpha is None else int((group["alpha"] - alpha).abs().argmin())
    return group.iloc[place]


def _stock(row: pd.Series) -> Finding:
    text = (
        f"Of {w.count(row['n_discoveries'])} experts that the stock router had chosen, "
        f"{_false(row)} could be removed with less than {row['epsilon']:g} nats of change. Every "
        "null is judged by these same removals."
    )
    return Finding(text, ABLATION_TABLE, "reference")


def _audited(row: pd.Series) -> Finding:
    alpha, null = f"{row['alpha']:g}", row["null"]
    under = f"Under `{null}` at alpha {alpha},"
    if not row["n_discoveries"]:
        text = f"{under} BH discovered none of the stock router's experts on the audited tokens."
        return Finding(text + _beyond(row), ABLATION_TABLE, "no discovery")
    held = row["fdr_low"] <= row["alpha"]
    exceeded = "not demonstrably above" if held else "demonstrably above"
    text = (
        f"{under} {_false(row)} of {w.count(row['n_discoveries'])} of these experts that BH "
        f"discovers could be removed with less than {row['epsilon']:g} nats of change; averaged "
        f"over decisions, silent ones included, that is {w.percent(row['fdr'])} "
        f"[{w.percent(row['fdr_low'])}, {w.percent(row['fdr_high'])}], {exceeded} alpha."
    )
    return Finding(text + _beyond(row), ABLATION_TABLE, "held" if held else "exceeded")


def _false(row: pd.Series) -> str:
    low, high = w.percent(row["fdp_low"]), w.percent(row["fdp_high"])
    return f"{w.percent(row['fdp'])} [{low}, {high}]"


def _beyond(row: pd.Series) -> str:
    """Say how many discoveries the ablation could say nothing about."""
    if not row["n_beyond"]:
        return ""
    discoveries = "discovery" if row["n_beyond"] == 1 else "discoveries"
    return (
        f" {w.count(row['n_beyond'])} further {discoveries}, beyond the stock router's experts, "
        "could not be removed."
    )
