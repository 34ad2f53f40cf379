"""Kinds of rules, what they lack without a lever, and what is at chance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.rules import LEVERS, PLAIN, RuleKind, budget_of, kind_of, with_kinds


@pytest.mark.parametrize(
    ("strategy", "words", "budget"),
    [
        ("regular_k3", "fixed k", 3),
        ("stock_k12_scaled", "fixed k", 12),
        ("regular_k3_norm", "fixed k by norm, of all experts", 3),
        ("regular_k3_mean-norm_own", "fixed k by mean norm", 3),
        ("absolute_k8_b35_compensated", "one threshold, compensated", 3.5),
        ("absolute_k8_b050", "one threshold", 0.5),
        ("stock_k3_mass-matched", "fixed k, mass-matched weights", 3),
        ("normalized_k3", "fixed k, renormalised weights", 3),
        ("mixture_b35", "fixed k", 3.5),
        ("bh_k8_b4", "Benjamini-Hochberg", 4),
    ],
)
def test_kinds_and_budgets_are_read(strategy, words, budget):
    parsed = parse_strategy(strategy)
    assert (kind_of(parsed, "softmax").words, budget_of(parsed)) == (words, budget)


def test_the_models_own_weights_are_those_of_the_model():
    assert kind_of(parse_strategy("normalized_k3"), "renormalised") == PLAIN
    assert kind_of(parse_strategy("regular_k3"), "renormalised").weighting == "softmax"


def test_certified_strategies_have_no_budget_and_stock_no_kind():
    assert np.isnan(budget_of(parse_strategy("certified_k8_m001")))
    assert kind_of(parse_strategy("stock_scaled"), "softmax") is None
    assert with_kinds(pd.DataFrame(), "softmax").empty


def test_each_lever_takes_away_one_decision():
    full = RuleKind("absolute", "consequence", "compensated")
    without = {name: take(full) for name, take in LEVERS.items()}
    assert without == {
        "score": RuleKind("absolute", "probability", "compensated"),
        "tokens": RuleKind("static", "consequence", "compensated"),
        "substitute": RuleKind("absolute", "consequence"),
        "weights": None,
    }
    assert all(take(PLAIN) is None for take in LEVERS.values())


def test_widened_kinds_never_become_stock():
    assert not RuleKind("static", "norm", widened=True).ends_at_stock
    assert RuleKind("static", weighting="mass_matched").ends_at_stock
    assert not RuleKind("static", weighting="renormalised").ends_at_stock
