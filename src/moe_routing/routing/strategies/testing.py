"""As many experts as pass a multiple-testing procedure.

Shape letters: T tokens, E experts.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing import procedures
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.nulls.base import Null, min_draws
from moe_routing.routing.nulls.step_up import StepUpTest
from moe_routing.routing.strategies.ranked import Ranked, Ranker, Ranking
from moe_routing.routing.types import RouterInputs
from moe_routing.routing.weighting import WEIGHTINGS, Weighting

Counter = Callable[[Tensor], Tensor]
"""Maps p-values sorted upwards, (tokens, experts), to numbers of rejections, (tokens,)."""


class MultipleTesting(Ranked):
    """A procedure on a token's p-values, at least ``min_k`` experts, at most ``max_k``.

    What the procedure controls is decided by the null. Experts are taken in the order of the null's
    statistic, which is that of the p-values; ties by the larger logit, then by the lower index.
    """

    codes: ClassVar[dict[str, str]] = {"max_k": "k", "alpha": "a", "min_k": "m"}
    words: ClassVar[tuple[str, ...]] = ("null", "weighting")

    max_k: int = Field(ge=1, description="Most experts a token.")
    alpha: float = Field(gt=0, lt=1, description="Level.")
    min_k: int = Field(1, ge=1, description="Fewest experts a token.")
    null: str = Field("within_token", description="Null that p-values are computed under.")
    weighting: Weighting = Field("softmax", description="How selected experts are weighted.")

    @model_validator(mode="after")
    def _consistent(self) -> MultipleTesting:
        if self.max_k < self.min_k:
            raise ValueError(f"max_k is {self.max_k}; allowed: at least min_k = {self.min_k}")
        if self.null not in NULLS:
            raise ValueError(f"null is '{self.null}'; allowed: {', '.join(NULLS)}")
        return self

    @classmethod
    def choices(cls, word: str) -> tuple[str, ...]:
        """Return the allowed values of a named parameter."""
        return tuple(NULLS) if word == "null" else WEIGHTINGS

    @property
    def max_experts(self) -> int:
        """The most experts a token can get."""
        return self.max_k

    @property
    def min_experts(self) -> int:
        """The fewest experts a token can get."""
        return self.min_k

    @property
    def needs_null(self) -> str:
        """Id of the null."""
        return self.null

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting

    @abstractmethod
    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""

    def smallest_level(self, num_experts: int) -> float:
        """Return the p-value that an expert needs to be the only one selected."""
        return self.alpha / num_experts

    def fitted_null(self, calibration: Calibration, num_experts: int) -> Null:
        """Return the null.

        Raises:
            InputError: it was not fitted, or on too few tokens for ``alpha``.
        """
        null = calibration.null(self.null)
        level = self.smallest_level(num_experts)
        if not null.attains(level):
            raise InputError(
                f"strategy '{self.id}': null '{null.id}' has {null.num_draws:.0f} calibration "
                f"draws; allowed: at least {min_draws(level)}, so that a p-value can reach its "
                f"smallest level {level:.3g} (raise calibration.tokens)"
            )
        return null

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return ranking by p-values."""
        null = self.fitted_null(calibration, num_experts)
        count = self.counter(num_experts)
        null_on = functools.cache(null.to)

        def rank(inputs: RouterInputs, _: Tensor) -> Ranking:
            p_TE, order_TE = null_on(inputs.logits_TE.device).sorted_p_values(inputs)
            logits_TE = inputs.logits_TE.gather(1, order_TE)
            return Ranking.bounded(order_TE, logits_TE, count(p_TE), self.min_k, self.max_k)

        return rank


class StepUp(MultipleTesting):
    """A step-up procedure: the largest i with p_(i) at most the i-th level."""

    levels: ClassVar[Callable[[int, float], Tensor]]

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        level_E = type(self).levels(num_experts, self.alpha)
        level_on = functools.cache(level_E.to)
        return lambda p_TE: procedures.step_up(p_TE, level_on(p_TE.device))

    def smallest_level(self, num_experts: int) -> float:
        """Return the first level."""
        return float(type(self).levels(num_experts, self.alpha)[0])

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return ranking by critical values where the null has them, else by p-values."""
        null = self.fitted_null(calibration, num_experts)
        if not null.layer_monotone:
            return super().ranker(calibration, num_experts)
        level_E = type(self).levels(num_experts, self.alpha)
        test = StepUpTest.build(null, level_E, calibration.sample.num_layers)
        test_on = functools.cache(test.to)

        def rank(inputs: RouterInputs, _: Tensor) -> Ranking:
            experts, rejected_T = test_on(inputs.logits_TE.device)(inputs)
            return Ranking.bounded(
                experts.order_TE, experts.key_TE, rejected_T, self.min_k, self.max_k
            )

        return rank


class BH(StepUp):
    """Benjamini-Hochberg; see :func:`procedures.bh_levels`."""

    family: ClassVar[str] = "bh"
    levels = staticmethod(procedures.bh_levels)


class BY(StepUp):
    """Benjamini-Yekutieli; see :func:`procedures.by_levels`."""

    family: ClassVar[str] = "by"
    levels = staticmethod(procedures.by_levels)


class EBH(StepUp):
    """e-BH on calibrated p-values; see :func:`procedures.ebh_levels`."""

    family: ClassVar[str] = "ebh"
    levels = staticmethod(procedures.ebh_levels)


class Threshold(StepUp):
    """Every expert with p at most alpha; see :func:`procedures.threshold_levels`."""

    family: ClassVar[str] = "threshold"
    levels = staticmethod(procedures.threshold_levels)


class Storey(MultipleTesting):
    """Storey's adaptive BH; see :func:`procedures.storey`."""

    family: ClassVar[str] = "storey"

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        return lambda p_TE: procedures.storey(p_TE, self.alpha)


class HigherCriticism(MultipleTesting):
    """Higher Criticism at level alpha; see :func:`procedures.higher_criticism`."""

    family: ClassVar[str] = "hc"

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        critical = procedures.hc_critical(num_experts, self.alpha)
        return lambda p_TE: procedures.higher_criticism(p_TE, critical)
