"""Pareto fronts: strategies that no other beats in cost and loss.

Shape letters: S strategies, B resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_routing.statistics.bootstrap import Array


def pareto_front(cost_S: ArrayLike, loss_S: ArrayLike) -> NDArray[np.bool_]:
    """Mark the strategies that no other dominates.

    One dominates another if it is no worse in cost and loss and better in at least one. Equal
    points are on the front together. Strategies without a cost are never on it.

    Args:
        cost_S: costs, such as mean experts; may be NaN.
        loss_S: losses, smaller is better; (S,) or (B, S) for many fronts at once.

    >>> pareto_front([2.0, 4.0, 6.0, 6.0], [3.0, 1.0, 2.0, 1.0])
    array([ True,  True, False, False])
    """
    cost_S, loss_BS = np.asarray(cost_S, dtype=float), np.asarray(loss_S, dtype=float)
    front = np.empty(loss_BS.shape, dtype=bool)
    for s, cost in enumerate(cost_S):
        loss_B1 = loss_BS[..., s : s + 1]
        cheaper = (cost_S <= cost) & (loss_BS < loss_B1)
        better = (cost_S < cost) & (loss_BS <= loss_B1)
        front[..., s] = np.isfinite(cost) & ~(cheaper | better).any(-1)
    return front


def front_proportion(cost_S: ArrayLike, loss_BS: ArrayLike) -> Array:
    """Return the proportion of resamples in which each strategy is on the front, (S,).

    Costs are taken as known; the uncertainty is that of the losses.

    >>> front_proportion([2.0, 4.0], [[3.0, 1.0], [1.0, 3.0]])
    array([1. , 0.5])
    """
    return pareto_front(cost_S, loss_BS).mean(0)
