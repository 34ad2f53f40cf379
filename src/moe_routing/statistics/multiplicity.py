"""Corrections for testing many hypotheses."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import false_discovery_control

from moe_routing.statistics.bootstrap import Array

EXPLORATORY = "exploratory"
"""Family whose proportion of false claims is bounded (BH 1995); in every other family the chance of
any false claim is (Holm 1979)."""


def adjust(p_values: ArrayLike, family: ArrayLike) -> Array:
    """Return adjusted p-values, each within its own family.

    Args:
        p_values: p-values; missing ones stay missing and do not count.
        family: name of the family of each: exploratory (BH), or any other (Holm).

    >>> adjust([0.01, 0.04, 0.01, 0.04], ["wikipedia"] * 2 + ["exploratory"] * 2)
    array([0.02, 0.04, 0.02, 0.04])
    """
    p_values, family = np.asarray(p_values, dtype=float), np.asarray(family)
    adjusted = np.full(p_values.shape, np.nan)
    for name in dict.fromkeys(family.tolist()):
        chosen = (family == name) & np.isfinite(p_values)
        if chosen.any():
            correct = false_discovery_control if name == EXPLORATORY else _holm
            adjusted[chosen] = correct(p_values[chosen])
    return adjusted


def holm(p_values: ArrayLike) -> Array:
    """Return p-values adjusted by Holm (1979) as one family; missing ones do not count.

    >>> holm([0.01, np.nan, 0.04])
    array([0.02,  nan, 0.04])
    """
    return adjust(p_values, np.zeros(np.shape(p_values)))


def _holm(p_N: Array) -> Array:
    """Return the p-values of one family adjusted by Holm (1979), by its definition.

    That of statsmodels collects garbage in each call: more than half of the time of the statistics.
    """
    order_N = p_N.argsort()
    stepwise_N = p_N[order_N] * np.arange(len(p_N), 0, -1)
    adjusted_N = np.empty_like(p_N)
    adjusted_N[order_N] = np.maximum.accumulate(stepwise_N).clip(max=1.0)
    return adjusted_N
