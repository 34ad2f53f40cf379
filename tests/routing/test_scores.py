"""Scores, candidates, what stands in for dropped experts, and thresholds on scores."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from slow_loops import HIDDEN, sample_of, simulated_outputs, simulated_toggles

from moe_routing.errors import InputError
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.scores import ExpertScorer, scored_sample
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.types import RouterInputs
from moe_routing.routing.weighting import Router, weigh
from moe_routing.vocabulary import EXPERT_SCORES

EXPERTS, TOP_K = 16, 4
RULES = [ModelRule(TOP_K, "softmax"), ModelRule(TOP_K, "renormalised")]
COUNTED = ["minp_k8_t010", "topp_k8_p050", "entropy_k8", "adaptive_k8", "dynskip_k8_q050"]


@pytest.fixture(params=RULES, ids=lambda rule: rule.weighting)
def rule(request):
    return request.param


@pytest.fixture
def calibration(rng, rule):
    logits_LTE = 1.5 * rng.standard_normal((2, 400, EXPERTS))
    sample = dataclasses.replace(sample_of(logits_LTE, TOP_K, rng), rule=rule)
    kl_LTE = 0.03 * np.exp(rng.normal(0, 1, logits_LTE.shape))
    strata = ((0, 8, 8), (8, 16, 8))
    toggles = simulated_toggles(logits_LTE, kl_LTE, rng, strata=strata, weighting=rule.weighting)
    norm_LTE, deviation_LTE = 1 + torch.from_numpy(rng.random((2, *logits_LTE.shape), np.float32))
    toggles = dataclasses.replace(
        toggles,
        rule=rule,
        hidden_LTH=torch.from_numpy(rng.standard_normal((2, 400, HIDDEN), np.float32)),
        norm_LTE=norm_LTE,
        deviation_LTE=deviation_LTE,
        compensated_kl_P=toggles.kl_P / 2,
    )
    return Calibration(sample, {}, toggles, simulated_outputs(sample, rng))


@pytest.fixture
def inputs(rng):
    logits_TE = torch.from_numpy(1.5 * rng.standard_normal((60, EXPERTS))).float()
    logits_TE[::3] = logits_TE[::3].round()  # ties
    logits_TE[1::4, ::5] = -math.inf
    hidden_TH = torch.from_numpy(rng.standard_normal((60, HIDDEN), np.float32))
    exact_TE = 1 + torch.from_numpy(rng.random((60, EXPERTS), np.float32))
    return RouterInputs(1, logits_TE, hidden_TH, log_size_TE=None), exact_TE


def slow_weights(logits_E, rule):
    """The model's own weights of all experts, and its own choice."""
    exponential = [math.exp(logit) for logit in logits_E]
    probability = [value / sum(exponential) for value in exponential]
    own = sorted(range(len(probability)), key=lambda e: (-probability[e], e))[: rule.top_k]
    mass = sum(probability[e] for e in own) if rule.weighting == "renormalised" else 1.0
    return [value / mass for value in probability], own


def slow_log_size(score, compensated, outputs, layer, hidden_H, expert, exact):
    if score == "exact_norm":
        return math.log(exact)
    if score == "mean_norm":
        table = outputs.log_mean_deviation_LE if compensated else outputs.log_mean_norm_LE
        return float(table[layer, expert])
    slope = outputs.deviation_slope_LEH if compensated else outputs.slope_LEH
    offset = outputs.deviation_offset_LE if compensated else outputs.offset_LE
    terms = (float(a) * float(x) for a, x in zip(slope[layer, expert], hidden_H, strict=True))
    return sum(terms) + float(offset[layer, expert])


def slow_constant(toggles, layer, compensated):
    effects = (toggles.compensated_kl_P if compensated else toggles.kl_P).tolist()
    norms = (toggles.deviation_LTE if compensated else toggles.norm_LTE)[layer].tolist()
    pairs = zip(
        effects, toggles.layer_P.tolist(), toggles.token_P.tolist(), toggles.expert_P.tolist(),
        toggles.rank_P.tolist(), toggles.weight_P.tolist(), strict=True,
    )  # fmt: skip
    ratios = [
        math.log(kl / (weight * norms[token][expert]) ** 2)
        for kl, at, token, expert, rank, weight in pairs
        if at == layer and rank < toggles.rule.top_k and kl > 0
    ]
    return math.exp(sum(ratios) / len(ratios))


