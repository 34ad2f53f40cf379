"""Ranks of strategies over data sets: Friedman's test and Nemenyi's critical difference.

Shape letters: D data sets, S strategies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from moe_routing.statistics.bootstrap import Array


@dataclass(frozen=True)
class Friedman:
    """Result of Friedman's test.

    Attributes:
        average_rank_S: mean rank of each strategy, 1 is best.
        chi2: Friedman's statistic, corrected for ties.
        p_value: from chi-squared with S - 1 degrees of freedom.
        f: statistic of Iman & Davenport (1980), less conservative.
        p_value_f: its p-value.
        critical_difference: least significant difference of average ranks (Nemenyi).
        nemenyi_p_SS: pairwise p-values.
    """

    average_rank_S: Array
    chi2: float
    p_value: float
    f: float
    p_value_f: float
    critical_difference: float
    nemenyi_p_SS: Array


def friedman(loss_DS: ArrayLike, *, confidence: float = 0.95) -> Friedman:
    """Compare strategies by their ranks within data sets (Friedman 1937; Demsar 2006).

    Assumption: data sets are independent draws from the population of tasks of interest. With three
    of them there is little power: only the same order in all of them is significant, and a test
    without significance shows almost nothing.

    Args:
        loss_DS: smaller is better; at least 2 data sets and 3 strategies.
        confidence: level of the critical difference.

    Raises:
        ValueError: too few data sets or strategies.

    >>> result = friedman([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 3, 2]])
    >>> result.average_rank_S, round(result.chi2, 3), round(result.critical_difference, 3)
    (array([1.  , 2.25, 2.75]), 6.5, 1.657)
    """
    loss_DS = np.asarray(loss_DS, dtype=float)
    sets, strategies = loss_DS.shape
    if sets < 2 or strategies < 3:
        raise ValueError("Friedman's test needs at least 2 data sets and 3 strategies")
    rank_S = stats.rankdata(loss_DS, axis=1).mean(0)
    if np.ptp(loss_DS, axis=1).max() == 0:  # all tied everywhere: nothing to test
        chi2, p_value, f, p_f = 0.0, 1.0, 0.0, 1.0
    else:
        chi2, p_value = (float(x) for x in stats.friedmanchisquare(*loss_DS.T))
        f, p_f = iman_davenport(chi2, sets, strategies)
    distance = critical_difference(sets, strategies, confidence)
    return Friedman(rank_S, chi2, p_value, f, p_f, distance, _nemenyi(loss_DS))


def critical_difference(sets: int, strategies: int, confidence: float = 0.95) -> float:
    """Return Nemenyi's critical difference q sqrt(S (S + 1) / (6 D)) (Demsar 2006, section 3.2.2).

    q is the quantile of the studentised range for S groups and infinite degrees of freedom,
    divided by sqrt(2).

    >>> round(critical_difference(14, 4), 2)
    1.25
    """
    q = stats.studentized_range.ppf(confidence, strategies, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(strategies * (strategies + 1) / (6 * sets)))


def iman_davenport(chi2: float, sets: int, strategies: int) -> tuple[float, float]:
    """Return F = (D - 1) chi2 / (D (S - 1) - chi2) and its p-value (Iman & Davenport 1980).

    F has S - 1 and (S - 1)(D - 1) degrees of freedom; with the same order in every data set it is
    infinite.

    >>> f, p_value = iman_davenport(9.28, 14, 4)
    >>> round(f, 2), round(p_value, 3)
    (3.69, 0.02)
    """
    rest = sets * (strategies - 1) - chi2
    if rest <= 1e-9:  # the same order in every data set
        return math.inf, 0.0
    f = (sets - 1) * chi2 / rest
    degrees = strategies - 1
    return f, float(stats.f.sf(f, degrees, degrees * (sets - 1)))


def _nemenyi(loss_DS: Array) -> Array:
    # Imported here: it takes a second, and only this test needs it.
    from scikit_posthocs import posthoc_nemenyi_friedman

    return posthoc_nemenyi_friedman(loss_DS).to_numpy(dtype=float)
