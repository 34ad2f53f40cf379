"""Logits made under H0 have the law they claim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from moe_routing.analysis.designs import (
    DESIGNS,
    DIRECTED,
    FIT_TIMES,
    copula_factor,
    from_grid,
    quantile_grid,
    samples,
    symmetric_grid,
)
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.sample import CalibrationSample


@pytest.fixture
def real(rng):
    """Two layers of skewed logits, of different location and scale."""
    logits = rng.gamma(2.0, 1.0, (2, 600, 8)) * np.array([1.0, 3.0])[:, None, None] - 4
    return CalibrationSample(
        logits_LTE=torch.from_numpy(logits.astype(np.float32)),
        permuted_LTE=torch.from_numpy(logits[:, ::-1].astype(np.float32).copy()),
        input_norm_LT=torch.rand(2, 600, generator=torch.Generator().manual_seed(1)) + 1,
        permuted_norm_LT=torch.ones(2, 600),
        centred_norm_LE=torch.rand(2, 8, generator=torch.Generator().manual_seed(2)) + 0.5,
        hidden_size=16,
        rule=ModelRule(2, "softmax"),
        fingerprint="none",
    )


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_makes_two_samples_of_one_law(real, rng, name):
    first, second = samples(DESIGNS[name], real, 200, rng)
    assert second.logits_LTE.shape == (2, 200, 8)
    assert first.logits_LTE.shape == (2, 200 * FIT_TIMES, 8)
    for layer in range(2):
        logits = [sample.logits_LTE[layer] for sample in (first, second)]
        if name == "common_direction":  # a shift of each token's own, so that experts are alike
            logits = [logits_TE - logits_TE.mean(1, keepdim=True) for logits_TE in logits]
        a, b = (logits_TE.ravel().numpy() for logits_TE in logits)
        assert stats.ks_2samp(a, b).pvalue > 1e-4
        assert np.intersect1d(a, b).size < 0.1 * b.size
    for sample in (first, second):
        assert sample.input_norm_LT.shape == sample.logits_LTE.shape[:2]


@pytest.mark.parametrize("name", ["normal", "t4", "real_marginal", "symmetric_marginal"])
def test_simulated_experts_are_exchangeable(real, rng, name):
    logits = samples(DESIGNS[name], real, 4000, rng)[1].logits_LTE[0].numpy()
    correlation = np.corrcoef(logits.T)[np.triu_indices(8, 1)]
    assert np.abs(correlation).max() < 0.08
    assert stats.kruskal(*logits.T).pvalue > 1e-4


@pytest.fixture
def grouped(real, rng):
    """Experts 0 to 3 rise together, 4 to 7 against them; laws as different as those of experts."""
    common = rng.standard_normal((2, 3000, 1)) * np.repeat([1.0, -1.0], 4)
    normal = 0.8 * common + 0.6 * rng.standard_normal((2, 3000, 8))
    logits = np.exp(normal) * np.arange(1, 9)
    return replace(
        real,
        logits_LTE=torch.from_numpy(logits.astype(np.float32)),
        input_norm_LT=torch.ones(2, 3000),
    )


@pytest.mark.parametrize("name", ["real_copula", "symmetric_copula"])
def test_copulas_have_the_rank_correlations_of_the_layer_and_one_law(grouped, rng, name):
    found = samples(DESIGNS[name], grouped, 6000, rng)[1].logits_LTE
    for layer in range(2):
        simulated, seen = found[layer].numpy(), grouped.logits_LTE[layer].numpy()
        expected = stats.spearmanr(seen).statistic
        assert np.abs(expected[np.triu_indices(8, 1)]).min() > 0.5
        assert np.abs(stats.spearmanr(simulated).statistic - expected).max() < 0.06
        for expert in range(1, 8):
            assert stats.ks_2samp(simulated[:, 0], simulated[:, expert]).pvalue > 1e-5


def test_correlations_come_from_ranks_and_may_be_singular(grouped):
    factor_LEF = copula_factor(grouped.logits_LTE)
    assert np.allclose(factor_LEF, copula_factor(grouped.logits_LTE.double().log()))
    correlation_LEE = factor_LEF @ factor_LEF.transpose(0, 2, 1)
    assert np.allclose(correlation_LEE.diagonal(axis1=1, axis2=2), 1)
    assert np.allclose(correlation_LEE[:, 0, 1], 0.64, atol=0.03)
    assert np.allclose(correlation_LEE[:, 0, 7], -0.64, atol=0.03)
    twins = torch.cat([grouped.logits_LTE[..., :1]] * 2, dim=-1)
    twin_LEF = copula_factor(twins)
    assert np.allclose(twin_LEF @ twin_LEF.transpose(0, 2, 1), 1)


def test_only_the_symmetric_copula_has_what_the_mirror_assumes(grouped, rng):
    """What ``within_token`` assumes: z is above any x as often as below -x."""

    def tails(name, x):
        found = samples(DESIGNS[name], grouped, 20_000, rng)[1]
        z = NULLS["within_token"].calibration_z_Ln(found)[0].numpy()
        return (z > x).mean(), (z < -x).mean()

    for x in (0.5, 1, 2):
        above, below = tails("symmetric_copula", x)
        assert above > 0.01
        assert above == pytest.approx(below, rel=0.1)
    above, below = tails("real_copula", 2)
    assert above > 1.5 * below


def test_a_shared_centre_is_the_tokens_own_and_experts_around_it_are_alike(real, rng):
    shift = torch.linspace(0, 40, 600)[None, :, None]
    moved = replace(real, logits_LTE=real.logits_LTE + shift)
    logits = samples(DESIGNS["shared_centre"], moved, 4000, rng)[1].logits_LTE[0].numpy()
    correlation = np.corrcoef(logits.T)[np.triu_indices(8, 1)]
    assert correlation.min() > 0.9
    around = logits - logits.mean(1, keepdims=True)
    assert stats.kruskal(*around.T).pvalue > 1e-4
    assert abs(stats.skew(around.ravel())) < 0.15
    assert logits.mean(1).std() == pytest.approx(float(shift.std()), rel=0.1)


def test_the_real_marginal_is_the_layers_own_law(real, rng):
    logits = samples(DESIGNS["real_marginal"], real, 4000, rng)[1].logits_LTE
    for layer in range(2):
        found = logits[layer].ravel().numpy()
        assert stats.ks_2samp(found, real.logits_LTE[layer].ravel().numpy()).pvalue > 1e-3
        assert stats.skew(found) > 0.8


def test_parametric_designs_have_the_layers_moments_and_their_own_tails(real, rng):
    for name, kurtosis in (("normal", (2.8, 3.2)), ("t4", (4.0, np.inf))):
        logits = samples(DESIGNS[name], real, 8000, rng)[1].logits_LTE[1].ravel().numpy()
        assert logits.mean() == pytest.approx(float(real.logits_LTE[1].mean()), abs=0.1)
        assert logits.std() == pytest.approx(float(real.logits_LTE[1].std()), rel=0.1)
        assert kurtosis[0] < stats.kurtosis(logits, fisher=False) < kurtosis[1]


def test_the_symmetric_grid_is_symmetric_and_keeps_the_lower_half(real, rng):
    grid = quantile_grid(real.logits_LTE)
    mirrored = symmetric_grid(grid)
    middle = grid.shape[1] // 2
    assert np.array_equal(mirrored[:, : middle + 1], grid[:, : middle + 1])
    assert np.allclose(mirrored + mirrored[:, ::-1], 2 * grid[:, [middle]])
    assert (np.diff(mirrored, axis=1) >= 0).all()
    assert abs(stats.skew(from_grid(mirrored, 4000, 8, rng)[0].ravel().numpy())) < 0.1


def test_random_directions_are_those_of_real_random_vectors(real, rng):
    found = samples(DESIGNS["random_directions"], real, 3000, rng)[1]
    scale = found.input_norm_LT[..., None] * real.centred_norm_LE[:, None] * np.sqrt(8 / 7)
    cosine = (found.logits_LTE / scale)[0].ravel().numpy()
    vectors = rng.normal(size=(20000, 16))
    expected = vectors[:, 0] / np.linalg.norm(vectors, axis=1)
    assert stats.ks_2samp(cosine, expected).pvalue > 1e-3
    assert np.abs(cosine).max() <= 1 + 1e-6


@pytest.fixture
def wide(real):
    """As many experts as two groups have, and rows of one length."""
    return replace(
        real,
        logits_LTE=torch.zeros(2, 600, 16),
        centred_norm_LE=torch.ones(2, 16),
        hidden_size=64,
    )


@pytest.mark.parametrize("name", ["random_directions", "grouped_directions", "common_direction"])
def test_centred_rows_have_the_lengths_of_the_model(wide, rng, name):
    """What the null of random directions assumes: centred logits over length and norm are N(0, 1).

    So they are where rows share a direction, or point the same way in groups.
    """
    found = samples(DESIGNS[name], wide, 6000, rng)[1]
    centred_TE = found.logits_LTE[0] - found.logits_LTE[0].mean(1, keepdim=True)
    z_TE = (centred_TE * np.sqrt(64) / found.input_norm_LT[0, :, None]).numpy()
    assert z_TE.std() == pytest.approx(1, abs=0.02)
    correlation_EE = np.corrcoef(z_TE.T)
    if name == "grouped_directions":
        assert correlation_EE[0, 1:8].min() > 0.15
        assert correlation_EE[0, 8:].max() < -0.15
    else:
        assert np.abs(correlation_EE[0, 1:] + 1 / 15).max() < 0.05
    shift_T = found.logits_LTE[0].mean(1)
    assert (float(shift_T.std()) > 0.2) == (name == "common_direction")


def test_permuted_contexts_split_the_sample_without_overlap(real, rng):
    first, second = samples(DESIGNS["permuted_contexts"], real, 10_000, rng)
    assert (first.logits_LTE.shape[1], second.logits_LTE.shape[1]) == (400, 200)
    both = torch.cat([first.permuted_LTE, second.permuted_LTE], dim=1)[0, :, 0]
    assert torch.equal(both.sort().values, real.permuted_LTE[0, :, 0].sort().values)


def test_h0_of_a_null_holds_where_it_is_said_to():
    assert DESIGNS["normal"].holds_for("pooled")
    assert not DESIGNS["normal"].holds_for("random_direction")
    assert DESIGNS["random_directions"].holds_for("random_direction")
    assert DESIGNS["permuted_contexts"].holds_for("permuted_context")
    assert not DESIGNS["permuted_contexts"].holds_for("within_token")


@pytest.mark.parametrize("null", NULLS)
def test_every_null_is_judged_in_two_designs_besides_its_definition(null):
    judging = [d for d in DESIGNS.values() if d.holds_for(null) and not d.if_noise]
    assert sum(null not in design.own for design in judging) >= 2


def test_designs_of_the_real_logits_judge_no_null():
    names = {design.name for design in DESIGNS.values() if design.if_noise}
    assert names == {"real_marginal", "real_copula", "symmetric_marginal", "symmetric_copula"}
    assert not any(DESIGNS[name].holds_for(DIRECTED) for name in names)


def test_broken_assumptions_are_those_of_nulls_that_are_tested_there():
    for design in DESIGNS.values():
        assert all(null in NULLS and design.holds_for(null) for null in design.breaks)
    for name in ("real_marginal", "real_copula"):
        assert {"within_token", "within_token_split"} <= set(DESIGNS[name].breaks)
    kept = ("normal", "t4", "symmetric_marginal", "symmetric_copula", "shared_centre")
    for name in (*kept, "random_directions"):
        assert "within_token" not in DESIGNS[name].breaks
    assert not any("pooled" in design.breaks for design in DESIGNS.values())


def test_the_seed_decides(real):
    def draw(seed):
        return samples(DESIGNS["t4"], real, 20, np.random.default_rng(seed))[1].logits_LTE

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
