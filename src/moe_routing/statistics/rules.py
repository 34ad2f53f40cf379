"""What a rule is: how it chooses experts, what ranks them, and what stands in for dropped ones.

Settings of one kind differ in their number of experts alone and form a curve of loss by mean
experts. A lever is what two kinds differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import pandas as pd

from moe_routing.routing.strategies import Strategy, family_entry, parse_strategy

STATIC, THRESHOLD, CERTIFIED, MIXTURE = "static", "absolute", "certified", "mixture"
PROBABILITY, OMITTED, COMPENSATED = "probability", "omitted", "compensated"
OF_THE_NULL = "of the null"
"""The score of a rule that leaves it to its null hypothesis, chosen when that is fitted."""
UNSCALED, SCALED = "unscaled", "scaled"
AS_IS, FITTED = "as is", "fitted"
SCALES = MappingProxyType({UNSCALED: AS_IS, SCALED: FITTED})
"""Values of the column ``scale`` by the field of a strategy: the experts' output as it is, or
multiplied by one number fitted on calibration text."""
_RULES = {STATIC: "fixed k", THRESHOLD: "one threshold", CERTIFIED: "certified threshold"}
OWN_WEIGHTS = "own"
MASS_MATCHED = ("mass_matched", "sqrt_mass_matched")
"""Weightings that are the model's own where every expert of its choice is kept."""


@dataclass(frozen=True, order=True)
class RuleKind:
    """A kind of rule.

    Attributes:
        rule: static (the same number for every token), or the name of a family.
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
    def name(self) -> str:
        """The rule alone in words, such as "fixed k", "one threshold" or "top-p"."""
        return _RULES.get(self.rule) or family_entry(self.rule).label

    @property
    def words(self) -> str:
        """The kind in words, such as "fixed k by norm, compensated"."""
        parts = [self.name]
        if self.score not in (PROBABILITY, OF_THE_NULL):
            parts[0] += f" by {self.score.replace('_', ' ')}"
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


PLAIN = RuleKind(STATIC)
"""A fixed number of experts by probability, with nothing in place of dropped ones."""


def _without_score(kind: RuleKind) -> RuleKind | None:
    changed = replace(kind, score=PROBABILITY, widened=False)
    return None if kind.score in (PROBABILITY, OF_THE_NULL) else changed


def _without_threshold(kind: RuleKind) -> RuleKind | None:
    return replace(kind, rule=STATIC) if kind.rule == THRESHOLD else None


def _without_substitute(kind: RuleKind) -> RuleKind | None:
    return replace(kind, dropped=OMITTED) if kind.dropped == COMPENSATED else None


def _without_weights(kind: RuleKind) -> RuleKind | None:
    return replace(kind, weighting=OWN_WEIGHTS) if kind.weighting in MASS_MATCHED else None


LEVERS: Mapping[str, Callable[[RuleKind], RuleKind | None]] = MappingProxyType(
    {
        "score": _without_score,
        "tokens": _without_threshold,
        "substitute": _without_substitute,
        "weights": _without_weights,
    }
)
"""What can be decided apart from the number of experts: which experts, for which tokens, what
stands in for dropped ones, and the weights of the others. Each maps a kind to the same kind without
the lever, None if it lacks it."""


def kind_of(strategy: Strategy, own_weighting: str) -> RuleKind | None:
    """Return the kind of a strategy; None for the baseline, which leaves the number to the model.

    Args:
        strategy: its specification.
        own_weighting: the model's own weighting.
    """
    family = strategy.family
    if family.static_weighting and np.isnan(budget_of(strategy)):
        return None
    weighting = strategy.weighting_kind
    return RuleKind(
        STATIC if family.static_weighting or family.name == MIXTURE else family.name,
        strategy.score or OF_THE_NULL,
        strategy.dropped,
        widened=strategy.candidates == "all" and strategy.score not in (None, PROBABILITY),
        weighting=OWN_WEIGHTS if weighting in ("model", own_weighting) else weighting,
    )


def budget_of(strategy: Strategy) -> float:
    """Return the number of experts in an id: 3 for ``regular_k3``, 3.5 for ``absolute_k8_b35``.

    NaN for a strategy that has none, such as a certified one.
    """
    name = "k" if strategy.family.static_weighting else "budget"
    budget = getattr(strategy, name, None)
    return np.nan if budget is None else float(budget)


def with_kinds(table: pd.DataFrame, own_weighting: str) -> pd.DataFrame:
    """Return the rows of ``statistics/matched_budgets.csv`` that have a kind, with it as a column.

    Args:
        table: the rows.
        own_weighting: the model's own weighting.
    """
    kinds = [
        kind_of(parse_strategy(str(name)), own_weighting) for name in table.get("strategy", [])
    ]
    found = table.assign(kind=pd.Series(kinds, table.index, object))
    return found[[kind is not None for kind in kinds]]
