"""Conformal risk control: the cheapest setting whose expected loss is at most a margin.

Angelopoulos, Bates, Fisch, Lei and Schuster (2208.02814). Settings are ordered so that the loss of
an example does not rise from one to the next. Losses lie between 0 and a bound B. With n
calibration examples, the first setting with ::

    n / (n + 1) * mean loss + B / (n + 1) <= margin

has an expected loss of at most the margin on a new example that is exchangeable with them. This
holds for any n, any model and any way in which the settings were made, as long as they do not
depend on the examples.

Shape letters: n examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_routing.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Controlled:
    """The setting that was found.

    Attributes:
        level: its index in the order of the settings.
        loss_n: loss of each example there.
        mean_losses: mean loss of each setting that was tried, by level.
    """

    level: int
    loss_n: Array
    mean_losses: dict[int, float]


def least_controlled(
    losses: Callable[[int], Array], levels: int, margin: float, bound: float
) -> Controlled:
    """Return the first level whose risk is controlled.

    Few levels are tried, because each may be a run of a model: where the logarithm of the risk,
    taken as linear between two levels, is that of the margin, and the middle where that closes in
    slowly. Each loss is first raised to that of the levels after it that were tried, so that losses
    do not rise with the level, as the theorem demands.

    Args:
        losses: from a level to the losses of the examples, (n,), in [0, ``bound``].
        levels: number of levels.
        margin: what the expected loss may be.
        bound: largest loss that an example can have.

    Raises:
        InputError: too few examples for the margin, or a larger risk at every level.

    >>> found = least_controlled(lambda level: np.full(99, (9 - level) / 10), 10, 0.205, 1.0)
    >>> found.level, round(float(found.loss_n.mean()), 3)
    (8, 0.1)
    """
    # The risk is controlled at high once that was tried, and not at low.
    low, high = -1, levels - 1
    raised: dict[int, Array] = {}
    means, risks = {}, {}
    slow = 0
    while high not in raised or high - low > 1:
        width = high - low
        if width == 1:
            level = high
        elif low in risks and high in risks and slow < 2:
            level = _crossing(low, high, risks, margin)
        else:
            level = (low + high) // 2
        own_n = losses(level)
        check_examples(len(own_n), margin, bound)
        raised_n = np.maximum(own_n, raised[high]) if high in raised else own_n
        means[level], risks[level] = float(own_n.mean()), risk(raised_n, bound)
        if risks[level] <= margin:
            high, raised[level] = level, raised_n
        elif level == levels - 1:
            raise InputError(
                f"the most that can be kept has a risk of {risks[level]:.3g}; allowed: at most the "
                f"margin, {margin:g}"
            )
        else:
            low = level
        slow = slow + 1 if high - low > width / 2 else 0
    return Controlled(high, raised[high], dict(sorted(means.items())))


def _crossing(low: int, high: int, risks: dict[int, float], margin: float) -> int:
    """Return the level between two whose risk is the margin if its logarithm falls linearly.

    >>> _crossing(0, 10, {0: 1.0, 10: 0.01}, 0.1)
    5
    """
    above, below = (np.log(risks[level] / margin) for level in (low, high))
    level = round(low + (high - low) * above / (above - below))
    return min(max(level, low + 1), high - 1)


def risk(loss_n: Array, bound: float) -> float:
    """Return the bound on the expected loss, n / (n + 1) * mean + bound / (n + 1).

    >>> risk(np.zeros(99), 1.0)
    0.01
    """
    return float((loss_n.sum() + bound) / (len(loss_n) + 1))


def check_examples(n: int, margin: float, bound: float) -> None:
    """Check that there are enough examples for a margin: risk can be no less than B / (n + 1).

    That must leave room for losses above 0.

    Raises:
        InputError: there are not.
    """
    needed = int(np.floor(bound / margin + 1e-9))
    if n < needed:
        raise InputError(
            f"{n} calibration documents; allowed: at least {needed}, for a margin of {margin:g} "
            f"and losses of at most {bound:g}"
        )
