"""The null ``needed``: exact p-values, validity on average, ids, files, errors."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_loops import (
    STRATA,
    THIRDS,
    count_bh,
    even_outputs,
    router_inputs,
    sample_of,
    simulated_toggles,
    slow_selection,
)

from moe_routing.engine.adapters import model_fingerprint
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.routing.calibration import (
    OUTPUTS_FILE,
    SAMPLE_FILE,
    TOGGLES_FILE,
    Calibration,
    null_path,
)
from moe_routing.routing.nulls import diagnose, fit_null, load_null, save_null
from moe_routing.routing.nulls.base import Null
from moe_routing.routing.nulls.needed import Needed, default_epsilon, not_needed
from moe_routing.routing.nulls.step_up import StepUpTest
from moe_routing.routing.procedures import STOREY_LAMBDA, bh_levels
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.strategies.testing import MultipleTesting
from moe_routing.routing.toggles import Toggles
from moe_routing.vocabulary import NeededId, hypothesis, is_null

EPSILON = 1e-4


def tokens_and_effects(
    tokens: int, rng: np.random.Generator, *, layers: int = 2, experts: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and a KL that follows the squared probability, each token with its sensitivity."""
    logits_LTE = 1.5 * rng.standard_normal((layers, tokens, experts)).astype(np.float32)
    probability_LTE = np.exp(logits_LTE) / np.exp(logits_LTE).sum(-1, keepdims=True)
    noise_LTE = rng.normal(0, 1, (layers, tokens, 1)) + rng.normal(0, 1, logits_LTE.shape)
    return logits_LTE, 0.03 * probability_LTE**2 * np.exp(noise_LTE)


def calibrated(
    tokens: int, rng: np.random.Generator, *, null_id: str = "needed_e1e4", **sizes: int
) -> tuple[CalibrationSample, Toggles, Needed]:
    logits_LTE, kl_LTE = tokens_and_effects(tokens, rng, **sizes)
    sample, toggles = sample_of(logits_LTE), simulated_toggles(logits_LTE, kl_LTE, rng)
    null = fit_null(null_id, sample, toggles)
    assert isinstance(null, Needed)
    return sample, toggles, null


def exact_p(toggles: Toggles, layer: int, statistic: float, rank: int) -> Fraction:
    """The p-value by its definition, in rational numbers."""
    if statistic == -math.inf:
        return Fraction(1)
    own = Fraction(float(toggles.rank_weight_E[rank]))
    above, total = own, own
    for here, weight, probability, kl in zip(
        toggles.layer_P.tolist(),
        toggles.sampling_weight_P.tolist(),
        toggles.weight_P.tolist(),
        toggles.kl_P.tolist(),
        strict=True,
    ):
        if here == layer:
            total += Fraction(weight)
            above += Fraction(weight) * (kl < EPSILON and probability >= statistic)
    return above / total


def test_p_values_are_the_exact_ones_rounded_up(rng):
    _, toggles, null = calibrated(6, rng)
    logits_TE = torch.from_numpy(tokens_and_effects(4, rng)[0][1])
    logits_TE[2, 5:30] = -math.inf
    logits_TE[3, 7] = logits_TE[3, 8]
    # The probability of a calibration pair counts that pair.
    of_pair = toggles.weight_P[(toggles.layer_P == 1) & (toggles.kl_P < EPSILON)].max()
    assert null.survival(1, of_pair[None, None]) > null.survival(1, of_pair[None, None] * 1.001)
    inputs = router_inputs(logits_TE, layer=1)
    p_TE, order_TE = null.sorted_p_values(inputs)
    assert p_TE.dtype == torch.float32
    assert torch.equal(null.p_values(inputs).gather(1, order_TE), p_TE)
    statistic_TE = null.statistic(inputs).gather(1, order_TE)
    for p_E, statistic_E in zip(p_TE, statistic_TE, strict=True):
        below_E = torch.nextafter(p_E, torch.tensor(0.0)).tolist()
        for rank, (p, below) in enumerate(zip(p_E.tolist(), below_E, strict=True)):
            exact = exact_p(toggles, 1, float(statistic_E[rank]), rank)
            assert below < exact <= p


