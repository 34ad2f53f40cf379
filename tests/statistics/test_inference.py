"""Paired tests, corrections, ranks, power, fronts, brackets, verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from moe_routing.statistics.comparison import named_rng
from moe_routing.statistics.matched import Bracket, bracket, interpolate
from moe_routing.statistics.multiplicity import adjust
from moe_routing.statistics.paired import count_flips, sign_flip_p, signed_rank_p
from moe_routing.statistics.pareto import front_proportion, pareto_front
from moe_routing.statistics.power import detectable_accuracy, detectable_difference
from moe_routing.statistics.proportions import exact_mcnemar
from moe_routing.statistics.ranks import critical_difference, friedman, iman_davenport
from moe_routing.statistics.verdict import Verdict, verdict


def test_sign_flips_equal_scipys_exact_permutation_test(rng):
    difference = rng.normal(0.4, 1, 12)
    exact = stats.permutation_test(
        (difference, np.zeros(12)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    p = sign_flip_p(difference, permutations=40_000, rng=rng)
    assert p[0] == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000))


def test_sign_flips_of_shares_equal_mcnemar(rng):
    difference = np.repeat([-1.0, 1.0, 0.0], [14, 5, 60])
    p = sign_flip_p(difference, permutations=40_000, rng=rng)
    assert p[0] == pytest.approx(exact_mcnemar(14, 5), abs=0.005)


def test_sign_flips_keep_their_size_on_skewed_differences():
    rng = np.random.default_rng(5)
    p = np.concatenate(
        [
            sign_flip_p(rng.gamma(1.5, size=(80, 200)) - 1.5, permutations=500, rng=rng)
            for _ in range(10)
        ]
    )
    assert 0.03 <= np.mean(p <= 0.05) <= 0.08


def test_sign_flips_follow_the_seed_and_never_reach_zero(rng):
    difference = rng.normal(0.1, 1, (40, 3))

    def p_values(seed):
        return sign_flip_p(difference, permutations=200, rng=np.random.default_rng(seed))

    np.testing.assert_array_equal(p_values(1), p_values(1))
    assert (p_values(1) != p_values(2)).any()
    assert sign_flip_p(np.ones(50), permutations=99, rng=rng)[0] == 0.01
    assert sign_flip_p(np.zeros(50), permutations=99, rng=rng)[0] == 1


def test_signed_rank_equals_scipy(rng):
    difference = rng.normal(0.3, 1, 30)
    assert signed_rank_p(difference) == stats.wilcoxon(difference).pvalue
    assert signed_rank_p(np.zeros(5)) == 1


def test_flips_of_a_table():
    flips = count_flips([1, 1, 1, 0, 0], [1, 0, 0, 1, 0])
    assert (flips.lost, flips.gained, flips.proportion) == (2, 1, 0.6)


def test_adjustment_is_within_families_and_skips_missing(rng):
    p = rng.random(12) / 10
    p[3] = np.nan
    family = np.array(["primary"] * 5 + ["exploratory"] * 7)
    ours = adjust(p, family)
    np.testing.assert_allclose(ours[[0, 1, 2, 4]], multipletests(p[[0, 1, 2, 4]], method="holm")[1])
    np.testing.assert_allclose(ours[5:], multipletests(p[5:], method="fdr_bh")[1])
    assert np.isnan(ours[3])


def test_friedman_equals_scipy_and_demsar(rng):
    loss = rng.normal(size=(7, 5)) + np.arange(5) / 2
    result = friedman(loss)
    expected = stats.friedmanchisquare(*loss.T)
    assert (result.chi2, result.p_value) == pytest.approx(tuple(expected))
    assert (result.f, result.p_value_f) == iman_davenport(result.chi2, 7, 5)
    np.testing.assert_array_equal(result.average_rank_S, stats.rankdata(loss, axis=1).mean(0))


def test_numbers_of_demsars_example():
    # Demsar (2006), section 3.2.2: 14 data sets, 4 classifiers; F(3, 39) at 0.05 is 2.85.
    assert critical_difference(14, 4) == pytest.approx(1.25, abs=0.005)
    f, p_value = iman_davenport(9.28, 14, 4)
    assert f == pytest.approx(3.69, abs=0.005)
    assert p_value == pytest.approx(stats.f.sf(3.69, 3, 39), abs=1e-4)


@pytest.mark.parametrize(("strategies", "q"), [(2, 1.960), (5, 2.728), (10, 3.164)])
def test_critical_values_equal_demsars_table_5(strategies, q):
    root = math.sqrt(strategies * (strategies + 1) / 6)
    assert critical_difference(1, strategies) / root == pytest.approx(q, abs=6e-4)


def test_friedman_of_the_same_order_everywhere_and_of_ties():
    same = friedman(np.tile([1.0, 2.0, 3.0], (6, 1)))
    assert same.p_value_f == 0
    assert same.p_value < 0.01
    tied = friedman(np.ones((4, 3)))
    assert (tied.p_value, tied.p_value_f) == (1, 1)
    assert tied.average_rank_S.tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="at least 2 data sets"):
        friedman([[1, 2, 3]])


@pytest.mark.parametrize(
    ("n", "expected"), [(10_042, (0.40, 0.62, 0.88)), (5_153, (0.55, 0.87, 1.23))]
)
def test_detectable_accuracy_of_the_full_data_sets(n, expected):
    found = [round(100 * detectable_accuracy(n, psi), 2) for psi in (0.02, 0.05, 0.10)]
    assert found == list(expected)


def test_detectable_differences_are_found_as_often_as_promised():
    rng = np.random.default_rng(8)
    n, psi = 2000, 0.05
    gap = detectable_accuracy(n, psi)
    counts = rng.multinomial(n, [(psi + gap) / 2, (psi - gap) / 2, 1 - psi], size=4000)
    lost, gained = counts[:, 0], counts[:, 1]
    z = (lost - gained) / np.sqrt(lost + gained)
    assert np.mean(z > stats.norm.ppf(0.975)) == pytest.approx(0.80, abs=0.025)
    z = rng.normal(detectable_difference(0.2) / 0.2, 1, 40_000)
    assert np.mean(z > stats.norm.ppf(0.975)) == pytest.approx(0.80, abs=0.01)


def dominated(cost, loss, s):
    return any(
        cost[r] <= cost[s] and loss[r] <= loss[s] and (cost[r], loss[r]) != (cost[s], loss[s])
        for r in range(len(cost))
    )


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
)
def test_front_equals_a_loop(points):
    cost, loss = (list(map(float, column)) for column in zip(*points, strict=True))
    expected = [not dominated(cost, loss, s) for s in range(len(points))]
    assert pareto_front(cost, loss).tolist() == expected


def test_front_ignores_strategies_without_a_cost():
    assert pareto_front([np.nan, 1.0], [0.0, 5.0]).tolist() == [False, True]
    proportions = front_proportion([1.0, 2.0], np.array([[1.0, 0.0], [1.0, 2.0], [1.0, 3.0]]))
    assert proportions.tolist() == [1, pytest.approx(1 / 3)]


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        (2, Bracket(0, 0, 0.0)),
        (7, Bracket(2, 3, 0.5)),
        (8 + 1e-9, Bracket(3, 3, 0.0)),
        (1.99, None),
        (8.01, None),
        (math.nan, None),
    ],
)
def test_bracket(mean, expected):
    assert bracket(mean, [2, 4, 6, 8]) == expected


def test_bracket_of_an_empty_curve():
    assert bracket(4.0, []) is None


def test_interpolation_of_a_line_is_the_line(rng):
    slope = rng.normal(size=(20, 1))
    ks = np.array([2.0, 4.0, 8.0])
    found = interpolate(slope * ks, bracket(5.5, ks))
    np.testing.assert_allclose(found, slope[:, 0] * 5.5)


@pytest.mark.parametrize(
    ("difference", "p", "p_margin", "higher", "expected"),
    [
        (-0.03, 0.001, 0.9, True, Verdict.WORSE),
        (0.03, 0.001, 0.9, False, Verdict.WORSE),
        (0.03, 0.001, 0.001, True, Verdict.BETTER),
        (-0.03, 0.001, 0.001, False, Verdict.BETTER),
        (-0.002, 0.01, 0.001, True, Verdict.WORSE_WITHIN_MARGIN),
        (-0.002, 0.5, 0.001, True, Verdict.NON_INFERIOR),
        (-0.002, 0.5, 0.03, True, Verdict.INCONCLUSIVE),  # one-sided level is 0.025
        (-0.002, 0.5, math.nan, True, Verdict.INCONCLUSIVE),
        (0.0, 0.01, 0.5, True, Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts(difference, p, p_margin, higher, expected):
    found = verdict(difference, p, higher_is_better=higher, p_noninferior=p_margin)
    assert found is expected


def test_equal_results_are_identical():
    assert verdict(0, 1, higher_is_better=True, identical=True) is Verdict.IDENTICAL


def test_streams_depend_on_seed_and_label_only():
    assert named_rng(1, "a").random() == named_rng(1, "a").random()
    assert (
        len({named_rng(1, "a").random(), named_rng(1, "b").random(), named_rng(2, "a").random()})
        == 3
    )
