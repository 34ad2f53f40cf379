"""What small p-values ask of a null."""

from __future__ import annotations

import math


def min_draws(level: float) -> int:
    """Return how many null draws a p-value as small as a level needs: 1 / level.

    >>> min_draws(0.05 / 64)
    1280
    """
    return math.ceil(1 / level - 1e-6)
