"""Sentences from the analyses, both ways."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from planted_results import planted_config

from moe_routing.reporting import findings_analyses
from moe_routing.reporting.wording import MINUS


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
        (["a"], [], "better", "1 was shown to be better and none worse"),
        ([], ["a", "b"], "worse", "none were shown to be better and 2 worse"),
        (["a"], ["b"], "mixed", "1 was shown to be better and 1 worse"),
        ([], [], "none", "none were shown to be better and none worse"),
    ],
)
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
    assert "Of 3 adaptive settings" in finding.text
    assert "straight line" not in finding.text
    write(tmp_path, "bh/recommendation.json", advice | {"beats_line_only": ["c"]})
    (finding,) = findings_analyses.recommendation(tmp_path)
    assert finding.verdict == verdict
    assert said in finding.text
    assert "1 more had a lower loss than the straight line" in finding.text
    assert finding.text.endswith("nothing is shown.")


def test_validity_puts_the_nulls_in_use_first():
    rows = [
        ("pooled", "valid", "pooled is valid: ..."),
        ("within_token", "not shown", "within_token is not shown to be valid: ..."),
    ]
    table = pd.DataFrame(rows, columns=["null", "call", "verdict"])
    found = findings_analyses.validity(table, pd.Series(["none", "within_token"]))
    assert [x.verdict for x in found] == ["not shown", "valid"]
    assert found[0].text.startswith("`within_token` is not shown")
    assert findings_analyses.validity(pd.DataFrame(), pd.Series(["none"])) == []


def ablation_row(**changes):
    row = {
        "null": "pooled", "alpha": 0.05, "scope": "next token", "epsilon": 0.01, "layer": "all",
        "n_discoveries": 142, "fdp": 0.887, "fdp_low": 0.735, "fdp_high": 0.957, "fdr": 0.007,
        "fdr_low": 0.003, "fdr_high": 0.017, "n_beyond": 0,
    }  # fmt: skip
    return row | changes


@pytest.mark.parametrize(
    ("low", "verdict", "said"),
    [
        (0.003, "held", ", not demonstrably above alpha."),
        (0.07, "exceeded", ", demonstrably above"),
    ],
)
@pytest.mark.parametrize("other", [0.0, 0.9])
def test_ablation(low, verdict, said, other):
    rows = [
        ablation_row(epsilon=0.1, fdr_low=other),
        ablation_row(alpha=0.01, fdr_low=other),
        ablation_row(fdr_low=low),
        ablation_row(alpha=0.1, fdr_low=other),
        ablation_row(layer="3", fdr_low=other),
        ablation_row(epsilon=0.001, fdr_low=other),
        ablation_row(scope="window", fdr_low=other),
        ablation_row(null="none", alpha=float("nan"), n_discoveries=1600, fdp=0.5),
    ]
    stock, finding = findings_analyses.ablation(pd.DataFrame(rows), planted_config())
    assert stock.verdict == "reference"
    assert "Of 1,600 experts that the stock router had chosen, 50.0 % [73.5 %" in stock.text
    assert finding.verdict == verdict
    assert said in finding.text
    assert "Under `pooled` at alpha 0.05, " in finding.text
    assert "less than 0.01 nats" in finding.text
    assert "88.7 % [73.5 %, 95.7 %] of 142 of these experts that BH" in finding.text
    assert "further" not in finding.text


@pytest.mark.parametrize(
    ("strategy", "audited"),
    [("bh_k8_a005", "0.04"), ("bh_k8_a001", "0.02"), ("adaptive_k8", "0.1")],
)
def test_ablation_speaks_of_the_level_of_the_primary_strategy(strategy, audited):
    rows = [ablation_row(alpha=alpha) for alpha in (0.1, 0.02, 0.04)]
    config = planted_config(primary=(strategy, "hellaswag"))
    (finding,) = findings_analyses.ablation(pd.DataFrame(rows), config)
    assert f"at alpha {audited}, " in finding.text


def test_ablation_speaks_of_the_declared_threshold():
    config = planted_config()
    audited = config.analysis.ablation.model_copy(update={"primary_epsilon": 0.1})
    analysis = config.analysis.model_copy(update={"ablation": audited})
    rows = [ablation_row(), ablation_row(epsilon=0.1, fdr_low=0.9)]
    (finding,) = findings_analyses.ablation(
        pd.DataFrame(rows), config.model_copy(update={"analysis": analysis})
    )
    assert finding.verdict == "exceeded"
    assert "less than 0.1 nats" in finding.text


@pytest.mark.parametrize(
    ("beyond", "said"), [(1, "1 further discovery beyond"), (1234, "1,234 further")]
)
@pytest.mark.parametrize("discoveries", [0, 142])
def test_ablation_says_what_it_could_not_remove(beyond, said, discoveries):
    rows = pd.DataFrame([ablation_row(n_discoveries=discoveries, n_beyond=beyond)])
    (finding,) = findings_analyses.ablation(rows, planted_config())
    assert said in finding.text


def test_ablation_without_discoveries_claims_nothing():
    rows = pd.DataFrame([ablation_row(n_discoveries=0, fdp=float("nan"))])
    (finding,) = findings_analyses.ablation(rows, planted_config())
    assert finding.verdict == "no discovery"
    assert findings_analyses.ablation(pd.DataFrame(), planted_config()) == []
