"""Findings of the analyses: stock router, BH in depth, validity.

The analyses write most of their own sentences. These functions read them, or make sentences from
the tables.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import TableRow, rows_of
from moe_routing.files import read_json
from moe_routing.reporting.claims import Finding

VERDICT_TABLE = "validity/verdict.csv"


def router(folder: Path) -> list[Finding]:
    """Return the statements of the baseline analysis about the stock router."""
    source = "baseline/baseline_findings.json"
    if not (folder / source).is_file():
        return []
    values = read_json(folder / source).values()
    statements = [value["statement"] for value in values
                  if isinstance(value, dict) and "statement" in value]  # fmt: skip
    return [Finding(wording.typeset(statement), source) for statement in statements]


def recommendation(folder: Path) -> list[Finding]:
    """Return the recommendation of the BH analysis, which may be to change nothing."""
    source = "bh/recommendation.json"
    if not (folder / source).is_file():
        return []
    advice = read_json(folder / source)
    better, worse = advice.get("beats_static_curve", []), advice.get("loses_to_static_curve", [])
    adaptive = len(advice.get("against_static_curve", {}))
    text = wording.typeset(advice["statement"])
    if adaptive:
        text += (
            " Static routing of the same mean number of experts can be compared with "
            f"{wording.plural(adaptive, 'adaptive setting')}. Of these, {len(better) or 'none'} "
            f"{'was' if len(better) == 1 else 'were'} shown to be better than any convex curve "
            f"through the static settings. {len(worse) or 'None'} "
            f"{'was' if len(worse) == 1 else 'were'} worse than the straight line between them."
        )
    if line := len(advice.get("beats_line_only", [])):
        text += (
            f" {wording.count(line)} more {'was' if line == 1 else 'were'} better than that line "
            "only, which shows nothing here."
        )
    if tokens := advice.get("n_tokens"):
        text += (
            f" The intervals hold for all settings at once, on {wording.count(tokens)} tokens, so "
            "the grid can show less than the cells."
        )
    verdict = "mixed" if better and worse else "better" if better else "worse" if worse else "none"
    return [Finding(text, source, verdict)]


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
        Finding(
            wording.typeset(_designs_in_words(row).replace(row.null, f"`{row.null}`", 1)),
            VERDICT_TABLE,
            str(row.call),
        )
        for row in rows_of(ordered)
    ]


def _designs_in_words(row: TableRow) -> str:
    """Return the verdict on a null with its designs as the figures name them."""
    text = row.verdict
    for design in (row.worst_layer_design, row.worst_design, row.noise_design):
        text = text.replace(str(design), wording.as_words(str(design)))
    return text
