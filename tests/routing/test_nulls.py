from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from slow_loops import HIDDEN, count_bh, ordered, router_inputs, sample_of

from moe_routing.errors import InputError
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS, diagnose, fit_null, load_null, sample_inputs, save_null
from moe_routing.routing.nulls.base import Null
from moe_routing.routing.nulls.marginal import kernel_survival, silverman_bandwidth
from moe_routing.routing.nulls.random_direction import RandomDirection
from moe_routing.routing.nulls.step_up import StepUpTest
from moe_routing.routing.nulls.tails import EmpiricalSurvival
from moe_routing.routing.nulls.within_token import WithinTokenEfron, median_deviation
from moe_routing.routing.procedures import bh_levels, by_levels, step_up, threshold_levels
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.types import RouterInputs, centred_norms

MONOTONE = [name for name, null in NULLS.items() if null.layer_monotone]


def conformal_p(draws: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(1 + #{draws >= value}) / (n + 1), one value at a time."""
    return np.array([(1 + (draws >= value).sum()) / (draws.size + 1) for value in values])


# Survival functions


@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "tied"])
def test_empirical_survival_is_exact_above_and_conservative_below(rng, digits):
    draws = rng.standard_t(4, 40_000).astype(np.float32)
    values = rng.standard_t(4, 3000).astype(np.float32)
    if digits is not None:
        draws, values = draws.round(digits), values.round(digits)
    values = np.append(values, [draws.max(), draws.min(), 1e9, -1e9, -np.inf]).astype(np.float32)
    table = EmpiricalSurvival.fit(torch.from_numpy(draws)[None])
    p, exact = table(0, torch.from_numpy(values)).double().numpy(), conformal_p(draws, values)
    upper = exact <= 1 / 8
    assert upper.sum() > 300
    np.testing.assert_allclose(p[upper], exact[upper], rtol=1e-7)
    assert (p >= exact * (1 - 1e-7)).all()
    assert (p <= exact * (1 + 1 / 1000)).all()
    assert table.knot_LN.numel() < draws.size / 4


def test_empirical_survival_of_few_draws_is_exact(rng):
    draws = rng.standard_normal(50).astype(np.float32)
    values = rng.standard_normal(99).astype(np.float32)
    p = EmpiricalSurvival.fit(torch.from_numpy(draws)[None])(0, torch.from_numpy(values))
    np.testing.assert_allclose(p.numpy(), conformal_p(draws, values), rtol=1e-6)


