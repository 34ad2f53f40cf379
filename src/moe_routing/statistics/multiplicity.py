"""Corrections for testing many hypotheses."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from statsmodels.stats.multitest import multipletests

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
            method = "fdr_bh" if name == EXPLORATORY else "holm"
            adjusted[chosen] = multipletests(p_values[chosen], method=method)[1]
    return adjusted


def holm(p_values: ArrayLike) -> Array:
    """Return p-values adjusted by Holm (1979) as one family; missing ones do not count.

    >>> holm([0.01, np.nan, 0.04])
    array([0.02,  nan, 0.04])
    """
    return adjust(p_values, np.zeros(np.shape(p_values)))
