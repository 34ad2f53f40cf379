"""Procedures keep their rates where the truth is known, and scores equal slow loops."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from moe_routing.analysis.simulation import (
    procedures,
    score_procedure,
    simulate_p,
    simulate_procedures,
)

SETTING = {"repeats": 4000, "experts": 64, "effect": 3.0}


@pytest.mark.parametrize("signals", [0, 4, 16])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_bh_has_exactly_its_rate_for_independent_nulls(rng, signals, alpha):
    p_TE = simulate_p(rng, signals=signals, correlation=0.0, **SETTING)
    score = score_procedure(procedures()["bh"], alpha, p_TE, signals)
    assert abs(score["fdr"] - alpha * (1 - signals / 64)) <= 3 * score["fdr_se"]


@pytest.mark.parametrize("signals", [0, 8])
def test_by_and_ebh_stay_below_alpha_under_equicorrelation(rng, signals):
    p_TE = simulate_p(rng, signals=signals, correlation=0.5, **SETTING)
    for name in ("by", "ebh"):
        score = score_procedure(procedures()[name], 0.05, p_TE, signals)
        assert score["fdr"] + 3 * score["fdr_se"] < 0.05


def test_an_unadjusted_threshold_is_shown_failing(rng):
    p_TE = simulate_p(rng, signals=4, correlation=0.0, **SETTING)
    score = score_procedure(procedures()["threshold"], 0.05, p_TE, 4)
    assert score["fdr"] - 3 * score["fdr_se"] > 0.2
    assert score["power"] > score_procedure(procedures()["bh"], 0.05, p_TE, 4)["power"]


@pytest.mark.parametrize(("name", "method"), [("bh", "fdr_bh"), ("by", "fdr_by")])
def test_scores_equal_a_loop_over_statsmodels(rng, name, method):
    p_TE = simulate_p(rng, repeats=200, experts=20, signals=5, effect=2.5, correlation=0.3)
    proportions, found = [], []
    for p_E in p_TE:
        rejected = multipletests(p_E, alpha=0.1, method=method)[0]
        proportions.append(rejected[5:].sum() / max(1, rejected.sum()))
        found.append(rejected[:5].sum())
    score = score_procedure(procedures()[name], 0.1, p_TE, 5)
    assert score["fdr"] == pytest.approx(np.mean(proportions))
    assert score["fdr_se"] == pytest.approx(np.std(proportions, ddof=1) / np.sqrt(200))
    assert score["power"] == pytest.approx(np.mean(found) / 5)


def test_equicorrelation_is_what_is_asked_for(rng):
    from scipy.stats import norm

    z_TE = norm.isf(simulate_p(rng, repeats=20000, experts=4, signals=1, effect=3, correlation=0.5))
    assert np.allclose(np.corrcoef(z_TE.T)[np.triu_indices(4, 1)], 0.5, atol=0.03)
    assert z_TE.mean(0) == pytest.approx([3, 0, 0, 0], abs=0.05)


def test_the_table_has_a_row_for_every_setting(rng):
    table = simulate_procedures(
        rng, repeats=100, experts=8, signals=[0, 2], effect=3.0, correlations=[0.0, 0.5],
        alphas=[0.05, 0.1],
    )  # fmt: skip
    assert len(table) == len(procedures()) * 2 * 2 * 2
    assert table.loc[table["signals"] == 0, "power"].isna().all()
    bh = table[(table["procedure"] == "bh") & (table["signals"] == 2) & (table["alpha"] == 0.1)]
    assert bh["bh_theory"].tolist() == pytest.approx([0.075, 0.075])
