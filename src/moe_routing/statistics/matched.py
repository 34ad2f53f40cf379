"""Comparison at equal compute: a strategy against the static curve at its own mean experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bracket:
    """The two static strategies around a mean number of experts.

    Attributes:
        low: index of the lower one in the sorted sequence of k.
        high: index of the upper one; equal to ``low`` on a point of the curve.
        weight: share of the upper one.
    """

    low: int
    high: int
    weight: float


def bracket(mean_experts: float, ks: Sequence[float]) -> Bracket | None:
    """Find where a mean number of experts lies on a static curve.

    The static value at m between neighbouring k and l is (1 - w) y_k + w y_l with
    w = (m - k) / (l - k), taken item by item so that the comparison stays paired. It is the
    quality of giving k experts to a random share 1 - w of items and l to the others, if items did
    not interact; where loss is convex in k the chord lies above the curve, which favours the
    strategy compared with it.

    Args:
        mean_experts: mean experts a token.
        ks: numbers of experts of the static curve, ascending.

    Returns:
        None if ``mean_experts`` lies outside the curve.

    >>> bracket(5.0, [2, 4, 8]), bracket(4.0, [2, 4, 8]), bracket(1.5, [2, 4, 8])
    (Bracket(low=1, high=2, weight=0.25), Bracket(low=1, high=1, weight=0.0), None)
    """
    ks = np.asarray(ks, dtype=float)
    exact = np.flatnonzero(np.isclose(ks, mean_experts, rtol=0, atol=1e-6))
    if exact.size:
        return Bracket(int(exact[0]), int(exact[0]), 0.0)
    high = int(np.searchsorted(ks, mean_experts))
    if high in (0, len(ks)) or not np.isfinite(mean_experts):
        return None
    low = high - 1
    return Bracket(low, high, float((mean_experts - ks[low]) / (ks[high] - ks[low])))
