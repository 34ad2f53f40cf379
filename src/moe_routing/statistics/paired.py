"""Tests of an arm against the baseline on the same items.

Shape letters: N items, C clusters, S arms, P permutations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from moe_routing.statistics.bootstrap import Array
from moe_routing.statistics.proportions import design_effect, paired_score_interval

_SIGNS_AT_ONCE = 2_000_000


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

    def estimate(self, confidence: float) -> tuple[float, float, float]:
        """Return the difference and its score interval."""
        return (self.flips.gained - self.flips.lost) / self.flips.n, *self.interval(confidence)


def sign_flip_p(difference_CS: ArrayLike, *, permutations: int, rng: np.random.Generator) -> Array:
    """Test that differences summed within clusters are 0 on average; two-sided p-values, (S,).

    The names "baseline" and "arm" are exchanged at random, a whole cluster at a time, and
    p = (1 + #{|sum*| >= |sum|}) / (permutations + 1). Exact where names are exchangeable under H0;
    otherwise asymptotically right for a mean difference of 0, since sum / sqrt(sum of squares), a
    studentised statistic, has the same permutation p-value (Janssen 1997). With one item per
    cluster, and zeros and ones, it is McNemar's exact test by simulation.

    This, not the signed-rank test, is the p-value reported for nats: it tests the quantity that is
    reported (the sum over tokens, long documents counting more) and respects clusters.

    >>> rng = np.random.default_rng(0)
    >>> p = sign_flip_p([-1.0] * 9 + [1.0], permutations=9999, rng=rng)
    >>> bool(abs(p[0] - 0.0215) < 0.006)
    True
    """
    difference_CS = np.asarray(difference_CS, dtype=float)
    if difference_CS.ndim == 1:
        difference_CS = difference_CS[:, None]
    clusters = len(difference_CS)
    sum_S = difference_CS.sum(0)
    # Sums that are equal in exact arithmetic differ by rounding; they count as equal.
    observed_S = np.abs(sum_S) - 1e-9 * np.abs(difference_CS).sum(0)
    extreme_S = np.zeros(difference_CS.shape[1])
    chunk = max(1, _SIGNS_AT_ONCE // clusters)
    for start in range(0, permutations, chunk):
        shape = (min(chunk, permutations - start), clusters)
        flipped_PC = rng.integers(0, 2, size=shape, dtype=np.int8).astype(float)
        permuted_PS = sum_S - 2 * (flipped_PC @ difference_CS)
        extreme_S += (np.abs(permuted_PS) >= observed_S).sum(0)
    return (1 + extreme_S) / (permutations + 1)


def signed_rank_p(difference_C: ArrayLike) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test, clusters counting equally.

    Assumption: differences are symmetric about their centre. Shown beside :func:`sign_flip_p` as a
    check that a result does not depend on a few clusters. 1 if all differences are 0.

    >>> round(signed_rank_p([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), 4)
    0.0312
    """
    difference_C = np.asarray(difference_C, dtype=float)
    difference_C = difference_C[difference_C != 0]
    if difference_C.size == 0:
        return 1.0
    # scipy makes the class of the result at run time.
    return float(stats.wilcoxon(difference_C).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
