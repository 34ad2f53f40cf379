"""The levels of step-up procedures, and what small p-values ask of a null; no torch.

Shape letters: E experts.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.float64]
"""The levels of a step-up procedure by rank, float64, (experts,)."""


def min_draws(level: float) -> int:
    """Return how many null draws a p-value as small as a level needs: 1 / level.

    >>> min_draws(0.05 / 64)
    1280
    """
    return math.ceil(1 / level - 1e-6)


def bh_levels(experts: int, alpha: float) -> Levels:
    """Return i * alpha / E (Benjamini & Hochberg 1995), float64, (experts,).

    FDR = alpha * m0/E for independent p-values, at most that under PRDS (Benjamini & Yekutieli
    2001). Centred logits sum to zero, so that PRDS cannot be assumed for them.
    """
    return np.arange(1.0, experts + 1) / experts * alpha


def by_levels(experts: int, alpha: float) -> Levels:
    """Return i * alpha / (E * H_E), H_E = 1 + ... + 1/E (Benjamini & Yekutieli 2001, thm. 1.3).

    FDR at most alpha * m0/E under any dependence.
    """
    harmonic = (1 / np.arange(1, experts + 1)).sum()
    return np.arange(1.0, experts + 1) / experts / harmonic * alpha


def threshold_levels(experts: int, alpha: float) -> Levels:
    """Return alpha for every i: each expert is tested without correction for multiplicity."""
    return np.full(experts, alpha)


def p_to_e(log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return e-values (1 - p + p ln p) / (p ln(p)^2) of p-values given as ln p < 0.

    The average over kappa in (0, 1) of the calibrators kappa * p^(kappa - 1) (Vovk & Wang 2021,
    Annals of Statistics 49, section 2): free of parameters, and decreasing in p.
    """
    log_p = np.asarray(log_p, dtype=np.float64)
    # (1 - p + p ln p) = -expm1(l) + l e^l cancels near p = 1, where the limit is 1/2.
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (-np.expm1(log_p) + log_p * np.exp(log_p)) / (np.exp(log_p) * log_p**2)
    return np.where(log_p > -1e-4, 0.5 - log_p / 6, value)


def ebh_levels(experts: int, alpha: float) -> Levels:
    """Return the p-values whose e-value is E / (i * alpha) (e-BH: Wang & Ramdas 2022, 2009.02824).

    e-BH rejects the i experts with the largest e-values for the largest i with
    e_(i) >= E / (i * alpha); with e-values calibrated from p-values by :func:`p_to_e` that is a
    step-up procedure on p-values. FDR at most alpha * m0/E under any dependence.
    """
    target_E = experts / (np.arange(1, experts + 1) * alpha)
    low_E, high_E = np.full(experts, -700.0), np.zeros(experts)
    for _ in range(100):
        middle_E = (low_E + high_E) / 2
        passes_E = p_to_e(middle_E) >= target_E
        low_E, high_E = np.where(passes_E, middle_E, low_E), np.where(passes_E, high_E, middle_E)
    return np.exp(low_E)
