"""Findings on matched budgets, where there is little to say."""

from __future__ import annotations

import math

import pandas as pd

from moe_routing.reporting import findings_budgets


def rows_at(*pairs):
    rows = [
        {"strategy": name, "dataset": dataset, "scale": "fitted" if "_scaled" in name else "as is"}
        for name, dataset in pairs
    ]
    return pd.DataFrame(rows)


def test_what_was_compared_as_is_only_is_said():
    bh, text, other = "bh_k8_b4", "wikipedia", "lambada"
    scaled = (f"{bh}_scaled", text)
    found = findings_budgets.scale(rows_at((bh, text), (bh, other)), [bh])
    assert found.text.startswith(
        "Rules on Wikipedia and LAMBADA and the declared contrasts were compared as is only."
    )
    found = findings_budgets.scale(rows_at((bh, text), (bh, other), scaled), [bh])
    assert found.text.startswith("Rules on LAMBADA were compared as is only. Part of these")
    found = findings_budgets.scale(rows_at((bh, text), ("regular_k3_scaled", text)), [bh])
    assert found.text.startswith("The declared contrasts were compared as is only.")
    assert findings_budgets.scale(rows_at((bh, text), scaled), [bh]) is None
    assert findings_budgets.scale(pd.DataFrame(), [bh]) is None


def test_rows_that_are_not_compared_are_no_rows():
    """With three items per set nothing is compared; the columns stay."""
    rows = pd.DataFrame({"scale": ["as is"], "verdict": [None], "kind": [None], "budget": [3.0]})
    rows["same_as"] = None
    assert list(findings_budgets.compared(rows).columns) == list(rows.columns)
    assert math.isnan(findings_budgets.middle_budget(rows))
