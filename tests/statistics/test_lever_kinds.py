"""Kinds of levers from their rows, and their curves of loss by mean experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted_levers import CERTIFIED, PLAIN, levers

from moe_routing.statistics import lever_kinds
from moe_routing.statistics.lever_kinds import Curve, LeverKind, Loss, curves, with_kinds


def kind_of(strategy, weighting="softmax", **changes):
    row = {"score": "probability", "candidates": "all", "dropped": "omitted", **changes}
    table = with_kinds(pd.DataFrame([{"strategy": strategy, **row}]), weighting)
    return None if table.empty else (table["kind"].item(), table["budget"].item())


@pytest.mark.parametrize(
    ("strategy", "options", "words", "budget"),
    [
        ("regular_k3", {}, "top k by probability", 3),
        ("stock_k12_scaled", {}, "top k by probability", 12),
        ("regular_k3_norm", {"score": "norm"}, "top k by norm, of all experts", 3),
        ("regular_k3_mean-norm_own", {"score": "mean_norm", "candidates": "own"},
         "top k by mean norm", 3),
        ("absolute_k8_b35_compensated", {"candidates": "own", "dropped": "compensated"},
         "one threshold by probability, compensated", 3.5),
        ("absolute_k8_b050", {"candidates": "own"}, "one threshold by probability", 0.5),
        ("stock_k3_mass-matched", {}, "top k by probability, mass-matched weights", 3),
        ("normalized_k3", {}, "top k by probability, renormalised weights", 3),
    ],
)  # fmt: skip
def test_kinds_and_budgets_are_read(strategy, options, words, budget):
    kind, found = kind_of(strategy, **options)
    assert (kind.words, found) == (words, budget)


def test_the_models_own_weights_are_those_of_the_model():
    assert kind_of("normalized_k3", "renormalised")[0] == lever_kinds.PLAIN
    assert kind_of("regular_k3", "renormalised")[0].weighting == "softmax"


def test_certified_strategies_have_no_budget_and_scaled_stock_no_kind():
    kind, budget = kind_of(CERTIFIED, score="consequence", candidates="own", dropped="compensated")
    assert kind.rule == lever_kinds.CERTIFIED
    assert np.isnan(budget)
    assert kind_of("stock_scaled") is None
    assert with_kinds(pd.DataFrame(), "softmax").empty


@pytest.fixture(scope="module")
def plain():
    rows = with_kinds(levers(datasets=("wikipedia",)), "softmax")
    return dict(curves(rows, "unscaled", 8))[lever_kinds.PLAIN]


def test_a_curve_is_straight_between_settings_and_ends_at_stock(plain):
    assert plain.at(3) == Loss(PLAIN[3], PLAIN[3] - 0.002, PLAIN[3] + 0.002)
    assert plain.at(3.5).value == pytest.approx((PLAIN[3] + PLAIN[4]) / 2)
    assert plain.at(7).value == pytest.approx(PLAIN[6] / 2)
    assert plain.at(8) == Loss(0, 0, 0)
    assert plain.at(0.95) == plain.at(1)
    assert plain.at(0.5) is None
    assert plain.at(9) is None


def test_experts_for_a_loss(plain):
    experts, same = plain.experts_for((PLAIN[3] + PLAIN[4]) / 2)
    assert experts == same == pytest.approx(3.5)
    assert plain.experts_for(0.5) is None  # the first setting already loses less
    assert plain.experts_for(-0.1) is None
    sparse = Curve(plain.rows[plain.rows["budget"] == 3], 8)
    assert sparse.experts_for(0.03) == (3, 8)  # nothing was scored between


def test_widened_kinds_never_become_stock():
    rows = with_kinds(levers(datasets=("wikipedia",)), "softmax")
    widened = LeverKind("static", "norm", widened=True)
    curve = dict(curves(rows, "unscaled", 8))[widened]
    assert not widened.ends_at_stock
    assert curve.at(6) is None
    assert LeverKind("static", weighting="mass_matched").ends_at_stock
    assert not LeverKind("static", weighting="renormalised").ends_at_stock


@pytest.mark.parametrize(("high", "shown"), [(0.9, True), (1.0, False), (1.2, False)])
def test_a_loss_is_smaller_if_the_intervals_do_not_overlap(high, shown):
    assert Loss(0.5, 0.1, high).below(Loss(2, 1.0, 3)) == shown
