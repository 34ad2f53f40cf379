"""Strategies with a budget, and the static mixture, on simulated router logits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from slow_loops import router_inputs

from moe_routing.errors import InputError
from moe_routing.files import atomic_path
from moe_routing.routing.budget import Budget, budget_path, left_out
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.draws import prefix_keys, uniform
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.scores import scored_sample
from moe_routing.routing.strategies import parse_strategy

BUDGETED = [
    "topp_k8_b3", "minp_k8_b25", "minp_k8_b35_m2", "entropy_k8_b3_m1", "dynskip_k8_b4", "bh_k8_b3",
    "bh_k8_b3_within-token", "threshold_k8_b3_per-expert", "absolute_k8_b4",
    "absolute_k8_b3_all",
]  # fmt: skip


def found(budget=3.0, **changes) -> Budget:
    values = {
        "strategy": "topp_k8_b3", "parameter": "mass", "value": 0.5, "budget": budget,
        "realised": 3.02, "realised_by_layer": (3.0, 3.04), "tokens": 100, "status": "fitted",
    }  # fmt: skip
    return Budget(**{**values, **changes})


def means(strategy, calibration) -> list[float]:
    """Return the mean experts of each layer on the calibration sample."""
    select = strategy.selector(calibration, 64)
    return [
        float(select(inputs, inputs.softmax_TE).count_T.double().mean())
        for inputs in scored_sample(strategy, calibration)
    ]


@pytest.mark.parametrize("name", BUDGETED)
def test_the_first_value_keeps_the_budget_on_the_sample(calibration_of, name):
    calibration, asked = calibration_of(64), parse_strategy(name)
    value = asked.on_sample(calibration, 64)([asked.budget])
    # Every third token was looked at.
    assert np.mean(means(asked.at(value), calibration)) == pytest.approx(asked.budget, abs=0.1)


def test_thresholds_by_layer_keep_the_budget_in_each(calibration_of):
    calibration, asked = calibration_of(64), parse_strategy("layered_k8_b3")
    strategy = asked.at(asked.on_sample(calibration, 64)([2.0, 4.0]))
    assert means(strategy, calibration) == pytest.approx([2, 4], abs=0.01)
    weight_LTE = calibration.sample.logits_LTE.softmax(-1)
    for layer, threshold in enumerate(strategy.thresholds):
        top_TE = weight_LTE[layer].topk(calibration.sample.top_k).values
        slow = [sum(w >= threshold * (1 - 1e-6) for w in row) for row in top_TE[:200].tolist()]
        inputs = scored_sample(strategy, calibration)[layer]
        selection = strategy.selector(calibration, 64)(inputs, inputs.softmax_TE)
        assert selection.count_T[:200].tolist() == [min(count, 8) for count in slow]


def test_a_level_stays_within_its_limits(calibration_of):
    calibration = calibration_of(64)
    strategy = parse_strategy("bh_k8_b1")
    low, high = strategy.limits(calibration, 64)
    assert low == pytest.approx(2 * 64 / calibration.nulls["needed"].num_draws)
    assert high == 0.3
    value_for = strategy.on_sample(calibration, 64)
    assert (value_for([0.5]), value_for([8.0])) == (low, high)
    assert parse_strategy("topp_k8_b3").limits(calibration, 64) == (1e-6, 1 - 1e-6)


def test_a_strategy_with_a_budget_routes_by_the_fitted_value(calibration_of):
    plain = calibration_of(64)
    known = dataclasses.replace(plain, budgets={"topp_k8_b3": found(value=0.5)})
    for name in ("topp_k8_b3", "topp_k8_b3_scaled"):
        assert parse_strategy(name).fitted(known).mass == 0.5
    assert parse_strategy("shuffle.topp_k8_b3").fitted(known).base.mass == 0.5
    assert parse_strategy("topp_k8_p020").fitted(None).mass == 0.2
    with pytest.raises(InputError, match="its budget is not fitted in this calibration; fitted: n"):
        parse_strategy("topp_k8_b3").fitted(plain)
    with pytest.raises(InputError, match=r"mass is not fitted; allowed: strategy\.fitted"):
        parse_strategy("topp_k8_b3").selector(plain, 64)
    gone = found(value=None, status="left out", reason="no mass keeps 3 experts")
    with pytest.raises(InputError, match="'topp_k8_b3' is left out: no mass keeps 3 experts"):
        parse_strategy("topp_k8_b3").fitted(
            dataclasses.replace(plain, budgets={gone.strategy: gone})
        )


def test_budgets_are_saved_with_the_calibration(calibration_of, tmp_path):
    layered = found(strategy="layered_k8_b3", parameter="thresholds", value=(0.1, 0.2))
    gone = found(strategy="bh_k8_b2", value=None, status="left out", reason="none keeps it")
    budgets = {one.strategy: one for one in (found(), layered, gone)}
    calibration = dataclasses.replace(calibration_of(64), nulls={}, toggles=None, budgets=budgets)
    calibration.save(tmp_path)
    assert Calibration.load(tmp_path).budgets == budgets
    names = ("shuffle.topp_k8_b3", "layered_k8_b3_scaled")
    strategies = [parse_strategy(name) for name in names]
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales/layered_k8_b3_scaled.json").write_text('{"scale": null}')
    some = Calibration.for_strategies(tmp_path, *strategies)
    assert set(some.budgets) == {"topp_k8_b3", "layered_k8_b3"}
    assert some.scales == {}
    assert "mass 0.5 keeps 3.02 experts" in str(calibration)
    ids = ("topp_k8_b3", "bh_k8_b2", "mixture.bh_k8_b2", "bh_k8_b2_scaled", "bh_k8_b3", "stock")
    absent = left_out(tmp_path, map(parse_strategy, ids))
    assert set(absent) == {"bh_k8_b2", "mixture.bh_k8_b2", "bh_k8_b2_scaled"}
    assert set(absent.values()) == {"left out: none keeps it"}
    with atomic_path(budget_path(tmp_path, "topp_k8_b3")) as damaged:
        damaged.write_text('{"value": 1}')
    with pytest.raises(InputError, match=r"topp_k8_b3.json: not a fitted budget"):
        Calibration.load(tmp_path)


def test_a_mixture_takes_the_largest_experts_of_each_token(rng):
    logits_TE = torch.from_numpy(rng.standard_normal((4000, 64)).astype("float32"))
    inputs = dataclasses.replace(router_inputs(logits_TE), key_T=torch.arange(4000))
    selection = parse_strategy("mixture_b325").selector(None, 64)(inputs, logits_TE.softmax(-1))
    share = float((selection.count_T == 4).double().mean())
    assert set(selection.count_T.tolist()) == {3, 4}
    assert share == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / 4000) ** 0.5)
    for row, index_K, count in zip(logits_TE, selection.index_TK, selection.count_T, strict=True):
        expected = sorted(range(64), key=lambda e: -float(row[e]))[: int(count)]
        assert index_K[:count].tolist() == expected


def test_a_mixture_of_a_whole_number_is_top_k():
    rule = ModelRule(8, "renormalised")
    assert parse_strategy("mixture_b4").resolved(rule).id == "normalized_k4"
    assert parse_strategy("mixture_b4_norm_own").resolved(rule).id == "normalized_k4_norm_own"
    assert parse_strategy("mixture_b4_uniform").resolved(rule).id == "uniform_k4"
    assert parse_strategy("mixture_b35").resolved(rule).weighting == "renormalised"


def test_keys_are_hashes_of_the_text_so_far():
    modulus, factor = 1 << 64, 0x9E3779B97F4A7C15

    def slow(ids, t):
        key = 0
        for one in [*ids[:8], *ids[: t + 1]]:
            key = (key * factor + one + 1) % modulus
        return key

    rng = np.random.default_rng(0)
    ids_T = rng.integers(0, 50000, 40)
    keys_T = prefix_keys(ids_T)
    assert keys_T.view(np.uint64).tolist() == [slow(ids_T.tolist(), t) for t in range(40)]
    # A shared context of eight tokens or more has the same keys whatever follows.
    other_T = np.concatenate([ids_T[:10], ids_T[:5]])
    assert prefix_keys(other_T)[:10].tolist() == keys_T[:10].tolist()
    # The first tokens of two documents differ even if they are the same token.
    assert prefix_keys(np.r_[0, 5, 6])[0] != prefix_keys(np.r_[0, 7, 6])[0]
    assert len(prefix_keys(ids_T[:0])) == 0


def test_draws_are_uniform_and_differ_by_seed_and_layer():
    logits_TE = torch.zeros(20000, 4)
    inputs = dataclasses.replace(router_inputs(logits_TE), key_T=torch.arange(20000))
    draws = [
        uniform(inputs, 0), uniform(inputs, 1), uniform(dataclasses.replace(inputs, layer=1), 0),
    ]  # fmt: skip
    for draw_T in draws:
        assert float(draw_T.min()) >= 0
        assert float(draw_T.max()) < 1
        counts = torch.histc(draw_T, 20, 0, 1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi-squared, 19 df, p = 7e-4
    corr = np.corrcoef(torch.stack(draws).numpy())
    assert np.abs(corr - np.eye(3)).max() < 0.03
    assert torch.equal(uniform(inputs, 0), draws[0])


def test_without_keys_the_logits_stand_in(rng):
    logits_TE = torch.from_numpy(rng.standard_normal((500, 16)).astype("float32"))
    inputs = router_inputs(logits_TE)
    draw_T = uniform(inputs, 0)
    assert len(draw_T.unique()) == 500
    order_T = torch.randperm(500)
    assert torch.equal(uniform(inputs.rows(order_T), 0), draw_T[order_T])