def test_p_rises_with_the_rank_and_falls_with_the_probability(rng):
    *_, null = calibrated(50, rng)
    p_TE, _ = null.sorted_p_values(
        router_inputs(torch.from_numpy(tokens_and_effects(99, rng)[0][0]))
    )
    assert (p_TE.diff(dim=1) >= 0).all()
    at_one_value = null.survival(0, torch.full((1, 64), 0.05))
    assert (at_one_value.diff(dim=1) >= 0).all()
    assert at_one_value[0, 63] > at_one_value[0, 0]
    rising_N1 = torch.linspace(0, 1, 500)[:, None]
    assert (null.survival(0, rising_N1).diff(dim=0) <= 0).all()


@st.composite
def cases(draw: st.DrawFn):
    """A calibration with ties and uneven weights, tokens with ties and masks, and a strategy.

    Of a model with raw softmax weights, or of one that renormalises those of its own 8 experts.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts = draw(st.sampled_from([1, 7, 32, 64]))
    decimals = draw(st.sampled_from([0, 1, 6]))
    logits_LTE, kl_LTE = tokens_and_effects(40, rng, experts=experts)
    kl_LTE *= draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e9]))
    strata = draw(st.sampled_from([STRATA, THIRDS]))
    weighting = draw(st.sampled_from(["softmax", "renormalised"]))
    toggles = simulated_toggles(
        logits_LTE.round(decimals), kl_LTE, rng, strata=strata, weighting=weighting
    )
    sample = sample_of(logits_LTE, top_k=1)
    effect = draw(st.sampled_from(["", "_loss"]))
    null = fit_null(f"needed_e1e4{effect}", sample, toggles)
    logits_TE = 3 * torch.from_numpy(rng.standard_normal((60, experts)))
    logits_TE[rng.random((60, experts)) < draw(st.sampled_from([0.0, 0.3]))] = -math.inf
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    inputs = router_inputs(logits_TE.round(decimals=decimals).to(dtype), layer=1)
    inputs = dataclasses.replace(inputs, rule=toggles.rule)
    family = draw(st.sampled_from(["bh", "by", "ebh", "threshold"]))
    alpha = draw(st.sampled_from(["020", "050", "090", "099"]))
    strategy = parse_strategy(f"{family}_k{experts}_a{alpha}_needed-e1e4{effect.replace('_', '-')}")
    return strategy, Calibration(sample, {null.id: null}, toggles), inputs


@given(cases())
def test_critical_values_select_as_p_values_do(case):
    strategy, calibration, inputs = case
    experts = inputs.logits_TE.shape[1]
    null = calibration.null(strategy.null)
    if not null.attains(strategy.smallest_level(experts)):
        return
    probability_TE = inputs.logits_TE.float().softmax(-1)
    fast = strategy.ranker(calibration, experts)(inputs, probability_TE)
    slow = MultipleTesting.ranker(strategy, calibration, experts)(inputs, probability_TE)
    assert torch.equal(fast.rejected_T, slow.rejected_T)
    assert torch.equal(fast.count_T, slow.count_T)
    assert torch.equal(fast.order_TK, slow.order_TK)


@pytest.mark.parametrize(
    ("weighting", "bounded"), [("softmax", ["001", "005", "020"]), ("renormalised", ["001"])]
)
def test_no_token_rejects_more_ranks_than_are_looked_at(rng, weighting, bounded):
    """Tokens with equal weights of their first r experts have the largest r-th ones."""
    logits_LTE, kl_LTE = tokens_and_effects(300, rng)
    toggles = simulated_toggles(logits_LTE, kl_LTE / 10, rng, weighting=weighting)
    sample = sample_of(logits_LTE)
    null = fit_null("needed_e1e4", sample, toggles)
    calibration = Calibration(sample, {null.id: null}, toggles)
    flat_TE = -20 * torch.ones(64, 64).triu(1)
    logits_TE = torch.cat([flat_TE, torch.from_numpy(1.5 * logits_LTE[0])])
    inputs = dataclasses.replace(router_inputs(logits_TE, layer=1), rule=toggles.rule)
    probability_TE = logits_TE.softmax(-1)
    own_T1 = probability_TE.topk(8).values.sum(1, keepdim=True)
    weight_TE = probability_TE if weighting == "softmax" else probability_TE / own_T1
    torch.testing.assert_close(null.statistic(inputs), weight_TE)
    for alpha in ("001", "005", "020", "050", "090"):
        strategy = parse_strategy(f"bh_k64_a{alpha}_needed-e1e4")
        looked_at = StepUpTest.build(null, bh_levels(64, strategy.alpha), 2).critical_LN.shape[1]
        assert (looked_at < 64) == (alpha in bounded)
        fast = strategy.ranker(calibration, 64)(inputs, probability_TE)
        slow = MultipleTesting.ranker(strategy, calibration, 64)(inputs, probability_TE)
        assert torch.equal(fast.rejected_T, slow.rejected_T)
        assert torch.equal(fast.order_TK, slow.order_TK)
        assert 0 < int(slow.rejected_T.max()) <= looked_at


@pytest.mark.parametrize("family", ["bh", "by", "ebh", "storey", "hc", "threshold"])
def test_every_procedure_selects_as_a_slow_loop_does(rng, family):
    sample, toggles, null = calibrated(1300, rng)
    calibration = Calibration(sample, {null.id: null}, toggles)
    inputs = router_inputs(torch.from_numpy(2 * tokens_and_effects(60, rng)[0][0]))
    strategy = parse_strategy(f"{family}_k16_a010_needed-e1e4")
    selection = strategy.selector(calibration, 64)(inputs, inputs.logits_TE.softmax(-1))
    chosen = slow_selection(strategy, calibration, inputs)
    assert selection.rejected_T.tolist() == [rejected for _, rejected in chosen]
    assert len(selection.rejected_T.unique()) > 2
    for index_K, count, (experts, _) in zip(
        selection.index_TK.tolist(), selection.count_T.tolist(), chosen, strict=True
    ):
        assert index_K[:count] == experts


# Validity


def test_p_values_are_valid_on_average_over_all_experts(rng):
    """The sum over experts of P(H0 and p <= t) is at most E t, and near it."""
    *_, null = calibrated(3000, rng)
    logits_LTE, kl_LTE = tokens_and_effects(3000, rng)
    for layer in range(2):
        p_TE = null.p_values(router_inputs(torch.from_numpy(logits_LTE[layer]), layer)).numpy()
        null_TE = kl_LTE[layer] < EPSILON
        assert 0.6 < null_TE.mean() < 0.98
        for level in (0.001, 0.005, 0.02, 0.1, 0.5):
            found_T = ((p_TE <= level) & null_TE).sum(1)
            error = found_T.std() / math.sqrt(found_T.size)
            # Both samples have 3,000 tokens, and so the same error.
            assert abs(found_T.mean() - 64 * level) < 4 * math.sqrt(2) * error + 64 / 3000 * 0.02


def test_given_h0_conditional_p_values_are_uniform(rng):
    *_, null = calibrated(3000, rng)
    logits_LTE, kl_LTE = tokens_and_effects(2000, rng)
    inputs = router_inputs(torch.from_numpy(logits_LTE[0]))
    p = null.conditional().p_values(inputs).numpy()[kl_LTE[0] < EPSILON]
    for level in (0.01, 0.1, 0.5, 0.9):
        assert (p <= level).mean() == pytest.approx(level, rel=0.1)
    assert (null.p_values(inputs).numpy() <= null.conditional().p_values(inputs).numpy()).all()


def test_storey_counts_the_true_nulls_once(rng):
    """A quarter of the experts is needed, and has larger probabilities than all others."""
    layers, tokens = 1, 1500
    logits_LTE = rng.uniform(-1, 1, (layers, tokens, 64)).astype(np.float32)
    needed_LTE = rng.random(logits_LTE.shape) < 0.25
    logits_LTE[needed_LTE] += 6
    toggles = simulated_toggles(logits_LTE, needed_LTE.astype(float), rng)
    null = fit_null("needed_e1e4", sample_of(logits_LTE), toggles)
    inputs = router_inputs(torch.from_numpy(logits_LTE[0]))

    def estimate(one: Needed) -> float:
        return float((one.p_values(inputs) > STOREY_LAMBDA).double().mean() / (1 - STOREY_LAMBDA))

    assert estimate(null.conditional()) == pytest.approx(0.75, abs=0.02)
    assert estimate(null) == pytest.approx(2 * (0.75 - 0.5), abs=0.03)  # pi0 is counted twice


def test_experts_without_effect_are_hardly_kept(rng):
    def with_dead(tokens: int) -> tuple[np.ndarray, np.ndarray]:
        logits_LTE, kl_LTE = tokens_and_effects(tokens, rng)
        kl_LTE[..., :8] = 0.0
        return logits_LTE, kl_LTE

    logits_LTE, kl_LTE = with_dead(2000)
    null = fit_null(
        "needed_e1e4", sample_of(logits_LTE), simulated_toggles(logits_LTE, kl_LTE, rng)
    )
    strategy = parse_strategy("bh_k64_a005_needed-e1e4")
    select = strategy.selector(Calibration(sample_of(logits_LTE), {null.id: null}), 64)
    inputs = router_inputs(torch.from_numpy(with_dead(2000)[0][0]))
    selection = select(inputs, inputs.logits_TE.softmax(-1))
    kept_TK = torch.arange(selection.index_TK.shape[1]) < selection.rejected_T[:, None]
    dead_TK = kept_TK & (selection.index_TK < 8)
    share_T = dead_TK.sum(1) / selection.rejected_T.clamp(min=1)
    assert 0.5 < selection.rejected_T.double().mean() < 5
    assert share_T.mean() <= 0.05 + 3 * share_T.std() / math.sqrt(len(share_T))


def test_bh_is_a_bound_on_the_expected_number_of_unneeded_experts(rng):
    """Its definition without p-values: the last k whose expected false experts are at most ak."""
    _, toggles, null = calibrated(100, rng)
    inputs = router_inputs(torch.from_numpy(2 * tokens_and_effects(30, rng)[0][0]))
    p_TE, order_TE = null.sorted_p_values(inputs)
    weight_P = toggles.sampling_weight_P * (toggles.kl_P < EPSILON) * (toggles.layer_P == 0)
    for p_E, g_E in zip(p_TE, inputs.logits_TE.softmax(-1).gather(1, order_TE), strict=True):
        kept = 0
        for k in range(1, 65):
            own = float(toggles.rank_weight_E[k - 1])
            above = float(weight_P[toggles.weight_P >= g_E[k - 1]].sum())
            tokens = (own + float(toggles.sampling_weight_P[toggles.layer_P == 0].sum())) / 64
            kept = k if (own + above) / tokens <= 0.1 * k else kept
        assert count_bh(p_E.tolist(), 0.1) == kept


def test_a_model_routes_by_the_null(model, tokenizer, calibration, rng):
    logits_LTE = calibration.sample.logits_LTE[:, :300].numpy()
    probability_LTE = calibration.sample.logits_LTE[:, :300].softmax(-1).numpy()
    toggles = simulated_toggles(logits_LTE, probability_LTE**2, rng)
    toggles = dataclasses.replace(toggles, fingerprint=model_fingerprint(model))
    nulls = {"needed": fit_null("needed", calibration.sample, toggles, 0.01)}
    fitted, recorder = Calibration(calibration.sample, nulls, toggles), Recorder()
    text = tokenizer("The capital of France is Paris.", return_tensors="pt")
    recorded = routed(model, "bh_k8_a005_needed", calibration=fitted, recorder=recorder)
    with recorded, torch.inference_mode():
        logits_1TV = model(**text).logits
    with routed(model, "bh_k8_a005_needed", calibration=fitted):
        with_gradients_1TV = model(**text).logits
    torch.testing.assert_close(with_gradients_1TV, logits_1TV, rtol=1e-3, atol=1e-3)
    seen = recorder.statistics()
    assert 1 < seen.mean_experts() < 8
    assert (seen.count_histogram_LC.sum(0) > 0).sum() > 2
    assert seen.empty_L.max() < 1


# Degenerate calibrations


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_a_layer_where_all_or_no_pairs_are_needed(rng, kl):
    logits_LTE, kl_LTE = tokens_and_effects(300, rng)
    kl_LTE[1] = kl
    toggles = simulated_toggles(logits_LTE, kl_LTE, rng)
    null = fit_null("needed_e1e4", sample_of(logits_LTE), toggles)
    logits_TE = torch.from_numpy(logits_LTE[1])
    logits_TE[:, 3] = -math.inf
    p_TE, _ = null.sorted_p_values(router_inputs(logits_TE, layer=1))
    assert ((p_TE > 0) & (p_TE <= 1)).all()
    assert (p_TE[:, 63] == 1).all()
    total = float(toggles.sampling_weight_P[toggles.layer_P == 1].sum())
    own_E = toggles.rank_weight_E
    if kl:
        torch.testing.assert_close(p_TE[0, :63].double(), (own_E / (own_E + total))[:63])
        assert (null.conditional().p_values(router_inputs(logits_TE, layer=1)) == 1).all()
    critical_E = null.critical_values(1, bh_levels(64, 0.05))
    assert bool((critical_E < 0).all()) == bool(kl)


@pytest.mark.parametrize("decimals", [8, 1], ids=["distinct", "tied"])
def test_inverse_of_the_draws_is_what_bisection_finds(rng, decimals):
    logits_LTE, kl_LTE = tokens_and_effects(30, rng)
    toggles = simulated_toggles(logits_LTE.round(decimals), kl_LTE, rng)
    null = fit_null("needed_e1e4", sample_of(logits_LTE.round(decimals)), toggles)
    smallest = (null.rank_weight_E / (null.rank_weight_E + null.total_L[0])).float().double()
    limits = [torch.full((64,), level, dtype=torch.float64) for level in (0.0, 1e-30, 0.5, 1.0)]
    random = torch.from_numpy(rng.random((20, 64)))
    around = [smallest * (1 - 1e-12), smallest, smallest * (1 + 1e-6)]
    found = []
    for layer in range(logits_LTE.shape[0]):
        for level_E in (*limits, *random, *around, bh_levels(64, 0.05)):
            found.append(null.critical_values(layer, level_E))
            assert torch.equal(found[-1], Null._invert(null, layer, level_E))
    assert torch.stack(found).isneginf().any()
    assert torch.stack(found).isposinf().any()


def test_weights_of_thirds_add_up_to_the_tokens(rng):
    logits_LTE, kl_LTE = tokens_and_effects(20, rng)
    toggles = simulated_toggles(logits_LTE, kl_LTE, rng, strata=THIRDS)
    null = fit_null("needed_e1e4", sample_of(logits_LTE), toggles)
    assert null.num_draws == 20 * 64
    assert null.attains(0.05 / 64)


def test_too_few_tokens_are_an_error_that_says_what_to_raise(rng):
    sample, toggles, null = calibrated(15, rng)
    assert null.num_draws == pytest.approx(15 * 64)
    calibration = Calibration(sample, {null.id: null}, toggles)
    parse_strategy("bh_k8_a010_needed-e1e4").selector(calibration, 64)
    with pytest.raises(
        InputError, match=r"has 960 calibration draws.* 1280, .*\(raise calibration.toggled_tokens"
    ):
        parse_strategy("bh_k8_a005_needed-e1e4").selector(calibration, 64)


def test_block_exact_counts_the_whole_token_as_unneeded(rng):
    _, toggles, null = calibrated(20, rng)
    here_P = toggles.layer_P == 0
    weight_P = toggles.sampling_weight_P
    above_P = here_P & (toggles.kl_P < EPSILON) & (toggles.weight_P >= 0.03)
    expected = (64 + weight_P[above_P].sum()) / (64 + weight_P[here_P].sum())
    p_1E = null.block_exact().survival(0, torch.full((1, 64), 0.03))
    torch.testing.assert_close(p_1E.double(), expected.expand(1, 64), rtol=1e-6, atol=0)


# Effects and epsilons


def test_the_effect_on_the_loss_is_that_of_the_presence_of_the_expert(rng):
    _, toggles, _ = calibrated(30, rng)
    found_P = not_needed(toggles, NeededId(effect="loss"), EPSILON).tolist()
    for found, rank, change in zip(
        found_P, toggles.rank_P.tolist(), toggles.loss_change_P.tolist(), strict=True
    ):
        lowers_by = change if rank < 8 else -change
        assert found == (lowers_by < EPSILON)
    assert not_needed(toggles, NeededId(), EPSILON).tolist() == (toggles.kl_P < EPSILON).tolist()


def test_an_id_without_epsilon_uses_that_of_the_calibration(rng):
    sample, toggles, _ = calibrated(30, rng)
    assert fit_null("needed", sample, toggles).epsilon == default_epsilon(2, 64)
    null = fit_null("needed", sample, toggles, 3e-5)
    assert (null.id, null.epsilon) == ("needed", 3e-5)
    assert fit_null("needed_e1e4", sample, toggles, 3e-5).epsilon == 1e-4
    assert null.hypothesis.endswith("by less than epsilon = 3e-5 nats (KL)")


@given(
    st.one_of(st.none(), st.floats(0, 1, exclude_min=True, exclude_max=True)),
    st.sampled_from(["kl", "loss"]),
)
def test_every_id_is_read_as_it_is_written(epsilon, effect):
    name = NeededId(epsilon, effect)
    assert NeededId.parse(str(name)) == name
    strategy = parse_strategy(f"bh_k8_a005_{str(name).replace('_', '-')}")
    assert strategy.null == str(name)
    assert parse_strategy(strategy.id) == strategy


@pytest.mark.parametrize(
    ("null_id", "epsilon"), [("needed_e1e4", 1e-4), ("needed_e3e5", 3e-5), ("needed_e25e2", 0.25)]
)
def test_ids_mean_what_they_say(null_id, epsilon):
    assert NeededId.parse(null_id) == NeededId(epsilon)
    assert "1e-4 nats (KL)" in hypothesis("needed_e1e4")
    assert hypothesis("needed").endswith("less than epsilon nats (KL)")
    assert "lowers the loss" in hypothesis("needed_loss")


@pytest.mark.parametrize(
    "null_id",
    ["needed_", "needed_e10e5", "needed_e1e04", "needed_e01e4", "needed_e1e0", "needed_e15e1",
     "needed_e0e4", "needed_e1e999", "needed_kl", "needed_loss_e1e4", "needed_e1e4_losses",
     "needed_e123456789012345678901e25", "needed_e\u0661e4"],
)  # fmt: skip
def test_what_is_not_canonical_is_unknown(null_id):
    assert not is_null(null_id)
    with pytest.raises(
        InputError, match=f"null '{null_id}' is unknown; allowed: within_token.*needed"
    ):
        hypothesis(null_id)


def test_an_epsilon_near_the_noise_floor_is_refused(rng):
    sample, toggles, _ = calibrated(30, rng)
    noisy = dataclasses.replace(toggles, noise_L=torch.tensor([1e-9, 2e-5], dtype=torch.float64))
    with pytest.raises(
        InputError,
        match=r"null 'needed_e1e4': epsilon is 0\.0001; allowed: at least 10 times the noise floor "
        r"of every layer, 0\.0002 in layer 1, whose floor is 2e-05 nats",
    ):
        fit_null("needed_e1e4", sample, noisy)
    assert fit_null("needed_e2e4", sample, noisy).epsilon == 2e-4


def test_toggles_that_are_missing_or_unfit_are_refused(rng):
    sample, toggles, _ = calibrated(30, rng)
    with pytest.raises(InputError, match="null 'needed' needs toggled experts; none given"):
        fit_null("needed", sample)
    fewer = dataclasses.replace(toggles, noise_L=toggles.noise_L[:1])
    with pytest.raises(InputError, match=r"have 1 layers and 64 experts; allowed: .*, 2 and 64"):
        fit_null("needed", sample, fewer)
    kl_P = toggles.kl_P.clone()
    kl_P[-1] = math.nan
    with pytest.raises(InputError, match="effect 'kl' in layer 1 is not finite"):
        fit_null("needed", sample, dataclasses.replace(toggles, kl_P=kl_P))


# Files and diagnostics


@pytest.mark.parametrize("null_id", ["needed", "needed_loss", "needed_e3e5", "needed_e1e4_loss"])
def test_a_saved_null_gives_the_same_p_values(tmp_path, rng, null_id):
    sample, toggles, null = calibrated(30, rng, null_id=null_id)
    sample.save(tmp_path / SAMPLE_FILE)
    toggles.save(tmp_path / TOGGLES_FILE)
    even_outputs(toggles).save(tmp_path / OUTPUTS_FILE)
    null_path(tmp_path, null_id).parent.mkdir()
    save_null(null, sample, null_path(tmp_path, null_id), toggles)
    calibration = Calibration.load(tmp_path, (null_id,))
    again = calibration.null(null_id)
    assert calibration.toggles.fingerprint == toggles.fingerprint
    assert calibration.outputs.fingerprint == toggles.fingerprint
    assert (again.id, again.epsilon, again.num_draws) == (null_id, null.epsilon, null.num_draws)
    inputs = router_inputs(sample.permuted_LTE[1], layer=1)
    assert torch.equal(again.p_values(inputs), null.p_values(inputs))
    assert null.to("cpu") is null


def test_a_folder_without_toggles_has_no_such_null(tmp_path, rng):
    sample, toggles, null = calibrated(30, rng)
    sample.save(tmp_path / SAMPLE_FILE)
    null_path(tmp_path, null.id).parent.mkdir()
    save_null(null, sample, null_path(tmp_path, null.id), toggles)
    with pytest.raises(InputError, match=r"toggles\.safetensors: no such file"):
        Calibration.load(tmp_path, (null.id,))


def test_a_null_of_other_weights_is_refused(tmp_path, rng):
    sample, toggles, null = calibrated(30, rng)
    path = tmp_path / "null.safetensors"
    save_null(null, sample, path, toggles)
    assert load_null(path, sample).id == "needed_e1e4"
    tuned = dataclasses.replace(toggles, fingerprint="tuned")
    with pytest.raises(InputError, match="weights = all weights; allowed: this model's tuned"):
        load_null(path, sample, tuned)
    with pytest.raises(InputError, match="fingerprint = simulated; allowed: this model's other"):
        load_null(path, dataclasses.replace(sample, fingerprint="other"), toggles)


def test_diagnostics_show_the_share_of_needed_pairs_and_the_resolution(rng):
    sample, toggles, null = calibrated(40, rng)
    table = diagnose(null, Calibration(sample))
    lacking = table.columns[table.isna().any()]  # no probability is in a lower tail
    assert set(lacking) <= {"tail_upper_to_lower", "tail_upper_to_lower_permuted"}
    for layer, row in table.iterrows():
        here_P = toggles.layer_P == layer
        weight_P = toggles.sampling_weight_P[here_P]
        needed_P = toggles.kl_P[here_P] >= EPSILON
        assert row["pairs"] == here_P.sum() == 40 * 20
        assert row["needed_proportion"] == pytest.approx(
            float((weight_P * needed_P).sum() / weight_P.sum())
        )
        assert row["n"] == pytest.approx(40 * 64)
        assert row["smallest_p"] == pytest.approx(1 / (40 * 64 + 1))
        assert row["resolution"] == pytest.approx(8 / (40 * 64 + 8))
    assert (table["epsilon"] == 1e-4).all()
