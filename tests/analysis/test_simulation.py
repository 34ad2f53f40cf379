"""Procedures keep their rates where the truth is known, and scores equal slow loops."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from moe_routing.analysis.outputs import SUM_TO_ZERO
from moe_routing.analysis.simulation import (
    Simulated,
    counters,
    procedures,
    score_procedure,
    simulate_p,
    simulate_procedures,
)

SETTING = {"repeats": 4000, "experts": 64, "effect": 3.0}


def score(name, alpha, p_TE, signals):
    counter = counters(p_TE.shape[1], [alpha])[name, alpha]
    return score_procedure(counter, Simulated.of(p_TE, signals))


@pytest.mark.parametrize("signals", [0, 4, 16])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_bh_has_exactly_its_rate_for_independent_nulls(rng, signals, alpha):
    p_TE = simulate_p(rng, signals=signals, correlation=0.0, **SETTING)
    found = score("bh", alpha, p_TE, signals)
    assert abs(found["fdr"] - alpha * (1 - signals / 64)) <= 3 * found["fdr_se"]


@pytest.mark.parametrize("signals", [0, 8])
def test_by_and_ebh_stay_below_alpha_under_equicorrelation(rng, signals):
    p_TE = simulate_p(rng, signals=signals, correlation=0.5, **SETTING)
    for name in ("by", "ebh"):
        found = score(name, 0.05, p_TE, signals)
        assert found["fdr"] + 3 * found["fdr_se"] < 0.05


def test_an_unadjusted_threshold_is_shown_failing(rng):
    p_TE = simulate_p(rng, signals=4, correlation=0.0, **SETTING)
    found = score("threshold", 0.05, p_TE, 4)
    assert found["fdr"] - 3 * found["fdr_se"] > 0.2
    assert found["power"] > score("bh", 0.05, p_TE, 4)["power"]


@pytest.mark.parametrize(("name", "method"), [("bh", "fdr_bh"), ("by", "fdr_by")])
def test_scores_equal_a_loop_over_statsmodels(rng, name, method):
    p_TE = simulate_p(rng, repeats=200, experts=20, signals=5, effect=2.5, correlation=0.3)
    proportions, true = [], []
    for p_E in p_TE:
        rejected = multipletests(p_E, alpha=0.1, method=method)[0]
        proportions.append(rejected[5:].sum() / max(1, rejected.sum()))
        true.append(rejected[:5].sum())
    found = score(name, 0.1, p_TE, 5)
    assert found["fdr"] == pytest.approx(np.mean(proportions))
    assert found["fdr_se"] == pytest.approx(np.std(proportions, ddof=1) / np.sqrt(200))
    assert found["power"] == pytest.approx(np.mean(true) / 5)


def test_equicorrelation_is_what_is_asked_for(rng):
    from scipy.stats import norm

    z_TE = norm.isf(simulate_p(rng, repeats=20000, experts=4, signals=1, effect=3, correlation=0.5))
    assert np.allclose(np.corrcoef(z_TE.T)[np.triu_indices(4, 1)], 0.5, atol=0.03)
    assert z_TE.mean(0) == pytest.approx([3, 0, 0, 0], abs=0.05)


def test_noise_that_sums_to_zero_is_exact_under_h0_and_negatively_correlated(rng):
    from scipy.stats import norm

    p_TE = simulate_p(
        rng, repeats=20000, experts=5, signals=1, effect=3, correlation=0, sum_to_zero=True
    )
    z_TE = norm.isf(p_TE)
    z_TE[:, 0] -= 3
    assert np.allclose(z_TE.sum(1), 0, atol=1e-9)
    assert z_TE.std(0) == pytest.approx(np.ones(5), abs=0.02)
    assert np.allclose(np.corrcoef(z_TE.T)[np.triu_indices(5, 1)], -0.25, atol=0.02)


@pytest.mark.parametrize(("name", "kept"), [("bh", True), ("by", True), ("threshold", False)])
def test_procedures_where_noise_sums_to_zero(rng, name, kept):
    p_TE = simulate_p(rng, signals=4, correlation=0.0, sum_to_zero=True, **SETTING)
    found = score(name, 0.05, p_TE, 4)
    assert (found["fdr"] - 3 * found["fdr_se"] <= 0.05) == kept
    assert found["power"] > 0.2


def test_the_table_has_a_row_for_every_setting(rng):
    table = simulate_procedures(
        rng, repeats=100, experts=8, signals=[0, 2], effect=3.0, correlations=[0.0, 0.5],
        alphas=[0.05, 0.1],
    )  # fmt: skip
    assert len(table) == len(procedures()) * 2 * 2 * 3
    names = ["correlation 0", "correlation 0.5", SUM_TO_ZERO]
    assert table["dependence"].drop_duplicates().tolist() == names
    assert table["correlation"].drop_duplicates().tolist() == [0.0, 0.5, -1 / 7]
    assert table.loc[table["signals"] == 0, "power"].isna().all()
    bh = table[(table["procedure"] == "bh") & (table["signals"] == 2) & (table["alpha"] == 0.1)]
    assert bh["bh_theory"].tolist() == pytest.approx([0.075] * 3)