@pytest.mark.parametrize("draws", [3, 50, 40_000])
@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "tied"])
def test_inverse_of_a_table_is_what_bisection_finds(rng, draws, digits):
    logits = rng.standard_t(4, (2, draws, 1)).astype(np.float32)
    logits = logits if digits is None else logits.round(digits)
    null = NULLS["pooled"].fit(sample_of(logits, top_k=1))
    attained = null.table.p_N.double()[:: max(1, draws // 100)]
    around = [attained, attained * (1 - 1e-12), attained * (1 + 1e-12)]
    limits = torch.tensor([0.0, 1e-30, 0.5, 1.0], dtype=torch.float64)
    level_N = torch.cat([*around, limits, torch.rand(50, dtype=torch.float64)])
    for layer in (0, 1):
        by_bisection_N = Null._invert(null, layer, level_N)
        assert torch.equal(null.critical_values(layer, level_N), by_bisection_N)
    assert by_bisection_N.isneginf().any()
    assert by_bisection_N.isposinf().any()


# What each null compares a logit with


def draws_of(name: str, logits_TE: np.ndarray, sample, layer: int) -> np.ndarray:
    """The null draws of an empirical null for expert 3, spelt out."""
    if name == "pooled":
        return logits_TE.ravel()
    if name == "per_expert":
        return logits_TE[:, 3]
    if name == "permuted_context":
        return sample.permuted_LTE[layer, :, 3].numpy()
    rest = [sorted(row)[: -sample.top_k] for row in logits_TE.tolist()]
    return np.array(rest, np.float32).ravel()


@pytest.mark.parametrize("name", ["pooled", "per_expert", "unselected", "permuted_context"])
def test_marginal_nulls_compare_with_their_draws(sample, rng, name):
    null = fit_null(name, sample)
    logits_TE = rng.normal(3, 1, (60, 64)).astype(np.float32)
    p = null.p_values(router_inputs(torch.from_numpy(logits_TE), layer=1))[:, 3].numpy()
    draws = draws_of(name, sample.logits_LTE[1].numpy(), sample, 1)
    exact = conformal_p(draws, logits_TE[:, 3])
    assert null.num_draws == draws.size
    np.testing.assert_allclose(p, exact, rtol=1e-3)
    np.testing.assert_allclose(p[exact < 1 / 8], exact[exact < 1 / 8], rtol=1e-6)


def test_mismatched_contexts_are_compared_with_the_experts_own(sample):
    """Expert 3 is large in any context: that is typical of it, though not of the layer."""
    permuted_LTE = sample.permuted_LTE.clone()
    permuted_LTE[..., 3] += 50
    null = fit_null("permuted_context", dataclasses.replace(sample, permuted_LTE=permuted_LTE))
    logits_TE = torch.zeros(1, 64)
    logits_TE[0, 3] = 50
    p_E = null.p_values(router_inputs(logits_TE))[0]
    assert ((p_E > 0.3) & (p_E < 0.7)).all()
    assert null.num_draws == sample.num_tokens


def test_unselected_needs_rejected_experts(sample):
    with pytest.raises(InputError, match="selects 64 of 64"):
        fit_null("unselected", dataclasses.replace(sample, rule=ModelRule(64, "softmax")))


def symmetric_score(logits: np.ndarray) -> np.ndarray:
    return (logits - np.median(logits)) / stats.median_abs_deviation(logits, scale="normal")


def split_score(logits: np.ndarray) -> np.ndarray:
    ordered, half = np.sort(logits), (len(logits) + 1) // 2
    centre = np.median(logits)
    up = (np.median(ordered[-half:]) - centre) / stats.norm.ppf(0.75)
    down = (centre - np.median(ordered[:half])) / stats.norm.ppf(0.75)
    return np.where(logits > centre, (logits - centre) / up, (logits - centre) / down)


SCORES = {"within_token": symmetric_score, "within_token_split": split_score}


@pytest.mark.parametrize("experts", [5, 8, 63, 64])
@pytest.mark.parametrize("name", sorted(SCORES))
def test_within_token_statistic_is_the_robust_z(rng, name, experts):
    sample = sample_of(rng.standard_normal((1, 100, experts)), top_k=1)
    logits_TE = rng.standard_t(4, (50, experts)).astype(np.float32)
    z = fit_null(name, sample).statistic(router_inputs(torch.from_numpy(logits_TE))).numpy()
    slow = np.array([SCORES[name](row) for row in logits_TE.astype(float)])
    np.testing.assert_allclose(z, slow, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 8, 63, 64])
@pytest.mark.parametrize("digits", [None, 0], ids=["distinct", "tied"])
def test_median_deviation_equals_that_of_sorted_deviations_to_the_bit(rng, experts, digits):
    value_TE = rng.standard_t(2, (500, experts)).astype(np.float32)
    value_TE = value_TE if digits is None else value_TE.round(digits)
    sorted_TE = torch.from_numpy(-np.sort(-value_TE, axis=1))
    centre_T1 = torch.from_numpy(np.median(value_TE, axis=1, keepdims=True).astype(np.float32))
    fast_T1 = median_deviation(sorted_TE, centre_T1, experts)
    slow_T1 = median_deviation(sorted_TE, centre_T1, torch.full((500, 1), experts))
    assert torch.equal(fast_T1, slow_T1)
    by_numpy = np.median(np.abs(value_TE - centre_T1.numpy()), axis=1, keepdims=True)
    np.testing.assert_allclose(fast_T1, by_numpy, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_scores_of_the_upper_half_are_those_of_the_whole(rng, calibration_of, name):
    null = calibration_of(64).null(name)
    sorted_TE = torch.from_numpy(-np.sort(-rng.standard_t(3, (300, 64)).astype(np.float32)))
    upper_TN = null.z(sorted_TE[:, :32], sorted_TE, positive_only=True)
    assert torch.equal(upper_TN, null.z(sorted_TE, sorted_TE)[:, :32])


def test_ranks_below_the_median_are_left_out_only_where_none_can_be_rejected(calibration_of):
    null = calibration_of(64).null("within_token")
    critical_LE = torch.linspace(4.0, 0.5, 64).repeat(2, 1)
    assert null.max_rejections(critical_LE) == 32
    critical_LE[1, 63] = 0.0
    assert null.max_rejections(critical_LE) == 64
    assert null.max_rejections(torch.ones(2, 1)) == 1
    assert calibration_of(64).null("pooled").max_rejections(critical_LE) == 64
    for alpha, ranks in ((0.05, 32), (0.95, 64)):
        assert StepUpTest.build(null, bh_levels(64, alpha), 2).critical_LN.shape == (2, ranks)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_within_token_reflects_the_lower_tail(sample, rng, name):
    null = fit_null(name, sample)
    inputs = router_inputs(torch.from_numpy(rng.normal(0, 2, (20, 64)).astype(np.float32)))
    z_n = null.statistic(sample_inputs(sample, 0)).numpy().ravel()
    p, z = null.p_values(inputs).numpy().ravel(), null.statistic(inputs).numpy().ravel()
    slow = np.array([(1 + (z_n <= -value).sum()) / (z_n.size + 1) for value in z])
    np.testing.assert_allclose(p, slow, rtol=1e-3)
    np.testing.assert_allclose(p[slow < 1 / 8], slow[slow < 1 / 8], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(SCORES))
@pytest.mark.parametrize("masked", [1, 30, 40, 62, 63])
def test_masked_experts_leave_the_others_as_they_are(rng, calibration_of, name, masked):
    null = calibration_of(64).null(name)
    logits_TE = torch.from_numpy(rng.standard_normal((30, 64)).astype(np.float32))
    cut_TE = logits_TE[:, masked:]
    with_mask_TE = logits_TE.clone()
    with_mask_TE[:, :masked] = -math.inf
    z_TE = null.statistic(router_inputs(with_mask_TE))
    torch.testing.assert_close(z_TE[:, masked:], null.statistic(router_inputs(cut_TE)))
    assert (z_TE[:, :masked] == -math.inf).all()


def test_equal_logits_have_z_zero_and_no_nan(calibration_of):
    for name in SCORES:
        null = calibration_of(64).null(name)
        logits_TE = torch.zeros(2, 64)
        logits_TE[1, 7] = 1.0
        z_TE = null.statistic(router_inputs(logits_TE))
        assert (z_TE[0] == 0).all()
        assert z_TE[1, 7] > 1e6
        assert (z_TE[1, :7] == 0).all()


@pytest.mark.parametrize("name", ["within_token", "within_token_split", "within_token_efron"])
def test_within_token_ignores_shift_and_scale(calibration_of, rng, name):
    null = calibration_of(64).null(name)
    logits_TE = torch.from_numpy(rng.standard_normal((100, 64)).astype(np.float32))
    p_TE = null.p_values(router_inputs(logits_TE))
    moved_TE = null.p_values(router_inputs(4 * logits_TE + 16))
    torch.testing.assert_close(moved_TE, p_TE, rtol=0.01, atol=1e-4)


def test_kernel_density_matches_scipy(rng):
    draws = rng.standard_t(4, 3000)
    width = silverman_bandwidth(draws)
    iqr = stats.iqr(draws)
    assert width == pytest.approx(0.9 * min(draws.std(), iqr / 1.349) * 3000**-0.2, rel=1e-12)
    grid = np.linspace(draws.min() - 6 * width, draws.max() + 6 * width, 1025)
    kernel = stats.gaussian_kde(draws, bw_method=width / draws.std(ddof=1))
    survival = kernel_survival(draws, width, grid)
    for knot in range(0, 1025, 64):
        slow = kernel.integrate_box_1d(grid[knot], math.inf)
        assert survival[knot] == pytest.approx(slow, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("name", ["pooled", "per_expert"])
def test_kernel_nulls_smooth_the_empirical_ones(sample, name):
    inputs = sample_inputs(sample, 1)
    empirical_TE = fit_null(name, sample).p_values(inputs)
    smooth = fit_null(f"{name}_kde", sample)
    smooth_TE = smooth.p_values(inputs)
    assert (smooth_TE - empirical_TE).abs().max() < 0.03
    assert not torch.equal(smooth_TE, empirical_TE)
    huge_TE = smooth.p_values(router_inputs(torch.full((1, 64), 1e6)))
    torch.testing.assert_close(huge_TE, torch.full_like(huge_TE, 1 / (smooth.num_draws + 1)))


@pytest.mark.parametrize("width", [HIDDEN, 128, 2048])
def test_random_direction_has_the_exact_law(sample, width):
    null = RandomDirection.fit(dataclasses.replace(sample, hidden_size=width))
    statistic = np.linspace(-5, min(12, math.sqrt(width) - 0.01), 999).astype(np.float32)
    cosine_squared = statistic.astype(float) ** 2 / width
    one_sided = stats.beta.sf(cosine_squared, 0.5, (width - 1) / 2) / 2
    exact = np.where(statistic > 0, one_sided, 1 - one_sided)
    p = null.survival(0, torch.from_numpy(statistic)).numpy()
    likely = exact > 1e-10
    np.testing.assert_allclose(p[likely], exact[likely], rtol=1e-5)
    np.testing.assert_allclose(p, exact.clip(np.finfo(np.float32).tiny), rtol=0.01)


def test_random_directions_have_uniform_p_values_whatever_the_token(sample, rng):
    null = fit_null("random_direction", sample)
    hidden_TH = torch.from_numpy(rng.exponential(5, (40, HIDDEN)).astype(np.float32))
    weight_EH = rng.standard_normal((64, HIDDEN)) * rng.exponential(1, (64, 1))
    weight_EH = torch.from_numpy(weight_EH.astype(np.float32))
    inputs = dataclasses.replace(
        router_inputs(hidden_TH @ weight_EH.T), hidden_TH=hidden_TH, weight_EH=weight_EH
    )
    for token_p in null.p_values(inputs)[:5].double().numpy():
        assert stats.kstest(token_p, "uniform").pvalue > 1e-4
    with pytest.raises(ValueError, match="needs the router's input"):
        null.p_values(dataclasses.replace(inputs, hidden_TH=None))


def test_the_random_direction_null_ignores_what_the_softmax_ignores(sample, rng):
    null = fit_null("random_direction", sample)
    hidden_TH = torch.from_numpy(rng.standard_normal((50, HIDDEN))).float()
    weight_EH = torch.from_numpy(rng.standard_normal((16, HIDDEN))).float()
    shift_H = torch.from_numpy(5 * rng.standard_normal(HIDDEN)).float()

    def statistic(weight_EH: torch.Tensor) -> torch.Tensor:
        return null.statistic(RouterInputs(0, hidden_TH @ weight_EH.T, hidden_TH, weight_EH))

    torch.testing.assert_close(
        statistic(weight_EH + shift_H), statistic(weight_EH), rtol=1e-4, atol=1e-4
    )
    norms = RouterInputs(
        0, hidden_TH @ weight_EH.T, hidden_TH, centred_norm_E=centred_norms(weight_EH)
    )
    assert torch.equal(null.statistic(norms), statistic(weight_EH))


def test_random_directions_of_masked_tokens_are_as_if_masked_experts_did_not_exist(sample, rng):
    null = fit_null("random_direction", sample)
    hidden_TH = torch.from_numpy(rng.standard_normal((30, HIDDEN))).float()
    weight_EH = torch.from_numpy(rng.exponential(1, (12, 1)) * rng.standard_normal((12, HIDDEN)))
    logits_TE = hidden_TH @ weight_EH.float().T
    masked_TE = torch.from_numpy(rng.random((30, 12)) < 0.4)
    masked_TE[0] = True
    masked_TE[1, 1:] = True
    inputs = RouterInputs(
        0, logits_TE.masked_fill(masked_TE, -math.inf), hidden_TH, weight_EH.float()
    )
    for found_E, x_H, masked_E in zip(
        null.statistic(inputs)[2:], hidden_TH[2:].double(), masked_TE[2:], strict=True
    ):
        rows_NH = weight_EH[~masked_E] - weight_EH[~masked_E].mean(0)
        cosine_N = (rows_NH @ x_H) / rows_NH.norm(dim=1) / x_H.norm()
        torch.testing.assert_close(
            found_E[~masked_E].double(), cosine_N * math.sqrt(HIDDEN), rtol=1e-3, atol=1e-4
        )
        assert (found_E[masked_E] == -math.inf).all()
    assert not null.statistic(inputs).isnan().any()


def test_central_matching_finds_the_normal_bulk(rng):
    z = np.concatenate([rng.normal(0.2, 1.3, 450_000), rng.normal(8, 1, 20_000)])
    centre, scale = WithinTokenEfron._match(z)
    assert centre == pytest.approx(0.2, abs=0.05)
    assert scale == pytest.approx(1.3, abs=0.05)
    centre, scale = WithinTokenEfron._match(np.abs(z) ** 3 * np.sign(z - 9))
    assert np.isfinite([centre, scale]).all()
    assert scale > 0


# p-values and critical values


def equal_rows(experts: int) -> torch.Tensor:
    """Router vectors with a mean of zero and one length."""
    return torch.ones(experts, HIDDEN) * (-1) ** torch.arange(experts)[:, None]


@pytest.mark.parametrize("name", list(NULLS))
def test_p_values_are_float32_in_the_unit_interval_and_fall_with_the_logit(calibration_of, name):
    logits_TE = torch.linspace(-8, 8, 64).expand(3, 64).clone().bfloat16()
    logits_TE[1] += 100
    inputs = dataclasses.replace(router_inputs(logits_TE), weight_EH=equal_rows(64))
    p_TE = calibration_of(64).null(name).p_values(inputs)
    assert p_TE.dtype == torch.float32
    assert ((p_TE > 0) & (p_TE <= 1)).all()
    if NULLS[name].layer_monotone:
        assert (p_TE.diff(dim=1) <= 0).all()
    masked_TE = logits_TE.clone()
    masked_TE[:, 5] = -math.inf
    masked = dataclasses.replace(inputs, logits_TE=masked_TE)
    assert (calibration_of(64).null(name).p_values(masked)[:, 5] == 1).all()
    assert (calibration_of(64).null(name).statistic(masked)[:, 5] == -math.inf).all()


@pytest.mark.parametrize("name", MONOTONE)
def test_critical_value_is_the_smallest_statistic_that_attains_the_level(calibration_of, name):
    null = calibration_of(64).null(name)
    level_N = bh_levels(64, 0.05)
    critical_N = null.critical_values(1, level_N)
    assert torch.isfinite(critical_N).all()
    assert (null.survival(1, critical_N).double() <= level_N).all()
    below_N = torch.nextafter(critical_N, torch.tensor(-math.inf))
    assert (null.survival(1, below_N).double() > level_N).all()


def test_critical_value_of_an_unattainable_level_is_infinite(calibration_of):
    null = calibration_of(64).null("pooled")
    levels = torch.tensor([1e-30, 0.05, 1.0], dtype=torch.float64)
    unattainable, finite, always = null.critical_values(0, levels).tolist()
    assert unattainable == math.inf
    assert math.isfinite(finite)
    assert always == -math.inf
    with pytest.raises(NotImplementedError, match="per_expert"):
        calibration_of(64).null("per_expert").critical_values(0, levels)


LEVELS = {
    "bh": bh_levels(64, 0.05),
    "bh, any rank": bh_levels(64, 0.95),
    "by": by_levels(64, 0.1),
    "threshold": threshold_levels(64, 0.3),
}


@pytest.mark.parametrize("levels", sorted(LEVELS))
@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MONOTONE)
def test_step_up_on_statistics_equals_step_up_on_p_values(
    rng, calibration_of, name, dtype, masked, levels
):
    null, level_E = calibration_of(64).null(name), LEVELS[levels]
    logits_TE = 2 * torch.from_numpy(rng.standard_normal((500, 64)))
    logits_TE[rng.random((500, 64)) < masked] = -math.inf
    inputs = router_inputs(logits_TE.to(dtype), layer=1)
    fast, fast_T = StepUpTest.build(null, level_E, 2)(inputs)
    p_TE, order_TE = null.sorted_p_values(inputs)
    assert torch.equal(fast_T, step_up(p_TE, level_E))
    assert torch.equal(fast.order_TE, order_TE)
    assert torch.equal(fast.key_TE == -math.inf, inputs.logits_TE.gather(1, order_TE).isneginf())
    by_statistic = null.statistic(inputs).tolist()
    for order, statistic, logits in zip(
        order_TE.tolist(), by_statistic, inputs.logits_TE.tolist(), strict=True
    ):
        assert order == ordered(64, statistic, logits)


class WeightedProbability(Null):
    """A null with a statistic that is not the logit, and draws that have weights of their own."""

    id = "weighted_probability"
    layer_monotone = True

    def __init__(self, draw_n: torch.Tensor, weight_n: torch.Tensor) -> None:
        self.draw_n, self.weight_n = draw_n, weight_n
        self.num_draws = float(weight_n.sum() / weight_n.max())

    @classmethod
    def fit(cls, sample):
        return cls(
            sample.logits_LTE[0].softmax(-1).flatten(), sample.permuted_LTE[0].abs().flatten()
        )

    def statistic(self, inputs: RouterInputs) -> torch.Tensor:
        probability_TE = inputs.logits_TE.float().softmax(-1)
        return probability_TE.masked_fill(inputs.logits_TE.isneginf(), -math.inf)

    def survival(self, layer: int, statistic_TE: torch.Tensor) -> torch.Tensor:
        own = self.weight_n.max()
        above_TE = ((self.draw_n >= statistic_TE[..., None]) * self.weight_n).sum(-1)
        return ((own + above_TE) / (own + self.weight_n.sum())).clamp(max=1)

    def tensors(self):
        return {"draw": self.draw_n, "weight": self.weight_n}

    @classmethod
    def from_tensors(cls, tensors):
        return cls(tensors["draw"], tensors["weight"])


def test_a_new_null_needs_a_statistic_and_a_survival_function_only(rng):
    null = WeightedProbability.fit(sample_of(rng.standard_normal((1, 30, 16))))
    logits_TE = torch.from_numpy(3 * rng.standard_normal((200, 16))).float().round(decimals=1)
    logits_TE[::3, 4:9] = -math.inf
    inputs = router_inputs(logits_TE)
    experts, rejected_T = StepUpTest.build(null.to("cpu"), bh_levels(16, 0.4), 1)(inputs)
    p_TE = null.p_values(inputs)
    assert rejected_T.tolist() == [count_bh(sorted(p), 0.4) for p in p_TE.tolist()]
    assert len(rejected_T.unique()) > 3
    assert (p_TE[logits_TE.isneginf()] == 1).all()
    assert torch.equal(experts.key_TE.isneginf().sum(1), logits_TE.isneginf().sum(1))
    smallest_p = 1 / (null.num_draws + 1)
    assert float(p_TE.min()) >= smallest_p * (1 - 1e-6)
    assert null.attains(2 / null.num_draws)
    assert not null.attains(smallest_p / 2)


# Validity where the null holds by design, and where it does not


def noise(kind: str, tokens: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "t4":
        return rng.standard_t(4, (tokens, 64))
    normal = rng.standard_normal((tokens, 64))
    return normal - normal.mean(1, keepdims=True) if kind == "centred" else normal


def rejections(null, logits_TE: np.ndarray, alpha: float = 0.05) -> torch.Tensor:
    inputs = router_inputs(torch.from_numpy(logits_TE.astype(np.float32)))
    p_TE, _ = null.sorted_p_values(inputs)
    return step_up(p_TE, bh_levels(64, alpha))


@pytest.mark.parametrize("kind", ["normal", "t4", "centred"])
@pytest.mark.parametrize(
    "name", ["within_token", "within_token_split", "pooled", "per_expert", "permuted_context"]
)
def test_calibrated_nulls_have_their_size_on_noise(rng, name, kind):
    fitted = sample_of(noise(kind, 4096, rng)[None])
    fitted = dataclasses.replace(fitted, permuted_LTE=fitted.logits_LTE.flip(1))
    size = (rejections(fit_null(name, fitted), noise(kind, 20_000, rng)) > 0).double().mean()
    assert 0.03 < size <= 0.06


@pytest.mark.parametrize(
    ("name", "kind", "least"),
    [
        ("unselected", "normal", 0.9),
        ("within_token_efron", "t4", 0.5),
        ("plug-in", "normal", 0.1),
        ("plug-in", "t4", 0.5),
    ],
)
def test_nulls_that_fail_are_seen_to_fail(rng, name, kind, least):
    fitted, test = sample_of(noise(kind, 2048, rng)[None]), noise(kind, 8000, rng)
    if name == "plug-in":
        inputs = router_inputs(torch.from_numpy(test.astype(np.float32)))
        z_TE = fit_null("within_token", fitted).order(inputs).statistic_TN
        rejected_T = step_up(torch.special.ndtr(-z_TE.double()), bh_levels(64, 0.05))
    else:
        rejected_T = rejections(fit_null(name, fitted), test)
    assert (rejected_T > 0).double().mean() > least


def with_signal(tokens: int, shift: float, rng: np.random.Generator) -> np.ndarray:
    logits = rng.standard_normal((tokens, 64))
    logits[:, :8] += shift
    return logits


@pytest.mark.parametrize("name", ["within_token", "within_token_split"])
@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_within_token_keeps_the_false_discovery_rate_and_finds_the_signal(rng, name, shift):
    null = fit_null(name, sample_of(with_signal(4096, shift, rng)[None]))
    logits_TE = torch.from_numpy(with_signal(10_000, shift, rng).astype(np.float32))
    p_TE, order_TE = null.sorted_p_values(router_inputs(logits_TE))
    rejected_T = step_up(p_TE, bh_levels(64, 0.05))
    taken_TE = torch.arange(64) < rejected_T[:, None]
    false_T = ((order_TE >= 8) & taken_TE).sum(1) / rejected_T.clamp(min=1)
    true_T = ((order_TE < 8) & taken_TE).sum(1) / 8
    assert false_T.mean() < 0.05
    assert true_T.mean() > (0.9 if shift == 6 else 0.05)


@pytest.mark.parametrize("name", ["pooled", "per_expert"])
@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_marginal_nulls_select_for_few_tokens_however_strong_the_signal(rng, name, alpha):
    def shuffled(tokens: int) -> np.ndarray:
        return rng.permuted(with_signal(tokens, 8.0, rng), axis=1)

    null = fit_null(name, sample_of(shuffled(4096)[None]))
    proportion = (rejections(null, shuffled(8000), alpha) > 0).double().mean()
    assert proportion <= alpha * (1 / np.arange(1, 65)).sum()


def test_the_bound_on_marginal_nulls_is_attained(rng):
    # A token with j large logits (probability alpha / j) has them in the j-th slice of the null.
    alpha, tokens = 0.05, 40_000
    proportion = alpha / np.arange(1, 65)
    sizes = rng.choice(65, tokens, p=[1 - proportion.sum(), *proportion])
    p = alpha + (1 - alpha) * rng.random((tokens, 64))
    for token, size in enumerate(sizes):
        p[token, :size] = (size - rng.random(size)) * alpha / 64
    null = fit_null("pooled", sample_of(-p[None]))
    attained = (rejections(null, -p, alpha) > 0).double().mean()
    bound = proportion.sum()
    assert bound == pytest.approx(0.2372, abs=1e-4)
    # The conformal +1 keeps some p-values from reaching the end of their slice.
    assert 0.9 * bound < attained < 1.05 * bound


# Files


@pytest.mark.parametrize("name", list(NULLS))
def test_saved_null_gives_the_same_p_values(tmp_path, sample, name):
    null = fit_null(name, sample)
    save_null(null, sample, tmp_path / "null.safetensors")
    again = load_null(tmp_path / "null.safetensors", sample)
    inputs = router_inputs(sample.permuted_LTE[1], layer=1)
    assert type(again) is type(null)
    assert again.num_draws == null.num_draws
    assert torch.equal(again.p_values(inputs), null.p_values(inputs))
    assert (tmp_path / "null.safetensors").stat().st_size < 4 * sample.logits_LTE.numel()


@pytest.mark.parametrize("name", list(NULLS))
def test_a_null_that_is_where_it_is_wanted_is_not_made_anew(sample, name):
    null = fit_null(name, sample)
    assert null.to("cpu") is null
    assert null.to(torch.device("cpu")) is null


def test_a_null_of_another_model_is_refused_in_one_line(tmp_path, sample):
    path = tmp_path / "null.safetensors"
    save_null(fit_null("pooled", sample), sample, path)
    fewer = dataclasses.replace(sample, logits_LTE=sample.logits_LTE[:1])
    narrow = dataclasses.replace(sample, logits_LTE=sample.logits_LTE[..., :32])
    other = dataclasses.replace(sample, fingerprint="other")
    for model, text in (
        (fewer, "layers = 2; allowed: this model's 1"),
        (narrow, "experts = 64; allowed: this model's 32"),
        (other, "fingerprint = simulated; allowed: this model's other"),
    ):
        with pytest.raises(InputError, match=text) as error:
            load_null(path, model)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_files_that_are_no_nulls_are_refused_in_one_line(tmp_path, sample):
    (tmp_path / "text").write_text("not a null")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "lacking.safetensors", {"null": "pooled"})
    for name in ("missing", "text", "other.safetensors", "lacking.safetensors"):
        with pytest.raises(InputError, match=r"no such file|not a fitted null") as error:
            load_null(tmp_path / name, sample)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in NULLS if name != "random_direction"])
