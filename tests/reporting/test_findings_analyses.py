"""Sentences from the analyses, both ways."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from moe_routing.reporting import findings_analyses
from moe_routing.wording import MINUS


def write(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_router_findings_are_the_statements_of_the_analysis(tmp_path):
    assert findings_analyses.router(tmp_path) == []
    found = {"dataset": "wikipedia", "trend": {"statement": "Falls (rho -0.36, 95% interval)."}}
    write(tmp_path, "baseline/baseline_findings.json", found)
    (finding,) = findings_analyses.router(tmp_path)
    assert finding.text == f"Falls (rho {MINUS}0.36, 95 % interval)."


@pytest.mark.parametrize(
    ("better", "worse", "verdict", "said"),
    [
        (["a"], [], "better", "1 was shown to be better than any convex curve through the static "
         "settings. None were worse than the straight line"),
        ([], ["a", "b"], "worse", "none were shown to be better than any convex curve through the "
         "static settings. 2 were worse"),
        (["a"], ["b"], "mixed", "settings. 1 was worse"),
        ([], [], "none", "settings. None were worse"),
    ],
)  # fmt: skip
def test_recommendation(tmp_path, better, worse, verdict, said):
    advice = {
        "statement": "For efficiency: regular_k6.",
        "beats_static_curve": better,
        "loses_to_static_curve": worse,
        "against_static_curve": {"a": {}, "b": {}, "c": {}},
    }
    write(tmp_path, "bh/recommendation.json", advice)
    (finding,) = findings_analyses.recommendation(tmp_path)
    assert finding.verdict == verdict
    assert said in finding.text
    assert "can be compared with 3 adaptive settings. Of these" in finding.text
    assert "shows nothing" not in finding.text
    write(tmp_path, "bh/recommendation.json", advice | {"beats_line_only": ["c"]})
    (finding,) = findings_analyses.recommendation(tmp_path)
    assert finding.verdict == verdict
    assert said in finding.text
    assert finding.text.endswith("1 more was better than that line only, which shows nothing here.")
    write(tmp_path, "bh/recommendation.json", advice | {"n_tokens": 1588})
    (finding,) = findings_analyses.recommendation(tmp_path)
    assert "at once, on 1,588 tokens, so the grid can show less than the cells." in finding.text


def test_validity_puts_the_nulls_in_use_first():
    rows = [
        ("pooled", "valid", "pooled is valid: ..."),
        ("within_token", "not shown", "within_token is not shown to be valid: 5% (real_copula)."),
    ]
    table = pd.DataFrame(rows, columns=["null", "call", "verdict"]).assign(
        worst_layer_design="t4", worst_design="normal", noise_design="real_copula"
    )
    found = findings_analyses.validity(table, pd.Series(["none", "within_token"]))
    assert [x.verdict for x in found] == ["not shown", "valid"]
    assert found[0].text == "`within_token` is not shown to be valid: 5 % (real copula)."
    assert findings_analyses.validity(pd.DataFrame(), pd.Series(["none"])) == []
