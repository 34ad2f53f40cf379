"""Numbers of experts as histograms: quantiles, caps, saturation.

Pure functions of arrays. Shape letters: L layers, C counts of experts (0 ... E).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SATURATED = 0.95
"""A cap is high enough where the mean reaches this proportion of the mean without a cap."""


def histogram_quantiles(histogram_C: ArrayLike, levels: ArrayLike) -> NDArray[np.int64]:
    """Return the smallest counts c with P(count <= c) >= level.

    The same as ``np.quantile(..., method="inverted_cdf")`` on the counts themselves.

    >>> histogram_quantiles([0, 3, 1], [0.5, 0.9])
    array([1, 2])
    """
    cumulated_C = np.cumsum(np.asarray(histogram_C, dtype=float))
    # A product that is a whole number in exact arithmetic may be rounded up.
    wanted = np.asarray(levels, dtype=float) * cumulated_C[-1] * (1 - 1e-12)
    return np.searchsorted(cumulated_C, wanted)


def capped_means(histogram_C: ArrayLike) -> NDArray[np.float64]:
    """Return the mean of min(count, K) for K = 1 ... E, (E,).

    They are the means of an uncapped run under a cap K that changes nothing else. E[min(X, K)] is
    the sum of P(X >= j) over j = 1 ... K.

    >>> capped_means([0, 1, 0, 1])
    array([1. , 1.5, 2. ])
    """
    histogram_C = np.asarray(histogram_C, dtype=float)
    at_least_C = np.cumsum(histogram_C[::-1])[::-1] / histogram_C.sum()
    return np.cumsum(at_least_C[1:])


def saturation_point(histogram_C: ArrayLike, proportion: float = SATURATED) -> int:
    """Return the smallest cap K at which the mean reaches a proportion of the uncapped mean.

    >>> saturation_point([0, 0, 0, 0, 1, 0, 0])
    4
    """
    mean_K = capped_means(histogram_C)
    return int(np.argmax(mean_K >= proportion * mean_K[-1] * (1 - 1e-12))) + 1


def reduction_percent(mean_experts: float, k: int) -> float:
    """Return how many experts fewer than top-k, in percent; negative if more.

    >>> reduction_percent(6.0, 8)
    25.0
    """
    return 100 * (1 - mean_experts / k)
