"""What a lever is: its rule, what ranks experts, and what stands in for dropped ones.

The levers of one kind differ in their number of experts alone and form a curve of loss by mean
experts. Curves are compared at equal mean experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_routing.routing.strategies import Strategy, parse_strategy

STATIC, THRESHOLD, CERTIFIED = "static", "threshold", "certified"
PROBABILITY, OMITTED, COMPENSATED = "probability", "omitted", "compensated"
UNSCALED, SCALED = "unscaled", "scaled"
RULES = {STATIC: "top k", THRESHOLD: "one threshold", CERTIFIED: "certified threshold"}
"""The rules in words."""
BEYOND = 0.1
"""A curve is compared beyond its ends by at most this part of the experts at the end."""
WIDEST = 2.0
"""Experts between two settings beyond which the number of experts at a loss is not interpolated."""
OWN_WEIGHTS = "own"
MASS_MATCHED = ("mass_matched", "sqrt_mass_matched")
"""Weightings that are the model's own where every expert of its choice is kept."""


@dataclass(frozen=True, order=True)
class LeverKind:
    """A kind of lever.

    Attributes:
        rule: static (top k for every token), threshold (one for all tokens and layers) or
            certified.
        score: what ranks experts.
        dropped: what stands in for a dropped expert.
        widened: whether experts beyond the model's own choice may be selected where the ranking is
            not the model's.
        weighting: ``own``, the model's, or another.
    """

    rule: str
    score: str = PROBABILITY
    dropped: str = OMITTED
    widened: bool = False
    weighting: str = OWN_WEIGHTS

    @property
    def words(self) -> str:
        """The kind in words, such as "top k by norm, compensated"."""
        parts = [f"{RULES[self.rule]} by {self.score.replace('_', ' ')}"]
        parts += ["of all experts"] * self.widened
        parts += [self.dropped] * (self.dropped != OMITTED)
        if self.weighting != OWN_WEIGHTS:
            parts.append(f"{self.weighting.replace('_', '-')} weights")
        return ", ".join(parts)

    @property
    def ends_at_stock(self) -> bool:
        """Whether the kind is the stock model if it keeps as many experts as the model."""
        own = self.weighting in (OWN_WEIGHTS, *MASS_MATCHED)
        return own and not self.widened and self.rule != CERTIFIED


PLAIN = LeverKind(STATIC)
"""Static top-k by probability, with nothing in place of dropped experts."""


def with_kinds(table: pd.DataFrame, weighting: str) -> pd.DataFrame:
    """Return the rows of ``statistics/levers.csv`` that have a kind, with two more columns.

    ``kind`` is the :class:`LeverKind`, ``budget`` the number of experts in the id: k of static
    rules, the budget of thresholds, missing for certified ones. The scaled baseline has no kind.

    Args:
        table: the rows.
        weighting: the model's own weighting.
    """
    if table.empty:
        return table.assign(kind=[], budget=[])
    strategies = [parse_strategy(str(name)) for name in table["strategy"]]
    kinds = [_kind(strategy, weighting) for strategy in strategies]
    found = table.assign(
        kind=pd.Series(kinds, table.index, object),
        budget=[_budget(strategy) for strategy in strategies],
    )
    return found[[kind is not None for kind in kinds]]


def _kind(strategy: Strategy, own_weighting: str) -> LeverKind | None:
    if strategy.family.static_weighting:
        if np.isnan(_budget(strategy)):
            return None  # stock under its fitted scale
        rule = STATIC
    else:
        rule = CERTIFIED if strategy.family.name == CERTIFIED else THRESHOLD
    weighting = strategy.weighting_kind
    return LeverKind(
        rule,
        strategy.score,
        strategy.dropped,
        widened=strategy.candidates == "all" and strategy.score != PROBABILITY,
        weighting=OWN_WEIGHTS if weighting in ("model", own_weighting) else weighting,
    )


def _budget(strategy: Strategy) -> float:
    """Return the number of experts in an id: 3 for ``regular_k3``, 3.5 for ``absolute_k8_b35``."""
    name = "k" if strategy.family.static_weighting else "budget"
    budget = getattr(strategy, name, None)
    return np.nan if budget is None else float(budget)


@dataclass(frozen=True)
class Loss:
    """A loss over the reference with its interval.

    Attributes:
        value: nats.
        low: lower limit.
        high: upper limit.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, row: pd.Series) -> Loss:
        """Return the loss of a row."""
        return cls(row["difference"], row["low"], row["high"])

    def below(self, other: Loss) -> bool:
        """Return whether the loss is shown to be smaller: the two intervals do not overlap.

        For paired losses, which are positively correlated, this is stricter than a test of their
        difference at the level of the intervals.
        """
        return self.high < other.low


@dataclass(frozen=True)
class Curve:
    """The loss of one kind by mean experts, as is or at fitted scale, on one data set.

    Attributes:
        rows: rows of ``statistics/levers.csv``, by ascending mean experts.
        top_k: experts at which the kind is the reference, and loses nothing over it; None if it
            never is.
    """

    rows: pd.DataFrame
    top_k: int | None = None

    @property
    def points(self) -> pd.DataFrame:
        """Mean experts, loss and limits of every setting, and of the reference at ``top_k``."""
        points = self.rows[["mean_experts", "difference", "low", "high"]]
        if self.top_k is None:
            return points
        end = pd.DataFrame([[self.top_k, 0.0, 0.0, 0.0]], columns=points.columns)
        return pd.concat([points[points["mean_experts"] < self.top_k], end], ignore_index=True)

    def at(self, experts: float) -> Loss | None:
        """Return the loss at a mean number of experts, on the straight lines between settings.

        None beyond the ends of the curve by more than :data:`BEYOND`.
        """
        points = self.points
        x = points["mean_experts"].to_numpy(float)
        if not x[0] * (1 - BEYOND) <= experts <= x[-1] * (1 + BEYOND):
            return None
        value, low, high = (
            float(np.interp(experts, x, points[name])) for name in ("difference", "low", "high")
        )
        return Loss(value, low, high)

    def experts_for(self, loss: float) -> tuple[float, float] | None:
        """Return the mean experts at which the loss falls to this one: two limits.

        They are equal, on the straight line, between settings no further apart than
        :data:`WIDEST`; otherwise they are the two settings, because a straight line promises too
        much where loss is convex. None if the loss is larger at every setting, or if the first one
        already loses no more.
        """
        points = self.points
        x, y = (points[name].to_numpy(float) for name in ("mean_experts", "difference"))
        below = np.flatnonzero(y <= loss)
        if not len(below) or below[0] == 0:
            return None
        i = below[0]
        if x[i] - x[i - 1] > WIDEST:
            return float(x[i - 1]), float(x[i])
        found = float(x[i - 1] + (y[i - 1] - loss) / (y[i - 1] - y[i]) * (x[i] - x[i - 1]))
        return found, found


def curves(rows: pd.DataFrame, scale: str, top_k: int) -> Iterator[tuple[LeverKind, Curve]]:
    """Yield the curve of every kind on one data set, in the order of the table.

    Args:
        rows: rows of :func:`with_kinds` of one data set.
        scale: ``unscaled`` or ``scaled``.
        top_k: experts per token of the model.
    """
    own = rows[rows["scale"] == scale]
    for kind in dict.fromkeys(own["kind"]):
        one = own[own["kind"] == kind].drop_duplicates("budget")
        end = top_k if kind.ends_at_stock else None
        yield kind, Curve(one.sort_values("mean_experts", kind="stable"), end)