def test_a_sample_that_is_not_finite_is_refused(sample, name, bad):
    logits_LTE = sample.logits_LTE.clone()
    logits_LTE[1, 5, 9] = bad
    with pytest.raises(InputError, match="logits_LTE of layer 1 has values that are not finite"):
        fit_null(name, dataclasses.replace(sample, logits_LTE=logits_LTE))


def test_unknown_null_is_refused(sample):
    with pytest.raises(InputError, match="null 'pool' is unknown; allowed: within_token"):
        fit_null("pool", sample)


# Diagnostics


def test_diagnostics_show_asymmetry(rng):
    normal = rng.standard_normal((1, 4000, 64))
    skewed = np.where(normal > 0, normal, 2 * normal)
    sample = dataclasses.replace(
        sample_of(np.concatenate([normal, skewed])),
        permuted_LTE=torch.from_numpy(np.concatenate([normal, normal])).float(),
    )
    table = diagnose(fit_null("within_token", sample), Calibration(sample))
    assert table["layer"].tolist() == [0, 1]
    assert table["n"].tolist() == [256_000, 256_000]
    np.testing.assert_allclose(table["smallest_p"], 1 / 256_001)
    assert table["upper_to_lower"][0] == pytest.approx(1, abs=0.02)
    assert 0.5 < table["upper_to_lower"][1] < 0.65  # the median of 64 values blurs the kink
    assert table["tail_upper_to_lower"][0] == pytest.approx(1, abs=0.08)
    assert table["tail_upper_to_lower"][1] < 0.1
    np.testing.assert_allclose(table["tail_upper_to_lower_permuted"], 1, atol=0.08)
    np.testing.assert_allclose(table["scale"], 1, atol=0.01)


