"""Findings on matched budgets, where there is little to say."""

from __future__ import annotations

import math

import pandas as pd

from moe_routing.reporting import findings_budgets


def test_rows_that_are_not_compared_are_no_rows():
    """With three items per set nothing is compared; the columns stay."""
    rows = pd.DataFrame({"scale": ["as is"], "verdict": [None], "kind": [None], "budget": [3.0]})
    rows["same_as"] = None
    assert list(findings_budgets.compared(rows).columns) == list(rows.columns)
    assert math.isnan(findings_budgets.middle_budget(rows))
