"""Paired tests, corrections, power, fronts, brackets, verdicts."""

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
from moe_routing.statistics.paired import PairedTable, count_flips, signed_rank_p
from moe_routing.statistics.pareto import front_proportion, pareto_front
from moe_routing.statistics.power import detectable_accuracy, detectable_difference
from moe_routing.statistics.verdict import Verdict, verdict


@pytest.mark.parametrize(("lost", "gained"), [(14, 5), (9, 1), (3, 3), (0, 0), (30, 55)])
def test_the_score_test_is_mcnemars_and_the_inverse_of_its_interval(lost, gained):
    n = 400
    reference = np.repeat([1.0, 0.0, 1.0], [lost, gained, n - lost - gained])
    arm = np.repeat([0.0, 1.0, 1.0], [lost, gained, n - lost - gained])
    table = PairedTable.of(reference, arm, np.arange(n))
    if lost + gained:
        chi2 = (lost - gained) ** 2 / (lost + gained)  # McNemar without continuity correction
        assert table.p_value == pytest.approx(stats.chi2.sf(chi2, 1))
    else:
        assert table.p_value == 1
    for confidence in (0.5, 0.8, 0.95, 0.99):
        low, high = table.interval(confidence)
        assert (low > 0 or high < 0) == (table.p_value < 1 - confidence)


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
