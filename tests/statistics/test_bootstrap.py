"""The cluster bootstrap: against closed forms, and by the coverage of its intervals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from moe_routing.statistics.bootstrap import (
    bootstrap_ratios,
    cluster_sums,
    one_sided_p,
    ratio_with_error,
    studentised_interval,
    two_sided_p,
)


def test_cluster_sums_equal_a_loop(rng):
    values, labels = rng.normal(size=(30, 2)), rng.choice(["x", "b", "a"], 30)
    expected = [values[labels == label].sum(0) for label in sorted(set(labels))]
    np.testing.assert_allclose(cluster_sums(values, labels), expected)


def test_error_of_a_mean_is_sd_over_root_n(rng):
    values = rng.normal(size=50)
    ratio, error = ratio_with_error(values, np.ones(50))
    assert ratio[0] == pytest.approx(values.mean())
    assert error[0] == pytest.approx(stats.sem(values))


def test_clustered_error_equals_statsmodels(rng):
    clusters = rng.integers(0, 12, 200)
    values = rng.normal(size=12)[clusters] + rng.normal(size=200)
    fit = sm.OLS(values, np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    _, error = ratio_with_error(cluster_sums(values, clusters), np.bincount(clusters).astype(float))
    assert error[0] == pytest.approx(fit.bse[0])


def test_every_resample_equals_a_loop_over_clusters():
    a, b = np.array([3.0, 1.0, 4.0, 1.0, 5.0]), np.array([2.0, 7.0, 1.0, 8.0, 2.0])
    boot = bootstrap_ratios(a, b, resamples=50, rng=np.random.default_rng(4))
    drawn = np.random.default_rng(4).integers(0, 5, size=(50, 5))
    for row, chosen in enumerate(drawn):
        ratio, error = ratio_with_error(a[chosen], b[chosen])
        assert boot.ratio_BS[row, 0] == pytest.approx(ratio[0])
        assert boot.error_BS[row, 0] == pytest.approx(error[0], abs=1e-9)


def test_resamples_do_not_depend_on_their_batches(monkeypatch):
    a, b = np.arange(9.0), np.ones(9)
    whole = bootstrap_ratios(a, b, resamples=40, rng=np.random.default_rng(0))
    monkeypatch.setattr("moe_routing.statistics.bootstrap._DRAWS_AT_ONCE", 20)
    pieces = bootstrap_ratios(a, b, resamples=40, rng=np.random.default_rng(0))
    np.testing.assert_allclose(whole.ratio_BS, pieces.ratio_BS)


def test_same_seed_same_interval_other_seed_other_interval(rng):
    a, b = rng.normal(10, 1, 40), rng.uniform(1, 5, 40)

    def limits(seed):
        boot = bootstrap_ratios(a, b, resamples=200, rng=np.random.default_rng(seed))
        return studentised_interval(boot, 0.95)[0][0]

    assert limits(1) == limits(1)
    assert limits(1) != limits(2)


@pytest.mark.parametrize("resamples", [100, 399, 1000])
def test_a_p_value_is_at_most_its_level_exactly_where_the_interval_leaves_zero_out(resamples):
    """Over many skewed series whose means lie about two errors from 0, at several levels."""
    rng = np.random.default_rng(3)
    a = rng.gamma(1.0, size=(40, 300)) - 1 + rng.normal(0, 0.35, 300)
    boot = bootstrap_ratios(a, np.ones_like(a), resamples=resamples, rng=rng)
    p = two_sided_p(boot)
    for confidence in (0.8, 0.9, 0.95):
        low, high = studentised_interval(boot, confidence)
        outside = (low > 0) | (high < 0)
        np.testing.assert_array_equal(outside, p <= 1 - confidence + 1e-9)
        assert 0.1 < outside.mean() < 0.9


def test_p_values_of_no_difference_are_uniform_and_never_zero():
    rng = np.random.default_rng(5)
    p = np.concatenate(
        [
            two_sided_p(
                bootstrap_ratios(
                    rng.gamma(1.5, size=(80, 200)) - 1.5, np.ones((80, 200)), resamples=500, rng=rng
                )
            )
            for _ in range(10)
        ]
    )
    assert 0.03 <= np.mean(p <= 0.05) <= 0.08
    far = bootstrap_ratios(rng.normal(9, 1, 50), np.ones(50), resamples=99, rng=rng)
    assert two_sided_p(far)[0] == pytest.approx(0.02)
    nothing = bootstrap_ratios(np.zeros(50), np.ones(50), resamples=99, rng=rng)
    assert two_sided_p(nothing)[0] == 1


def test_one_sided_p_is_the_inverse_of_the_interval(rng):
    a = rng.gamma(2.0, size=60)
    boot = bootstrap_ratios(a, np.ones(60), resamples=999, rng=rng)
    low, high = studentised_interval(boot, 0.95)
    width = high[0] - low[0]
    assert one_sided_p(boot, high[0] + 0.02 * width)[0] < 0.025 + 1e-3
    assert one_sided_p(boot, high[0] - 0.02 * width)[0] > 0.025
    # H0: mean <= margin is H0: -mean >= -margin.
    assert one_sided_p(boot.negated(), -low[0] + 0.02 * width)[0] < 0.025 + 1e-3


def test_without_spread_the_interval_is_a_point_and_p_is_certain():
    a = np.full(20, 0.1) * np.arange(1, 21)
    boot = bootstrap_ratios(a, np.arange(1.0, 21), resamples=100, rng=np.random.default_rng(0))
    low, high = studentised_interval(boot, 0.95)
    assert low[0] == high[0] == pytest.approx(0.1)
    assert one_sided_p(boot, 0.2)[0] == 0
    assert one_sided_p(boot, 0.05)[0] == 1


def test_few_clusters_use_students_t():
    a = np.array([1.0, 2.0, 4.0])
    boot = bootstrap_ratios(a, np.ones(3), resamples=100, rng=np.random.default_rng(0))
    low, high = studentised_interval(boot, 0.95)
    expected = stats.t.interval(0.95, 2, loc=a.mean(), scale=stats.sem(a))
    assert (low[0], high[0]) == pytest.approx(expected)
    assert one_sided_p(boot, 4.0)[0] == pytest.approx(
        stats.ttest_1samp(a, 4.0, alternative="less").pvalue
    )


def coverage(simulate, interval, truth, rng, batches=20):
    """Proportion of simulated studies whose interval holds the truth.

    The studies of a batch share their resamples, so there are many batches.
    """
    covered = []
    for _ in range(batches):
        boot = bootstrap_ratios(*simulate(rng, studies=200), resamples=600, rng=rng)
        low, high = interval(boot, 0.95)
        covered.append(np.mean((low <= truth + 1e-12) & (high >= truth - 1e-12)))
    return np.mean(covered)


def documents(rng, studies, clusters):
    """Nats and tokens of documents of unequal length; longer ones are easier to predict."""
    tokens = np.exp(rng.normal(6, 0.6, (clusters, studies)))
    rate = 3.0 + 0.4 * rng.normal(size=tokens.shape) - 0.15 * (np.log(tokens) - 6)
    return tokens * rate + 2.5 * np.sqrt(tokens) * rng.normal(size=tokens.shape), tokens


# E[tokens * rate] / E[tokens]: weighted by length, log tokens have mean 6 + 0.6^2.
DOCUMENT_TRUTH = 3.0 - 0.15 * 0.36


@pytest.mark.parametrize("clusters", [62, 150])
def test_bootstrap_t_of_perplexity_covers_its_level(clusters):
    rng = np.random.default_rng(11)
    simulate = partial(documents, clusters=clusters)
    assert 0.93 <= coverage(simulate, studentised_interval, DOCUMENT_TRUTH, rng) <= 0.97


def correlated(rng, studies, by_source):
    """Ten items of each of 40 sources, as sources or as if they were independent."""
    source = rng.normal(size=(40, 1, studies))
    items = source + rng.normal(size=(40, 10, studies))
    sums = items.sum(1) if by_source else items.reshape(400, studies)
    return sums, np.full(sums.shape, 10.0 if by_source else 1.0)


def test_resampling_items_instead_of_clusters_would_cover_too_little():
    rng = np.random.default_rng(13)
    items = partial(correlated, by_source=False)
    sources = partial(correlated, by_source=True)
    assert coverage(items, studentised_interval, 0.0, rng, batches=2) < 0.75
    assert coverage(sources, studentised_interval, 0.0, rng) >= 0.93
