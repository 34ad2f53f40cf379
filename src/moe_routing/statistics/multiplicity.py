"""Corrections for testing many hypotheses."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from statsmodels.stats.multitest import multipletests

from moe_routing.statistics.bootstrap import Array

METHODS = {"primary": "holm", "exploratory": "fdr_bh"}
"""Holm (1979) bounds the chance of any false claim; BH (1995) the proportion of false claims."""


def adjust(p_values: ArrayLike, family: ArrayLike) -> Array:
    """Return adjusted p-values, each within its own family.

    Args:
        p_values: p-values; missing ones stay missing and do not count.
        family: "primary" (Holm) or "exploratory" (BH) for each.

    >>> adjust([0.01, 0.04, 0.01, 0.04], ["primary"] * 2 + ["exploratory"] * 2)
    array([0.02, 0.04, 0.02, 0.04])
    """
    p_values, family = np.asarray(p_values, dtype=float), np.asarray(family)
    adjusted = np.full(p_values.shape, np.nan)
    for name, method in METHODS.items():
        chosen = (family == name) & np.isfinite(p_values)
        if chosen.any():
            adjusted[chosen] = multipletests(p_values[chosen], method=method)[1]
    return adjusted
