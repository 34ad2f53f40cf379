"""Strategies that rank a token's experts and keep the first ones, and the budgets of some."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from pydantic import Field, model_validator

from moe_routing.errors import InputError
from moe_routing.routing.strategies.base import Strategy

if TYPE_CHECKING:
    from moe_routing.routing.budget import Value
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.ranking import Ranker
    from moe_routing.routing.types import Selector

SAMPLED = 1024
"""Calibration tokens, at least, on which a first value of a free parameter is looked for."""
CLOSE = 0.01
"""Experts per token within which that value keeps the mean that is asked for."""


class Ranked(Strategy):
    """A strategy that keeps a prefix of a ranking, so that it can be the base of a control."""

    @abstractmethod
    def ranker(self, calibration: Calibration | None, num_experts: int) -> Ranker:
        """Return the function that ranks the experts and decides how many to keep."""

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the function that chooses experts."""
        from moe_routing.routing.ranking import prefix_selector

        return prefix_selector(self.ranker(calibration, num_experts), num_experts)


class Budgeted(Ranked):
    """A strategy with a free parameter, given as such or by the experts that it keeps.

    With a ``budget`` in its place, the parameter is fitted by running the routed model on
    calibration text (:mod:`moe_routing.evaluation.budgets`), and :meth:`fitted` returns the
    strategy with the value that was found. More experts are kept the larger the parameter is, or
    the smaller, never both.
    """

    free: ClassVar[str]
    """The free parameter: a field that is None where a budget stands for it."""
    bounds: ClassVar[tuple[float, float]] = (1e-6, 1 - 1e-6)
    """Smallest and largest value that is tried."""
    has_default: ClassVar[bool] = False
    """Whether the strategy is complete without the parameter and without a budget."""
    by_layer: ClassVar[bool] = False
    """Whether the parameter has a value for each layer, which keeps the budget in that layer."""

    budget: float | None = Field(
        default=None,
        gt=0,
        lt=10,
        description="Mean experts per token and layer on calibration text, in place of a "
        "parameter.",
    )

    @model_validator(mode="after")
    def _consistent_budget(self) -> Self:
        value, budget = getattr(self, self.free), self.budget
        if (value is None) == (budget is None) and not (value is None and self.has_default):
            given = "neither is given" if budget is None else "both are given"
            letter = f" ({self.codes[self.free]})" if self.free in self.codes else ""
            raise ValueError(f"{self.free}{letter} and budget (b): {given}; allowed: one of them")
        if budget is None:
            return self
        if budget > self.max_experts:
            raise ValueError(f"budget is {budget:g}; allowed: at most max_k = {self.max_experts}")
        if budget < self.min_experts:
            raise ValueError(
                f"budget is {budget:g}; allowed: at least {self.min_experts}, the fewest experts "
                "that it keeps"
            )
        return self

    @property
    def value(self) -> Any:  # noqa: ANN401 (a number, or a tuple of one for each layer)
        """The free parameter.

        Raises:
            InputError: a budget stands for it.
        """
        value = getattr(self, self.free)
        if value is None:
            raise InputError(
                f"strategy '{self.id}': {self.free} is not fitted; allowed: strategy.fitted("
                "calibration), after its budget has been fitted"
            )
        return value

    @property
    def nominal_experts(self) -> float | None:
        """The budget, if there is one."""
        return self.budget

    @property
    def needs_budget(self) -> str | None:
        """Id of the unscaled strategy: a scale is fitted after the budget and leaves it alone."""
        if self.budget is None:
            return None
        return self.model_copy(update={"scale": "unscaled"}).id

    def at(self, value: Value) -> Self:
        """Return the strategy with a value of its free parameter in place of the budget."""
        return self.model_copy(update={self.free: value, "budget": None})

    def fitted(self, calibration: Calibration | None) -> Self:
        """Return the strategy with the value that was fitted to its budget.

        Raises:
            InputError: it was not fitted, or no value has been found.
        """
        name = self.needs_budget
        if name is None:
            return self
        budgets = calibration.budgets if calibration else {}
        if name not in budgets:
            known = ", ".join(budgets) or "none"
            raise InputError(
                f"strategy '{self.id}': its budget is not fitted in this calibration; fitted: "
                f"{known}"
            )
        if budgets[name].left_out:
            raise InputError(f"strategy '{self.id}' is left out: {budgets[name].reason}")
        return self.at(cast("Value", budgets[name].value))

    def limits(self, calibration: Calibration, num_experts: int) -> tuple[float, float]:
        """Return the smallest and the largest allowed value of the free parameter."""
        del calibration, num_experts
        return self.bounds

    def on_sample(
        self, calibration: Calibration, num_experts: int
    ) -> Callable[[Sequence[float]], Value]:
        """Return the function from a mean number of experts to the value that keeps it.

        On calibration tokens as the stock model routes them: routing by the value changes what
        later layers read, so that it keeps about that number, not exactly. Where no allowed value
        keeps it, the function returns the limit that comes closest. It takes one number, or one of
        each layer for a parameter with a value for each layer.
        """
        from scipy.optimize import brentq

        from moe_routing.routing.scores import scored_sample

        step = slice(None, None, max(1, calibration.sample.num_tokens // SAMPLED))
        layers = [inputs.rows(step) for inputs in scored_sample(self, calibration)]
        low, high = self.limits(calibration, num_experts)

        def mean_at(value: float) -> float:
            rank = self.at(value).ranker(calibration, num_experts)
            counts = [rank(inputs, inputs.softmax_TE).count_T.double().mean() for inputs in layers]
            return float(sum(counts)) / len(counts)

        at_low, at_high = mean_at(low), mean_at(high)

        def value_for(mean: Sequence[float]) -> float:
            (wanted,) = mean
            if not min(at_low, at_high) < wanted < max(at_low, at_high):
                return low if abs(at_low - wanted) <= abs(at_high - wanted) else high

            def excess(position: float) -> float:
                found = mean_at(_from_logit(position)) - wanted
                return 0.0 if abs(found) < CLOSE else found  # the search ends at a zero

            found = brentq(excess, _to_logit(low), _to_logit(high), xtol=1e-4)
            return _from_logit(cast("float", found))

        return value_for


def _to_logit(value: float) -> float:
    return math.log(value) - math.log1p(-value)


def _from_logit(position: float) -> float:
    return 1 / (1 + math.exp(-position))
