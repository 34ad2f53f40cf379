"""The verdict on a difference, computed from its numbers, so that prose follows the results."""

from __future__ import annotations

import math
from enum import StrEnum


class Verdict(StrEnum):
    """The possible outcomes of a comparison with the baseline."""

    IDENTICAL = "identical"  # every item has the same result
    BETTER = "better"
    NON_INFERIOR = "non-inferior"  # a loss of the margin was ruled out; no difference was shown
    WORSE_WITHIN_MARGIN = "worse within margin"  # a loss, and one of the margin was ruled out
    WORSE = "worse"  # a loss, and one of the margin was not ruled out
    INCONCLUSIVE = "inconclusive"  # neither a difference nor its absence could be shown


LOSSES = (Verdict.WORSE, Verdict.WORSE_WITHIN_MARGIN)
SHOWN = (Verdict.BETTER, *LOSSES)
"""Outcomes for which a difference was shown."""


def verdict(
    difference: float,
    p_value: float,
    *,
    higher_is_better: bool,
    confidence: float = 0.95,
    p_noninferior: float = math.nan,
    identical: bool = False,
) -> Verdict:
    """Return the outcome of a comparison.

    Args:
        difference: arm minus baseline.
        p_value: two-sided p-value of no difference, adjusted for multiplicity; significant at
            1 - confidence.
        higher_is_better: orientation of the metric.
        confidence: level of the study's intervals.
        p_noninferior: one-sided p-value of a loss of at least the margin, adjusted; significant at
            (1 - confidence) / 2, the usual level of non-inferiority (ICH E9). NaN: not tested.
        identical: no item differs between baseline and arm.

    >>> str(verdict(-0.03, 0.001, higher_is_better=True, p_noninferior=0.9))
    'worse'
    >>> str(verdict(-0.001, 0.6, higher_is_better=True, p_noninferior=0.001))
    'non-inferior'
    >>> str(verdict(-0.001, 0.6, higher_is_better=True, p_noninferior=0.2))
    'inconclusive'
    """
    if identical:
        return Verdict.IDENTICAL
    different = p_value <= 1 - confidence and difference != 0
    noninferior = p_noninferior <= (1 - confidence) / 2
    if different and (difference > 0) == higher_is_better:
        return Verdict.BETTER
    if different:
        return Verdict.WORSE_WITHIN_MARGIN if noninferior else Verdict.WORSE
    return Verdict.NON_INFERIOR if noninferior else Verdict.INCONCLUSIVE
