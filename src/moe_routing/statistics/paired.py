"""Tests of an arm against the baseline on the same items.

Shape letters: N items, C clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from moe_routing.statistics.bootstrap import Array
from moe_routing.statistics.proportions import (
    design_effect,
    paired_score_interval,
    tango_statistic,
)


@dataclass(frozen=True)
class Flips:
    """Items whose correctness changes (Dutta et al. 2024, arXiv 2407.09141).

    Attributes:
        lost: items that the baseline gets right and the arm gets wrong.
        gained: items that the baseline gets wrong and the arm gets right.
        n: all items.
    """

    lost: int
    gained: int
    n: int

    @property
    def proportion(self) -> float:
        """Proportion of items that change; 0 differences in accuracy can hide many."""
        return (self.lost + self.gained) / self.n


def count_flips(baseline: ArrayLike, arm: ArrayLike) -> Flips:
    """Count changes between two vectors of zeros and ones.

    >>> count_flips([1, 1, 0, 0], [0, 1, 1, 0])
    Flips(lost=1, gained=1, n=4)
    """
    was, now = np.asarray(baseline, dtype=bool), np.asarray(arm, dtype=bool)
    return Flips(int((was & ~now).sum()), int((~was & now).sum()), was.size)


@dataclass(frozen=True)
class PairedTable:
    """Discordant items of an arm and a reference, and the design effect of their differences."""

    flips: Flips
    effect: float

    @classmethod
    def of(cls, reference_N: Array, arm_N: Array, clusters: np.ndarray) -> PairedTable:
        """Count the items of two vectors of zeros and ones, (N,) each."""
        return cls(count_flips(reference_N, arm_N), design_effect(arm_N - reference_N, clusters))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the score interval of the difference, arm minus reference."""
        flips = self.flips
        return paired_score_interval(
            flips.lost, flips.gained, flips.n, confidence, design_effect=self.effect
        )

    @property
    def p_value(self) -> float:
        """Two-sided p-value of no difference: the score test whose inverse the interval is."""
        flips = self.flips
        z = tango_statistic(flips.lost, flips.gained, flips.n, 0.0) / math.sqrt(self.effect)
        return float(2 * stats.norm.sf(abs(z)))

    def estimate(self, confidence: float) -> tuple[float, float, float]:
        """Return the difference and its score interval."""
        return (self.flips.gained - self.flips.lost) / self.flips.n, *self.interval(confidence)


def signed_rank_p(difference_C: ArrayLike) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test, clusters counting equally.

    Assumption: differences are symmetric about their centre. Shown beside the p-value of the
    bootstrap-t as a check that a result does not depend on a few clusters. 1 if all differences are
    0.

    >>> round(signed_rank_p([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), 4)
    0.0312
    """
    difference_C = np.asarray(difference_C, dtype=float)
    difference_C = difference_C[difference_C != 0]
    if difference_C.size == 0:
        return 1.0
    # scipy makes the class of the result at run time.
    return float(stats.wilcoxon(difference_C).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
