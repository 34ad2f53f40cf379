from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_loops import HIDDEN, router_inputs, sample_of, slow_selection

from moe_routing.errors import InputError
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.procedures import bh_levels
from moe_routing.routing.ranking import BLOCK
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import Ranked, families, parse_strategy
from moe_routing.routing.strategies.controls import EqualBudget
from moe_routing.routing.strategies.testing import BH, MultipleTesting
from moe_routing.routing.weighting import Router

IDS = [
    "adaptive_k{k}",
    "minp_k{k}_t010",
    "topp_k{k}_p050",
    "entropy_k{k}",
    "perlayer_k{half}",
    "dynskip_k{k}_q050",
    "bh_k{k}_a005",
    "bh_k{k}_a010_m2",
    "bh_k{k}_a010_m2_within-token",
    *(f"bh_k{{k}}_a005_{name.replace('_', '-')}" for name in NULLS),
    "by_k{k}_a010_pooled",
    "ebh_k{k}_a050",
    "ebh_k{k}_a050_within-token",
    "ebh_k{k}_a050_random-direction",
    "storey_k{k}_a010",
    "storey_k{k}_a010_within-token",
    "storey_k{k}_a010_per-expert",
    "hc_k{k}_a010_pooled",
    "threshold_k{k}_a0125_per-expert",
    "threshold_k{k}_a010",
    "threshold_k{k}_a010_within-token",
    "absolute_k{k}_t005_all",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def token_logits(draw: st.DrawFn) -> torch.Tensor:
    """Any number of tokens and experts, any dtype, with ties, masked experts, equal logits."""
    tokens, experts = draw(st.integers(0, 5)), draw(st.sampled_from([1, 2, 3, 8, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits_TE = rng.standard_normal((tokens, experts)) * draw(
        st.sampled_from([0.0, 0.5, 2.0, 20.0])
    )
    logits_TE += draw(st.sampled_from([0.0, 3.0])) * (rng.random((tokens, experts)) < 0.2)
    if draw(st.booleans()):
        logits_TE = logits_TE.round()
    masked_TE = rng.random((tokens, experts)) < draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    masked_TE[np.arange(tokens), rng.integers(experts, size=tokens)] = False
    logits_TE[masked_TE] = -math.inf
    return torch.from_numpy(logits_TE).to(draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("template", IDS)
@given(logits_TE=token_logits(), cap=st.sampled_from([2, 3, 8, 16, 64]), layer=st.integers(0, 1))
@settings(max_examples=25)
def test_every_strategy_equals_a_loop_over_tokens(calibration_of, template, logits_TE, cap, layer):
    experts = logits_TE.shape[1]
    k = min(cap, experts)
    if k == 1 and template.startswith(("dynskip", "bh_k{k}_a010_m2")):
        return  # these ask for two experts at least
    strategy = parse_strategy(template.format(k=k, half=max(1, k // 2)))
    calibration = calibration_of(experts)
    if strategy.needs_null not in (None, *calibration.nulls):
        return
    inputs = router_inputs(logits_TE, layer)
    router = Router(
        strategy.selector(calibration, experts), strategy.weighting_kind, ModelRule(1, "softmax")
    )
    selection = router(inputs).selection
    slow = slow_selection(strategy, calibration, inputs)
    assert selection.rejected_T.tolist() == [rejected for _, rejected in slow]
    assert selection.count_T.tolist() == [len(chosen) for chosen, _ in slow]
    for index_K, (chosen, _) in zip(selection.index_TK.tolist(), slow, strict=True):
        assert index_K == chosen + [experts] * (len(index_K) - len(chosen))


def test_the_loops_cover_every_family():
    covered = {template.split("_")[0] for template in IDS}
    fixed = {"regular", "normalized", "uniform", "stock"}
    # See test_scores and test_equal_budgets.
    assert covered == set(families()) - fixed - {"certified", "layered", "mixture"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 8, 64])
def test_regular_is_the_stock_router_to_the_bit(rng, k, dtype):
    logits_TE = torch.from_numpy(rng.standard_normal((500, 64))).to(dtype)
    weight_TK, index_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(k, dim=-1)
    strategy = parse_strategy(f"regular_k{k}")
    routing = Router(strategy.selector(None, 64), strategy.weighting_kind, ModelRule(8, "softmax"))(
        router_inputs(logits_TE)
    )
    assert torch.equal(routing.selection.index_TK, index_TK)
    assert torch.equal(routing.weight_TK, weight_TK)


@pytest.mark.parametrize("null", [name for name in NULLS if NULLS[name].layer_monotone])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_critical_values_select_as_p_values_do(rng, calibration_of, null, dtype, masked):
    calibration = calibration_of(64)
    logits_TE = 2 * torch.from_numpy(rng.standard_normal((2000, 64)))
    logits_TE[rng.random((2000, 64)) < masked] = -math.inf
    inputs = router_inputs(logits_TE.to(dtype), layer=1)
    probability_TE = inputs.logits_TE.float().softmax(-1)
    for alpha, min_k, max_k in ((0.01, 1, 16), (0.05, 3, 16), (0.1, 1, 8), (0.5, 1, 64)):
        strategy = BH(max_k=max_k, min_k=min_k, alpha=alpha, null=null)
        fast = strategy.ranker(calibration, 64)(inputs, probability_TE)
        slow = MultipleTesting.ranker(strategy, calibration, 64)(inputs, probability_TE)
        assert torch.equal(fast.rejected_T, slow.rejected_T)
        assert torch.equal(fast.count_T, slow.count_T)
        assert torch.equal(fast.order_TK, slow.order_TK)


def test_equal_statistics_of_different_logits_are_settled_by_the_logit(calibration_of):
    # Experts 1 and 2 are equally aligned; the longer vector has the larger logit.
    logits_TE = torch.zeros(100, 64)
    logits_TE[:, 1:5] = torch.tensor([200.0, 400.0, -200.0, -400.0])
    row_E = (-1.0) ** torch.arange(64)
    row_E[1:5] = torch.tensor([1.0, 2.0, -1.0, -2.0])
    weight_EH = row_E[:, None] * torch.ones(HIDDEN)
    inputs = dataclasses.replace(router_inputs(logits_TE), weight_EH=weight_EH)
    strategy = parse_strategy("bh_k8_a005_random-direction")
    selection = strategy.selector(calibration_of(64), 64)(inputs, logits_TE.softmax(-1))
    assert (selection.index_TK[:, :2] == torch.tensor([2, 1])).all()


@pytest.mark.parametrize("null", ["pooled", "pooled_kde"])
def test_a_logit_at_the_critical_value_is_selected(calibration_of, null):
    calibration = calibration_of(64)
    critical_E = calibration.null(null).critical_values(0, bh_levels(64, 0.05))
    # One token for each i: i logits at the i-th critical value, the others far below.
    at_TE = torch.where(torch.arange(64) <= torch.arange(64)[:, None], critical_E[:, None], -50.0)
    below_TE = torch.nextafter(at_TE, torch.tensor(-math.inf))
    strategy = BH(max_k=64, alpha=0.05, null=null)
    select = strategy.selector(calibration, 64)
    at = select(router_inputs(at_TE), at_TE.softmax(-1)).rejected_T
    below = select(router_inputs(below_TE), below_TE.softmax(-1)).rejected_T
    assert at.tolist() == list(range(1, 65))
    assert (below == 0).all()


def test_tokens_beyond_one_block_are_routed_as_within(rng, calibration_of):
    tokens = 2 * (BLOCK // 64) + 77
    inputs = router_inputs(torch.from_numpy(rng.standard_normal((tokens, 64))).float())
    for name in ("bh_k16_a010", "bh_k16_a050", "bh_k16_a010_random-direction", "topp_k16_p050"):
        strategy = parse_strategy(name)
        rank = strategy.ranker(calibration_of(64), 64)
        probability_TE = inputs.logits_TE.softmax(-1)
        whole = rank(inputs, probability_TE)
        blocked = strategy.selector(calibration_of(64), 64)(inputs, probability_TE)
        assert torch.equal(blocked.count_T, whole.count_T)
        assert torch.equal(blocked.rejected_T, whole.rejected_T)
        cut_TK = whole.order_TK[:, : blocked.index_TK.shape[1]]
        kept_TK = blocked.index_TK < 64
        assert torch.equal(blocked.index_TK[kept_TK], cut_TK[kept_TK])


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all masked"])
@pytest.mark.parametrize("name", ["regular_k8", "bh_k8_a005", "minp_k8_t010"])
def test_logits_that_are_not_finite_are_refused_in_one_line(calibration_of, name, bad):
    logits_TE = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    logits_TE[2, 60 if bad != "all masked" else slice(None)] = (
        -math.inf if bad == "all masked" else bad
    )
    strategy = parse_strategy(name)
    router = Router(
        strategy.selector(calibration_of(64), 64), strategy.weighting_kind, ModelRule(8, "softmax")
    )
    with pytest.raises(InputError, match="router logits of layer 1 are not finite") as error:
        router(router_inputs(logits_TE, layer=1))
    assert "\n" not in str(error.value)


def test_too_few_calibration_tokens_are_refused_before_any_routing(calibration_of):
    sample = calibration_of(64).sample
    few = Calibration(sample, {"per_expert": NULLS["per_expert"].fit(sample)})
    parse_strategy("bh_k8_a002_per-expert").selector(few, 64)  # 3,200 draws for 64 / 0.02
    with pytest.raises(InputError) as error:
        parse_strategy("bh_k8_a001_per-expert").selector(few, 64)
    assert str(error.value) == (
        "strategy 'bh_k8_a001_per-expert': null 'per_expert' has 3200 calibration draws; allowed: "
        "at least 6400, so that a p-value can reach its smallest level 0.000156 (raise "
        "calibration.tokens)"
    )
    with pytest.raises(InputError, match="null 'pooled' is not fitted; fitted: per_expert"):
        parse_strategy("bh_k8_a005_pooled").selector(few, 64)


def test_adaptive_rules_spread_counts_as_documented(calibration_of):
    calibration = calibration_of(64)
    inputs = router_inputs(calibration.sample.logits_LTE[0])
    probability_TE = inputs.logits_TE.softmax(-1)
    for name in ("adaptive_k8", "entropy_k8"):
        select = parse_strategy(name).selector(calibration, 64)
        proportion_C = torch.bincount(select(inputs, probability_TE).count_T, minlength=9) / 3200
        np.testing.assert_allclose(proportion_C[4:], 0.2, atol=0.005)
    select = parse_strategy("dynskip_k8_q050").selector(calibration, 64)
    assert float(select(inputs, probability_TE).count_T.double().mean()) == pytest.approx(
        1 + 7 / 2, abs=0.01
    )
    strategy = parse_strategy("perlayer_k6")
    assert sum(strategy.allocation(calibration)) == 2 * 6


@pytest.mark.parametrize(
    ("name", "count"),
    [("minp_k3_t050", 1), ("minp_k3_t049", 3), ("topp_k3_p050", 1), ("topp_k3_p051", 2)],
)
def test_rivals_at_their_own_boundary(name, count):
    probability_TE = torch.tensor([[0.5, 0.25, 0.25]])
    select = parse_strategy(name).selector(None, 3)
    assert int(select(router_inputs(probability_TE.log()), probability_TE).count_T) == count


def test_dynamic_skipping_keeps_an_expert_at_the_ratio():
    level = Calibration(sample_of(np.zeros((1, 50, 4)), top_k=1))
    select = parse_strategy("dynskip_k3_q050").selector(level, 4)
    assert int(select(router_inputs(torch.zeros(1, 4)), torch.full((1, 4), 0.25)).count_T) == 3


def test_entropy_and_confidence_move_the_count_the_right_way(calibration_of):
    flat, peaked = torch.zeros(1, 64), torch.zeros(1, 64)
    peaked[0, 3] = 20
    for name in ("adaptive_k8", "entropy_k8", "topp_k8_p090", "minp_k8_t010", "dynskip_k8_q050"):
        select = parse_strategy(name).selector(calibration_of(64), 64)
        few, many = (int(select(router_inputs(x), x.softmax(-1)).count_T) for x in (peaked, flat))
        assert few < many == 8


def test_ranked_strategies_are_all_but_the_fixed_ones():
    fixed = [name for name, cls in families().items() if not issubclass(cls, Ranked)]
    assert fixed == ["regular", "normalized", "uniform", "stock", "mixture"]


@pytest.mark.parametrize("template", [*IDS, "regular_k{k}", "mixture_b25", "counts.bh_k{k}_a005"])
def test_no_strategy_waits_for_the_device(calibration_of, template):
    # Tensors of the meta device have no values: asking for one on the host raises.
    calibration = calibration_of(64)
    strategy = parse_strategy(template.format(k=8, half=4))
    if isinstance(strategy, EqualBudget):
        strategy = strategy.like([[0, 3, 1], [0, 1, 1]])
    router = Router(
        strategy.selector(calibration, 64), strategy.weighting_kind, ModelRule(8, "softmax")
    )
    inputs = router_inputs(torch.randn(30, 64, generator=torch.Generator().manual_seed(0)))
    on_meta = dataclasses.replace(
        inputs,
        logits_TE=inputs.logits_TE.to("meta"),
        hidden_TH=inputs.hidden_TH.to("meta"),
        weight_EH=inputs.weight_EH.to("meta"),
    )
    routing = router(on_meta)
    assert routing.selection.index_TK.is_meta
    assert routing.weight_TK.shape[0] == 30
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(routing.selection.count_T.sum() > 0)
