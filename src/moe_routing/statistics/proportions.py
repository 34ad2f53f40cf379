"""Proportions: one sample, and two that are paired on the same items.

The paired table is given by its discordant counts: ``lost`` items that the baseline gets right and
the arm gets wrong, ``gained`` items the other way round. Differences are arm minus baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats
from statsmodels.stats.proportion import proportion_confint

from moe_routing.statistics.bootstrap import cluster_sums, ratio_with_error


def wilson_interval(
    successes: float, n: float, confidence: float, *, design_effect: float = 1.0
) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927).

    Assumption: independent items, or clusters whose design effect (variance over that of
    independent items) is given; then n is the effective number n / design_effect, as Dean & Pagano
    (2015) recommend for clustered surveys. Holds for small n and for proportions near 0 and 1.

    >>> low, high = wilson_interval(7, 10, 0.95)
    >>> round(low, 4), round(high, 4)
    (0.3968, 0.8922)
    """
    low, high = _limits(successes / design_effect, n / design_effect, confidence, "wilson")
    # At 0 and n successes rounding can leave the estimate just outside its limits.
    return min(max(low, 0.0), successes / n), max(min(high, 1.0), successes / n)


def clustered_wilson(
    values: ArrayLike, clusters: ArrayLike, confidence: float
) -> tuple[float, float]:
    """Return :func:`wilson_interval` of a mean of numbers in [0, 1] at their design effect.

    >>> low, high = clustered_wilson([1] * 7 + [0] * 3, range(10), 0.95)
    >>> round(low, 4), round(high, 4)
    (0.3968, 0.8922)
    """
    values = np.asarray(values, dtype=float)
    effect = design_effect(values, clusters)
    return wilson_interval(values.sum(), values.size, confidence, design_effect=effect)


