"""The smallest true difference that a study of a given size is likely to detect."""

from __future__ import annotations

import math

from scipy import stats

POWER = 0.80
"""Probability of detecting a difference of the minimum detectable size."""
DISCORDANCES = (0.02, 0.05, 0.10)
"""Assumed proportions of items on which baseline and arm disagree."""


def detectable_accuracy(n: float, discordance: float, *, confidence: float = 0.95) -> float:
    """Return the minimum detectable difference of paired accuracies.

    Assumption: independent items, of which a proportion psi is discordant. An item's difference is
    -1, 0 or 1, with variance psi - d^2, so d = z sqrt((psi - d^2) / n) with
    z = z(1 - a/2) + z(power); solved for d: z sqrt(psi / (n + z^2)) (compare Connor 1987).

    >>> [round(100 * detectable_accuracy(10_042, psi), 2) for psi in DISCORDANCES]
    [0.4, 0.62, 0.88]
    >>> [round(100 * detectable_accuracy(5_153, psi), 2) for psi in DISCORDANCES]
    [0.55, 0.87, 1.23]
    """
    z = _z(confidence)
    return z * math.sqrt(discordance / (n + z * z))


def detectable_difference(standard_error: float, *, confidence: float = 0.95) -> float:
    """Return the minimum detectable difference of a mean with this standard error.

    Assumption: the estimate is close to normal and its observed clustered standard error is the
    true one; (z(1 - a/2) + z(power)) * standard error.

    >>> round(detectable_difference(0.01), 4)
    0.028
    """
    return _z(confidence) * standard_error


def _z(confidence: float) -> float:
    return float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(POWER))