def test_diagnostics_on_shuffled_text_divide_by_the_norms_of_that_text(rng):
    factor_LT = torch.from_numpy(rng.lognormal(0, 1.5, (1, 4000))).float()
    sample = sample_of(rng.standard_normal((1, 4000, 64)))
    normal_LTE = torch.from_numpy(rng.standard_normal((1, 4000, 64))).float()
    skewed_LTE = torch.where(normal_LTE > 0, 1.5 * normal_LTE, normal_LTE)
    even = dataclasses.replace(sample, permuted_LTE=skewed_LTE)
    permuted = dataclasses.replace(
        sample,
        permuted_LTE=skewed_LTE * factor_LT[..., None],
        permuted_norm_LT=sample.input_norm_LT * factor_LT,
    )
    of_others = dataclasses.replace(permuted, permuted_norm_LT=sample.input_norm_LT)
    null = fit_null("random_direction", sample)
    right, same, wrong = (
        diagnose(null, Calibration(one))["tail_upper_to_lower_permuted"][0]
        for one in (even, permuted, of_others)
    )
    assert same == pytest.approx(right, rel=1e-3)
    assert abs(wrong / right - 1) > 0.2
    inputs = sample_inputs(permuted, 0, permuted=True)
    assert torch.equal(inputs.hidden_TH[:, 0], permuted.permuted_norm_LT[0])
    assert torch.equal(sample_inputs(permuted, 0).hidden_TH[:, 0], sample.input_norm_LT[0])


@pytest.mark.parametrize("name", list(NULLS))
def test_every_null_has_diagnostics_without_gaps(sample, name):
    table = diagnose(fit_null(name, sample), Calibration(sample))
    assert len(table) == 2
    assert not table.isna().any().any()
