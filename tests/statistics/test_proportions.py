"""Proportions, alone and paired, against statsmodels, scipy and published examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar

from moe_routing.statistics.proportions import (
    clustered_ratio,
    clustered_wilson,
    design_effect,
    exact_interval,
    exact_mcnemar,
    paired_noninferiority_p,
    paired_score_interval,
    tango_statistic,
    wilson_interval,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 17), (81, 263), (10, 10)])
def test_intervals_equal_scipy(successes, n):
    result = stats.binomtest(successes, n)
    for ours, method in ((wilson_interval, "wilson"), (exact_interval, "exact")):
        theirs = result.proportion_ci(0.95, method=method)
        assert ours(successes, n, 0.95) == pytest.approx(tuple(theirs), abs=1e-9)


def test_newcombe_1998_examples():
    # Newcombe (1998, Statistics in Medicine 17:857), table I: 81/263 and 15/148.
    assert wilson_interval(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert exact_interval(15, 148, 0.95) == pytest.approx((0.0578, 0.1617), abs=5e-5)


def test_wilson_covers_its_level_in_small_clustered_samples():
    rng = np.random.default_rng(7)
    covered = []
    for _ in range(1500):
        tendency = rng.random((60, 1))
        own = rng.random((60, 3))
        right = (np.where(rng.random(own.shape) < 0.5, tendency, own) < 0.7).ravel()
        effect = design_effect(right, np.repeat(np.arange(60), 3))
        low, high = wilson_interval(right.sum(), 180, 0.95, design_effect=effect)
        covered.append(low <= 0.7 <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_design_effect_of_repeated_items_is_their_number(rng):
    values = np.repeat(rng.random(200) < 0.3, 4)
    assert design_effect(values, np.repeat(np.arange(200), 4)) == pytest.approx(4, rel=0.01)
    assert design_effect(values, np.arange(800)) == 1
    assert design_effect(np.ones(8), np.arange(8) // 2) == 1


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (9, 2), (30, 41), (59, 16)])
def test_mcnemar_equals_statsmodels(lost, gained):
    table = [[100, lost], [gained, 50]]
    assert exact_mcnemar(lost, gained) == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_tango_1998_crossover_trial():
    # Tango (1998, Statistics in Medicine 17:891), soft contact lenses: 43 of 44 pairs succeed with
    # both, one with the standard only; margin 0.1: Z = 1.709, p = 0.044; 90 % (-0.096, 0.037).
    assert tango_statistic(1, 0, 44, -0.1) == pytest.approx(1.709, abs=5e-4)
    assert paired_noninferiority_p(1, 0, 44, 0.1) == pytest.approx(0.044, abs=5e-4)
    assert paired_score_interval(1, 0, 44, 0.90) == pytest.approx((-0.096, 0.037), abs=5e-4)


@pytest.mark.parametrize("difference", [-0.3, -0.05, 0.0, 0.04, 0.2])
@pytest.mark.parametrize(("lost", "gained", "n"), [(12, 5, 60), (0, 3, 40), (7, 0, 30)])
def test_tango_statistic_equals_numerical_likelihood(lost, gained, n, difference):
    def minus_log_likelihood(q):
        cells = ((lost, q), (gained, q + difference), (n - lost - gained, 1 - 2 * q - difference))
        return -sum(count * math.log(p) for count, p in cells if count)

    bounds = (max(0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
    q = optimize.minimize_scalar(
        minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}
    ).x
    expected = (gained - lost - n * difference) / math.sqrt(
        n * (2 * q + difference - difference**2)
    )
    ours = tango_statistic(lost, gained, n, difference)
    assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_paired_score_interval_is_the_inverse_of_the_test():
    low, high = paired_score_interval(40, 25, 500, 0.95)
    assert tango_statistic(40, 25, 500, low) == pytest.approx(stats.norm.ppf(0.975))
    assert tango_statistic(40, 25, 500, high) == pytest.approx(stats.norm.ppf(0.025))
    assert paired_noninferiority_p(40, 25, 500, -low) == pytest.approx(0.025)
    assert paired_score_interval(25, 40, 500, 0.95) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (0, 5), (5, 5)])
def test_paired_score_interval_of_extreme_tables(lost, gained):
    low, high = paired_score_interval(lost, gained, 5 if lost != gained else 10, 0.95)
    assert -1 <= low < (gained - lost) / 5 < high <= 1 or lost != gained
    assert high - low > 0.3


def test_paired_score_interval_covers_its_level_with_few_discordant_items():
    rng = np.random.default_rng(3)
    counts = rng.multinomial(200, [0.014, 0.006, 0.98], size=2000)
    tables, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    limits = [paired_score_interval(lost, gained, 200, 0.95) for lost, gained in tables]
    covered = np.array([low <= -0.008 <= high for low, high in limits])
    assert 0.93 <= covered @ times / 2000 <= 0.98


def test_a_design_effect_is_a_smaller_sample():
    smaller = paired_score_interval(20, 10, 200, 0.95)
    assert paired_score_interval(60, 30, 600, 0.95, design_effect=3) == pytest.approx(smaller)
    assert paired_noninferiority_p(60, 30, 600, 0.1, design_effect=3) == pytest.approx(
        paired_noninferiority_p(20, 10, 200, 0.1)
    )


def test_a_clustered_ratio_is_wilsons_without_clusters_or_weights(rng):
    values = (rng.random((300, 2)) < [0.2, 0.6]).astype(float)
    value_S, low_S, high_S = clustered_ratio(
        values, np.ones_like(values), range(300), [300, 300], 0.9
    )
    for found, value, *limits in zip(values.T, value_S, low_S, high_S, strict=True):
        assert value == pytest.approx(found.mean())
        assert limits == pytest.approx(clustered_wilson(found, range(300), 0.9))


def test_a_clustered_ratio_is_that_of_its_values_where_weights_are_equal(rng):
    cluster = np.repeat(range(30), 10)
    values = (rng.random(30) < 0.4)[cluster].astype(float)[:, None]
    value_S, *limits = clustered_ratio(values, np.ones_like(values), cluster, [300], 0.95)
    assert value_S[0] == pytest.approx(values.mean())
    expected = clustered_wilson(values[:, 0], cluster, 0.95)
    assert [limit[0] for limit in limits] == pytest.approx(expected)
    assert limits[1][0] - limits[0][0] > 2 * np.diff(wilson_interval(values.sum(), 300, 0.95))


def test_clustered_ratios_at_their_ends_and_without_anything_to_count():
    found = np.array([[0, 3, 0], [0, 1, 0], [0, 2, 0.0]])
    total = np.array([[2, 3, 0], [1, 1, 0], [3, 2, 0.0]])
    value_S, low_S, high_S = clustered_ratio(found, total, [0, 1, 2], [6, 6, 0], 0.95)
    assert value_S[:2].tolist() == [0, 1]
    assert low_S[0] == 0 < high_S[0] < 1
    assert high_S[1] == 1 > low_S[1] > 0
    assert np.isnan([value_S[2], low_S[2], high_S[2]]).all()
    nothing = clustered_ratio(found[:, 2:], total[:, 2:], [0, 1, 2], [0], 0.95)
    assert np.isnan(nothing).all()


def test_limits_of_a_weighted_ratio_cover_it():
    """Pairs drawn with unequal chances count with the inverse of their chance."""
    inside = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        weight = rng.choice([1.0, 4.0], (60, 5))
        hit = rng.random((60, 5)) < np.where(weight > 1, 0.5, 0.2)
        truth = (0.5 * 4 + 0.2) / 5
        size = weight.sum() ** 2 / (weight**2).sum()
        _, low, high = clustered_ratio(
            (weight * hit).sum(1)[:, None], weight.sum(1)[:, None], range(60), [size], 0.95
        )
        inside += low[0] <= truth <= high[0]
    assert 275 <= inside <= 297