def clustered_ratio(
    found_NS: ArrayLike,
    total_NS: ArrayLike,
    clusters: ArrayLike,
    size_S: ArrayLike,
    confidence: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return proportions of weighted counts, sum found / sum total, with Wilson limits, each (S,).

    The limits are those of :func:`wilson_interval` at the design effect of clusters: the clustered
    variance of the ratio over that of ``size`` independent observations, at least 1. A series
    without anything to count has none of the three.

    Args:
        found_NS: weight of what was found in each item, (N, S), at most ``total_NS``.
        total_NS: weight of everything in it.
        clusters: cluster label of each item, (N,).
        size_S: observations behind the total of each series; of unequal weights w, the effective
            number (sum w)^2 / sum w^2 (Kish 1965).
        confidence: level of the limits.

    >>> value, low, high = clustered_ratio([[1]] * 7 + [[0]] * 3, [[1]] * 10, range(10), [10], 0.95)
    >>> round(float(value[0]), 4), round(float(low[0]), 4), round(float(high[0]), 4)
    (0.7, 0.3968, 0.8922)
    """
    found_CS, total_CS = cluster_sums(found_NS, clusters), cluster_sums(total_NS, clusters)
    value_S, low_S, high_S = np.full((3, total_CS.shape[1]), np.nan)
    some_S = total_CS.sum(0) > 0
    if not some_S.any():
        return value_S, low_S, high_S
    ratio_S, error_S = ratio_with_error(found_CS[:, some_S], total_CS[:, some_S])
    n_S = np.asarray(size_S, dtype=float)[some_S]
    simple_S = ratio_S * (1 - ratio_S) / (n_S - 1).clip(min=1.0)
    # Nothing varies at 0 and 1, and the error of a single cluster is not known.
    known_S = (simple_S > 0) & np.isfinite(error_S)
    effect_S = np.divide(error_S**2, simple_S, out=np.ones_like(n_S), where=known_S).clip(min=1.0)
    n_S = n_S / effect_S
    limits = proportion_confint(ratio_S * n_S, n_S, alpha=1 - confidence, method="wilson")
    lower_S, upper_S = cast("tuple[np.ndarray, np.ndarray]", limits)
    value_S[some_S] = ratio_S
    # At 0 and 1 rounding can leave the estimate just outside its limits.
    low_S[some_S] = np.minimum(lower_S.clip(0, 1), ratio_S)
    high_S[some_S] = np.maximum(upper_S.clip(0, 1), ratio_S)
    return value_S, low_S, high_S


def exact_interval(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the exact interval of a proportion of independent items (Clopper & Pearson 1934).

    It covers at least ``confidence``, usually more.

    >>> low, high = exact_interval(7, 10, 0.95)
    >>> round(low, 4), round(high, 4)
    (0.3475, 0.9333)
    """
    return _limits(successes, n, confidence, "beta")


def _limits(successes: float, n: float, confidence: float, method: str) -> tuple[float, float]:
    limits = proportion_confint(successes, n, alpha=1 - confidence, method=method)
    low, high = cast("tuple[float, float]", limits)
    return float(low), float(high)


def design_effect(values: ArrayLike, clusters: ArrayLike) -> float:
    """Return the variance of a mean under clustering over that of independent items, at least 1.

    Estimates below 1 are noise far more often than negative correlation within clusters, so they
    count as 1. Constant values have effect 1.

    >>> round(design_effect([0, 0, 1, 1], ["a", "a", "b", "b"]), 6)
    3.0
    """
    values = np.asarray(values, dtype=float)
    ones = np.ones_like(values)
    _, simple = ratio_with_error(values, ones)
    sums, counts = cluster_sums(values, clusters), cluster_sums(ones, clusters)
    _, clustered = ratio_with_error(sums, counts)
    if len(sums) < 2 or not simple[0] > 0:
        return 1.0
    return max(1.0, float((clustered[0] / simple[0]) ** 2))


def exact_mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided exact p-value of equal accuracies (McNemar 1947).

    Assumption: independent items. Given the number of discordant items, the lost ones are
    binomial with probability 1/2.

    >>> round(exact_mcnemar(9, 1), 4)
    0.0215
    """
    discordant = lost + gained
    return 1.0 if discordant == 0 else float(stats.binomtest(lost, discordant).pvalue)


def tango_statistic(lost: float, gained: float, n: float, difference: float) -> float:
    """Return the score statistic of H0: true difference of paired proportions = ``difference``.

    z = (gained - lost - n d) / sqrt(n (2 q + d - d^2)), where q is the probability of a lost item
    that is most likely under H0 (Tango 1998); close to N(0, 1) under H0. Stays defined, and keeps
    its size, where no or few items are discordant.

    >>> round(tango_statistic(1, 0, 44, -0.1), 3)
    1.709
    """
    b = -(lost + gained) + difference * (2 * n + lost - gained)
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + difference - difference**2)
    excess = gained - lost - n * difference
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def paired_score_interval(
    lost: float, gained: float, n: float, confidence: float, *, design_effect: float = 1.0
) -> tuple[float, float]:
    """Return the score interval of a difference of paired proportions (Tango 1998).

    The differences that :func:`tango_statistic` does not reject. With clusters the table is
    divided by the design effect of the differences (the first-order correction of Rao & Scott
    1981).

    >>> low, high = paired_score_interval(1, 0, 44, 0.90)
    >>> round(low, 3), round(high, 3)
    (-0.096, 0.037)
    """
    lost, gained, n = lost / design_effect, gained / design_effect, n / design_effect
    z = float(stats.norm.ppf((1 + confidence) / 2))
    point = (gained - lost) / n
    edge = 1 - 1e-12

    def limit(sign: int) -> float:
        def gap(difference: float) -> float:
            return tango_statistic(lost, gained, n, difference) - sign * z

        end = -sign * edge
        if gap(end) * sign < 0:  # nothing up to the end of the scale is rejected
            return float(-sign)
        root = optimize.brentq(gap, *sorted((point, end)), xtol=1e-10)
        return float(cast("float", root))

    return limit(1), limit(-1)


def mixed_interval(
    first: tuple[float, float, float],
    second: tuple[float, float, float],
    weight: float,
    correlation: float,
) -> tuple[float, float]:
    """Return the interval of (1 - weight) x + weight y from those of x and y (MOVER).

    Recovers variances from the two intervals, separately below and above the estimates, so that
    the mixture inherits their coverage with few discordant items (Zou & Donner 2008, Statistics in
    Medicine 27:1693). At weight 0 it is the interval of x.

    Args:
        first: estimate, lower and upper limit of x.
        second: the same of y.
        weight: proportion of y.
        correlation: of the two estimates; one below 0 counts as 0.

    >>> low, high = mixed_interval((0.0, -3.0, 3.0), (0.0, -4.0, 4.0), 0.5, 0.0)
    >>> low, high
    (-2.5, 2.5)
    """
    x, x_low, x_high = ((1 - weight) * value for value in first)
    y, y_low, y_high = (weight * value for value in second)
    r = max(correlation, 0.0)

    def reach(a: float, b: float) -> float:
        return math.sqrt(a * a + b * b + 2 * r * a * b)

    return x + y - reach(x - x_low, y - y_low), x + y + reach(x_high - x, y_high - y)


def p_of_interval(limits: Callable[[float], tuple[float, float]]) -> float:
    """Return the two-sided p-value of 0 that belongs to an interval: the test is its inverse.

    Args:
        limits: lower and upper limit at a level of confidence, which contain each other as the
            level grows.

    >>> def normal(level):
    ...     reach = stats.norm.ppf((1 + level) / 2)
    ...     return 1.96 - reach, 1.96 + reach
    >>> round(p_of_interval(normal), 3)
    0.05
    """

    def excludes(z: float) -> float:
        """Return by how much 0 lies outside the interval of +-z."""
        low, high = limits(1 - 2 * float(stats.norm.sf(z)))
        return max(low, -high)

    least, most = 1e-6, 8.0
    if excludes(least) <= 0:
        return 1.0
    z = most if excludes(most) > 0 else optimize.brentq(excludes, least, most, xtol=1e-6)
    return float(2 * stats.norm.sf(z))


def paired_noninferiority_p(
    lost: float, gained: float, n: float, margin: float, *, design_effect: float = 1.0
) -> float:
    """Test H0: the arm's accuracy is lower by ``margin`` or more; one-sided p (Tango 1998).

    >>> round(paired_noninferiority_p(1, 0, 44, 0.1), 3)
    0.044
    """
    z = tango_statistic(lost, gained, n, -margin) / math.sqrt(design_effect)
    return float(stats.norm.sf(z))
