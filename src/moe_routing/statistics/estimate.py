"""An estimate with its interval, in a module of its own that is cheap to import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its interval.

    Attributes:
        metric: name of the metric.
        value: point estimate.
        low: lower limit.
        high: upper limit.
        n: number of items.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