@pytest.mark.parametrize("dropped", ["", "_compensated"])
@pytest.mark.parametrize("score", EXPERT_SCORES[1:])
def test_scores_equal_a_loop_over_tokens_and_experts(calibration, inputs, rule, score, dropped):
    given, exact_TE = inputs
    if score == "exact_norm":
        given = dataclasses.replace(given, log_size_TE=exact_TE.log())
    strategy = parse_strategy(f"regular_k3_{score.replace('_', '-')}{dropped}")
    scorer = ExpertScorer.of(strategy, calibration)
    score_TE = scorer(dataclasses.replace(given, rule=rule)).score_TE
    assert score_TE.dtype == torch.float32
    constant = slow_constant(calibration.toggles, 1, bool(dropped))
    for token in range(60):
        weights, _ = slow_weights(given.logits_TE[token].tolist(), rule)
        for expert in range(EXPERTS):
            if weights[expert] == 0:
                assert score_TE[token, expert] == -math.inf
                continue
            value = math.log(weights[expert]) + slow_log_size(
                score, bool(dropped), calibration.outputs, 1, given.hidden_TH[token], expert,
                float(exact_TE[token, expert]),
            )  # fmt: skip
            if score == "consequence":
                value = math.log(constant) + 2 * value
            assert float(score_TE[token, expert]) == pytest.approx(value, abs=1e-5)


def test_the_constants_equal_a_loop_over_pairs(calibration):
    constants = calibration.toggles.consequence_constants
    for compensated, constant_L in enumerate(constants):
        assert constant_L.dtype == torch.float64
        slow = [slow_constant(calibration.toggles, layer, compensated) for layer in range(2)]
        np.testing.assert_allclose(constant_L, slow, rtol=1e-6)
    none = dataclasses.replace(calibration.toggles, kl_P=0 * calibration.toggles.kl_P)
    with pytest.raises(InputError, match="no removal in layer 0 changes the prediction"):
        _ = none.consequence_constants


def test_sample_and_toggles_are_scored_like_live_tokens(calibration, rule):
    sample, outputs, toggles = calibration.sample, calibration.outputs, calibration.toggles
    strategy = parse_strategy("regular_k3_consequence")
    scorer = ExpertScorer.of(strategy, calibration)
    live = RouterInputs(1, sample.logits_LTE[1], toggles.hidden_LTH[1], rule=rule)
    live_TE = scorer(live).score_TE
    torch.testing.assert_close(scorer.of_toggles(toggles, 1), live_TE, rtol=0, atol=1e-5)
    predicted_TE = toggles.hidden_LTH[1] @ outputs.slope_LEH[1].T + outputs.offset_LE[1]
    as_live_LTE = torch.stack([torch.zeros_like(predicted_TE), predicted_TE])
    seen = dataclasses.replace(
        calibration, outputs=dataclasses.replace(outputs, sample_log_norm_LTE=as_live_LTE)
    )
    sampled_TE = scored_sample(strategy, seen)[1].score_TE
    torch.testing.assert_close(sampled_TE, live_TE, rtol=0, atol=1e-5)
    compensated = scored_sample(parse_strategy("regular_k3_norm_compensated"), seen)[1].score_TE
    weight_TE = dataclasses.replace(live, log_size_TE=None).own_weight_TE
    expected_TE = weight_TE.log() + outputs.sample_log_deviation_LTE[1]
    torch.testing.assert_close(compensated, expected_TE, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="'exact-norm' needs the outputs of all experts"):
        scored_sample(parse_strategy("regular_k3_exact-norm"), seen)


def on_stock_states(strategy, calibration):
    """Return a strategy with the value that keeps its budget on the calibration sample."""
    return strategy.at(strategy.on_sample(calibration, EXPERTS)([strategy.budget]))


def route(name, calibration, rule, given):
    strategy = parse_strategy(name).fitted(calibration)
    select = strategy.selector(calibration, EXPERTS)
    kind = strategy.resolved(rule).weighting_kind
    compensated = strategy.dropped == "compensated"
    scorer, scale = ExpertScorer.of(strategy, calibration), strategy.output_scale(calibration)
    return Router(select, kind, rule, scorer, compensated, scale)(given)


