"""What a lever is: its rule, what ranks experts, and what stands in for dropped ones.

The levers of one kind differ in their number of experts alone and form a curve of loss by mean
experts. Curves are compared at equal mean experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_routing.routing.strategies import static_families
from moe_routing.vocabulary import WEIGHTINGS

STATIC, THRESHOLD, CERTIFIED = "static", "threshold", "certified"
PROBABILITY, OMITTED, COMPENSATED = "probability", "omitted", "compensated"
UNSCALED, SCALED = "unscaled", "scaled"
RULES = {STATIC: "top k", THRESHOLD: "one threshold", CERTIFIED: "certified threshold"}
"""The rules in words."""
BEYOND = 0.05
"""A curve is compared beyond its ends by at most this part of the experts at the end."""
OWN_WEIGHTS = "own"


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
            parts.append(f"{self.weighting.replace('_', ' ')} weights")
        return ", ".join(parts)


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
    kinds = [
        _kind(name, score, candidates, dropped, weighting)
        for name, score, candidates, dropped in zip(
            *(table[name] for name in ("strategy", "score", "candidates", "dropped")), strict=True
        )
    ]
    found = table.assign(kind=kinds, budget=[_budget(str(name)) for name in table["strategy"]])
    return found[[kind is not None for kind in kinds]]


def _kind(
    strategy: str, score: str, candidates: str, dropped: str, own_weighting: str
) -> LeverKind | None:
    family, *parts = strategy.split("_")
    static = _static_weightings()
    if family in static:
        if not any(part[0] == "k" and part[1:].isdigit() for part in parts):
            return None  # stock under its fitted scale
        rule, weighting = STATIC, static[family]
    elif family == CERTIFIED:
        rule, weighting = CERTIFIED, None
    else:
        rule, weighting = THRESHOLD, None
    named = [part.replace("-", "_") for part in parts]
    weighting = next((part for part in named if part in WEIGHTINGS), weighting)
    if weighting in (None, "model", own_weighting):
        weighting = OWN_WEIGHTS
    widened = candidates == "all" and score != PROBABILITY
    return LeverKind(rule, score, dropped, widened, str(weighting))


def _static_weightings() -> dict[str, str | None]:
    """Return the weighting of every family of static top-k."""
    return {entry.name: entry.static_weighting for entry in static_families().values()}


def _budget(strategy: str) -> float:
    """Return the number of experts in an id: 3 for ``regular_k3``, 3.5 for ``absolute_k8_b35``."""
    family, *parts = strategy.split("_")
    letter = "k" if family in _static_weightings() else "b"
    digits = [part[1:] for part in parts if part[0] == letter and part[1:].isdigit()]
    if not digits:
        return np.nan
    return float(digits[0]) if letter == "k" else float(f"{digits[0][0]}.{digits[0][1:] or 0}")


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
    """

    rows: pd.DataFrame

    def at(self, experts: float) -> Loss | None:
        """Return the loss at a mean number of experts, on the straight lines between settings.

        None beyond the ends of the curve by more than :data:`BEYOND`.
        """
        x = self.rows["mean_experts"].to_numpy(float)
        if not len(x) or not x[0] * (1 - BEYOND) <= experts <= x[-1] * (1 + BEYOND):
            return None
        value, low, high = (
            float(np.interp(experts, x, self.rows[name])) for name in ("difference", "low", "high")
        )
        return Loss(value, low, high)

    def experts_for(self, loss: float) -> float | None:
        """Return the fewest mean experts at which the loss is no larger than this one.

        None if the loss is larger at every setting, or if the first one already loses no more.
        """
        x = self.rows["mean_experts"].to_numpy(float)
        y = self.rows["difference"].to_numpy(float)
        below = np.flatnonzero(y <= loss)
        if not len(below) or below[0] == 0:
            return None
        i = below[0]
        return float(x[i - 1] + (y[i - 1] - loss) / (y[i - 1] - y[i]) * (x[i] - x[i - 1]))


def curves(rows: pd.DataFrame, scale: str) -> Iterator[tuple[LeverKind, Curve]]:
    """Yield the curve of every kind on one data set, in the order of the table.

    Args:
        rows: rows of :func:`with_kinds` of one data set.
        scale: ``unscaled`` or ``scaled``.
    """
    own = rows[rows["scale"] == scale]
    for kind in dict.fromkeys(own["kind"]):
        one = own[own["kind"] == kind].drop_duplicates("budget")
        yield kind, Curve(one.sort_values("mean_experts", kind="stable"))