@pytest.mark.parametrize("name", COUNTED)
def test_rules_that_count_by_probability_keep_their_count(calibration, inputs, rule, name):
    given, _ = inputs
    plain = route(name, calibration, rule, given).selection
    scored = route(f"{name}_norm", calibration, rule, given)
    assert torch.equal(scored.selection.count_T, plain.count_T)
    moved = 0
    for token, count in enumerate(plain.count_T.tolist()):
        score = scored.score_TE[token].tolist()
        order = sorted(range(EXPERTS), key=lambda e: (-score[e], e))
        assert scored.selection.index_TK[token, :count].tolist() == order[:count]
        moved += order[:count] != plain.index_TK[token, :count].tolist()
    assert moved > 10


@pytest.mark.parametrize(
    "name",
    [*COUNTED, "regular_k3", "regular_k8", "perlayer_k3", "absolute_k8_t005",
        "randomid.minp_k8_t010"],
)  # fmt: skip
@pytest.mark.parametrize("score", ["", "_norm"])
def test_own_candidates_are_those_of_the_model_s_own_choice(calibration, inputs, rule, name, score):
    given, _ = inputs
    head, dot, base = name.partition(".")
    own = head + dot + base + score + ("" if "absolute" in name else "_own")
    selection = route(own, calibration, rule, given).selection
    for token in range(60):
        _, choice = slow_weights(given.logits_TE[token].tolist(), rule)
        ties = sorted(given.logits_TE[token].tolist(), reverse=True)
        chosen = set(selection.index_TK[token].tolist()) - {EXPERTS}
        if ties[TOP_K - 1] != ties[TOP_K]:
            assert chosen <= set(choice)
        if name == "regular_k8":
            assert len(chosen) == TOP_K


@pytest.mark.parametrize("score", ["", "_norm"])
@pytest.mark.parametrize("candidates", ["", "_own"])
def test_compensation_equals_a_loop(calibration, inputs, rule, score, candidates):
    given, _ = inputs
    name = f"stock_k2{score}{candidates}_compensated"
    strategy = parse_strategy(name).resolved(rule)
    routing = route(strategy.id, calibration, rule, given)
    probability_TE = given.logits_TE.softmax(-1)
    own_TK = probability_TE.topk(TOP_K).indices  # ties as in the model's router
    for token in range(60):
        weights, _ = slow_weights(given.logits_TE[token].tolist(), rule)
        kept = routing.selection.index_TK[token].tolist()
        for slot, expert in enumerate(kept):
            if expert < EXPERTS:
                weight = float(routing.weight_TK[token, slot])
                assert weight == pytest.approx(weights[expert], abs=1e-6)
        dropped = set(own_TK[token].tolist()) - set(kept)
        expected = [weights[e] if e in dropped else 0.0 for e in range(EXPERTS)]
        np.testing.assert_allclose(routing.dropped_weight_TE[token], expected, atol=1e-6)


def test_a_scale_multiplies_kept_and_dropped_weights(calibration, inputs, rule):
    given, _ = inputs
    name = "absolute_k8_t010_norm_compensated"
    plain = route(name, calibration, rule, given)
    scaled = dataclasses.replace(calibration, scales={f"{name}_scaled": 1.25})
    routing = route(f"{name}_scaled", scaled, rule, given)
    assert torch.equal(routing.selection.index_TK, plain.selection.index_TK)
    torch.testing.assert_close(routing.weight_TK, 1.25 * plain.weight_TK)
    torch.testing.assert_close(routing.dropped_weight_TE, 1.25 * plain.dropped_weight_TE)
    control = route(f"shuffle.{name}_scaled", scaled, rule, given)
    assert control.weight_TK.sum() > route(f"shuffle.{name}", scaled, rule, given).weight_TK.sum()
    with pytest.raises(InputError, match="its scale is not fitted in this calibration; fitted: no"):
        route(f"{name}_scaled", calibration, rule, given)


@pytest.mark.parametrize("words", ["", "_all", "_norm", "_norm_all", "_consequence_compensated"])
@pytest.mark.parametrize("budget", ["035", "2", "35"])
def test_a_budget_is_the_mean_on_the_calibration_sample(calibration, rule, words, budget):
    asked = parse_strategy(f"absolute_k4_b{budget}{words}")
    strategy = on_stock_states(asked, calibration)
    threshold = strategy.threshold_of(calibration)
    total = 0
    for layer, sampled in enumerate(scored_sample(strategy, calibration)):
        selection = strategy.selector(calibration, EXPERTS)(sampled, sampled.softmax_TE)
        total += int(selection.count_T.sum())
        for token in range(0, 400, 7):
            weights, own = slow_weights(calibration.sample.logits_LTE[layer, token].tolist(), rule)
            scores = weights if strategy.score == "probability" else sampled.score_TE[token].exp()
            among = range(EXPERTS) if strategy.candidates == "all" else own
            passing = [e for e in among if float(scores[e]) >= threshold * (1 - 1e-6)]
            passing.sort(key=lambda e: -float(scores[e]))
            chosen = selection.index_TK[token, : selection.count_T[token]].tolist()
            assert chosen == passing[:4]
    assert total == round(asked.budget * 800)
    given = parse_strategy("absolute_k4_t01" + words)
    assert given.threshold_of(None) == 0.1


def test_a_token_may_have_no_expert(calibration, inputs, rule):
    given, _ = inputs
    routing = route("absolute_k4_t9", calibration, rule, given)
    assert (routing.selection.count_T == 0).all()
    assert (routing.selection.index_TK == EXPERTS).all()
    assert routing.selection.index_TK.shape == (60, 1)
    assert (routing.weight_TK == 0).all()


def test_a_budget_above_what_the_model_chooses_is_refused(calibration):
    strategy = parse_strategy("absolute_k8_b5")
    with pytest.raises(InputError, match=r"absolute_k8_b5': budget is 5 .* at most the 4 candidat"):
        on_stock_states(strategy, calibration)


def test_certified_routing_has_the_threshold_of_its_certificate(calibration, inputs, rule):
    given, _ = inputs
    name = "certified_k4_m001_probability"
    with pytest.raises(InputError, match=f"'{name}' has no certificate .* margin = 0.01 to cert"):
        route(name, calibration, rule, given)
    certificate = SimpleNamespace(threshold=0.2, fingerprint="all weights")
    certified = dataclasses.replace(calibration, certificates={name: certificate})
    routing = route(name, certified, rule, given)
    other = route("absolute_k4_t02_compensated", calibration, rule, given)
    assert torch.equal(routing.selection.index_TK, other.selection.index_TK)
    assert torch.equal(routing.dropped_weight_TE, other.dropped_weight_TE)


@pytest.mark.parametrize(
    ("name", "without", "line"),
    [
        ("regular_k3_norm", "outputs", "score 'norm' needs the outputs of the experts"),
        ("minp_k3_t010_mean-norm", "outputs", "score 'mean-norm' needs the outputs"),
        ("regular_k3_consequence", "toggles", "k3_consequence': score 'consequence' needs"),
    ],
)  # fmt: skip
def test_what_a_score_lacks_is_said_in_one_line(calibration, name, without, line):
    lacking = dataclasses.replace(calibration, **{without: None})
    with pytest.raises(InputError, match=line):
        ExpertScorer.of(parse_strategy(name), lacking)


def test_the_square_root_of_the_mass_factor(inputs, rule, calibration):
    given, _ = inputs
    routing = route("minp_k8_t030", calibration, rule, given)
    selection, probability_TE = routing.selection, routing.probability_TE
    own_TK, full_TK, half_TK = (
        weigh(kind, probability_TE, selection, rule)
        for kind in ("softmax", "mass_matched", "sqrt_mass_matched")
    )
    if rule.weighting == "renormalised":
        own_TK = own_TK / probability_TE.topk(TOP_K).values.sum(1, keepdim=True)
    kept_TK = own_TK > 0
    factor_n, half_n = (full_TK / own_TK)[kept_TK], (half_TK / own_TK)[kept_TK]
    torch.testing.assert_close(half_n, factor_n.sqrt())
    assert (factor_n > 1.01).any()


def test_scores_are_moved_to_the_device_once(calibration):
    scorer = ExpertScorer.of(parse_strategy("regular_k3_consequence"), calibration)
    assert scorer.to("cpu") is scorer
    moved = scorer.to("meta")
    assert moved.slope_LEH.is_meta
    assert moved.offset_LE.is_meta
    assert moved.log_constant_L.is_meta
