"""Strategies that select the experts rejected by a multiple-testing procedure.

Shape letters: T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Self, cast

from pydantic import Field, model_validator

from moe_routing.errors import InputError
from moe_routing.routing import levels
from moe_routing.routing.levels import Levels, min_draws
from moe_routing.routing.strategies.ranked import Budgeted
from moe_routing.vocabulary import (
    EXPERT_SCORES,
    PLAIN_NULL_IDS,
    ExpertScore,
    Family,
    Look,
    NeededId,
    Weighting,
    is_null,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.nulls.base import Null
    from moe_routing.routing.nulls.needed import Needed
    from moe_routing.routing.ranking import Ranker, Ranking
    from moe_routing.routing.types import RouterInputs

    Counter = Callable[[Tensor], Tensor]
    """Maps p-values in ascending order, (tokens, experts), to rejection counts, (tokens,)."""


MAX_ALPHA = 0.3
"""Largest level that a budget is fitted with: beyond it, a bound on the error rate says little."""


class MultipleTesting(Budgeted):
    """A procedure on a token's p-values, with at least ``min_k`` and at most ``max_k`` experts.

    What the procedure controls depends on the null. Experts are taken in the order of the null's
    statistic, which is that of the p-values; ties by the larger logit, then by the lower index.
    """

    codes: ClassVar[dict[str, str]] = {"max_k": "k", "alpha": "a", "budget": "b", "min_k": "m"}
    free: ClassVar[str] = "alpha"
    words: ClassVar[tuple[str, ...]] = ("null", "weighting")
    guarantee: ClassVar[str]
    """Dependence of p-values under which the false discovery rate is at most alpha."""
    conditional: ClassVar[bool] = False
    """Whether the procedure estimates or uses the number of true nulls. Then p-values must be
    superuniform given H0, not only on average over all experts; see :meth:`Null.conditional`."""

    max_k: int = Field(ge=1, description="Most experts per token.")
    alpha: float | None = Field(default=None, gt=0, lt=1, description="Level.")
    min_k: int = Field(default=1, ge=1, description="Fewest experts per token.")
    null: str = Field(default="needed", description="Null that p-values are computed under.")
    score: ExpertScore | None = Field(
        default=None,
        description="What ranks the experts and is tested, under a null needed; none: what its "
        "calibration chose.",
    )
    weighting: Weighting = Field(default="model", description="How selected experts are weighted.")

    @model_validator(mode="after")
    def _consistent(self) -> MultipleTesting:
        if self.max_k < self.min_k:
            raise ValueError(f"max_k is {self.max_k}; allowed: at least min_k = {self.min_k}")
        if not _is_plain(self.null):
            raise ValueError(f"null is '{self.null}'; allowed: {', '.join(PLAIN_NULL_IDS)}")
        if self.score is not None and not self.tests_needed:
            raise ValueError(
                f"score is '{self.score}' under the null '{self.null}'; allowed: a score under a "
                "null needed only, since other nulls test the logits"
            )
        return self

    @classmethod
    def against(cls, null_id: str, *, max_k: int, alpha: float) -> Self:
        """Return the strategy that tests a null of any id, with its score and substitute."""
        needed = NeededId.parse(null_id)
        if needed is None:
            return cls(max_k=max_k, alpha=alpha, null=null_id)
        null = str(NeededId(needed.epsilon, needed.effect))
        return cls(max_k=max_k, alpha=alpha, null=null, score=needed.score, dropped=needed.dropped)

    @classmethod
    def choices(cls, word: str) -> tuple[str, ...]:
        """Return the values of a named parameter; nulls with one epsilon as an example."""
        own = {"null": PLAIN_NULL_IDS, "score": EXPERT_SCORES}
        return own[word] if word in own else super().choices(word)

    @classmethod
    def accepts(cls, word: str, value: str) -> bool:
        """Return whether a named parameter may have a value."""
        return _is_plain(value) if word == "null" else super().accepts(word, value)

    @property
    def tests_needed(self) -> bool:
        """Whether the null is that experts are not needed, with some epsilon and effect."""
        return NeededId.parse(self.null) is not None

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return self.max_k

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return self.min_k

    @property
    def needs_null(self) -> str:
        """Id of the null, with the score that is tested and what stands in for dropped experts."""
        needed = NeededId.parse(self.null)
        if needed is None:
            return self.null
        return str(dataclasses.replace(needed, score=self.score, dropped=self.dropped))

    @property
    def needs_outputs(self) -> bool:
        """Whether calibration data must include the outputs of experts."""
        return super().needs_outputs or (self.score is None and self.tests_needed)

    def score_of(self, calibration: Calibration | None) -> ExpertScore:
        """Return what ranks the experts: under a null needed, what the null was fitted on."""
        if not self.tests_needed:
            return "probability"
        null = cast("Calibration", calibration).null(self.needs_null)
        return cast("Needed", null).score

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting

    def limits(self, calibration: Calibration, num_experts: int) -> tuple[float, float]:
        """Return the levels that a budget may be fitted with.

        At the smallest one, the smallest p-value is half of what an expert needs to be the only one
        selected: 2 / tokens for nulls whose draws are all experts of calibration tokens.
        """
        null = calibration.null(self.needs_null)
        return max(self.bounds[0], 2 * num_experts / null.num_draws), MAX_ALPHA

    @abstractmethod
    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""

    def smallest_level(self, num_experts: int) -> float:
        """Return the p-value that an expert needs to be the only one selected."""
        return self.value / num_experts

    def fitted_null(self, calibration: Calibration, num_experts: int) -> Null:
        """Return the null.

        Raises:
            InputError: it was not fitted, or on too few tokens for ``alpha``.
        """
        null = calibration.null(self.needs_null)
        null = null.conditional() if self.conditional else null
        level = self.smallest_level(num_experts)
        if not null.attains(level):
            raise InputError(
                f"strategy '{self.id}': null '{null.id}' has {null.num_draws:.0f} calibration "
                f"draws; allowed: at least {min_draws(level)}, so that a p-value can reach its "
                f"smallest level {level:.3g} (raise {null.tokens_key})"
            )
        return null

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return a ranker by p-values."""
        from moe_routing.routing.ranking import Ranking

        null = self.fitted_null(calibration, num_experts)
        count = self.counter(num_experts)
        null_on = functools.cache(null.to)

        def rank(inputs: RouterInputs, _: Tensor) -> Ranking:
            p_TE, order_TE = null_on(inputs.logits_TE.device).sorted_p_values(inputs)
            logits_TE = inputs.logits_TE.gather(1, order_TE)
            return Ranking.bounded(order_TE, logits_TE, count(p_TE), self.min_k, self.max_k)

        return rank


def _is_plain(null_id: str) -> bool:
    """Return whether a null exists and leaves score and substitute to the strategy."""
    needed = NeededId.parse(null_id)
    plain = needed is None or needed == NeededId(needed.epsilon, needed.effect)
    return is_null(null_id) and plain


class StepUp(MultipleTesting):
    """A step-up procedure: the largest i with p_(i) at most the i-th level."""

    @staticmethod
    @abstractmethod
    def levels(experts: int, alpha: float) -> Levels:
        """Return the levels, float64, (experts,)."""

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        import torch

        from moe_routing.routing import procedures

        level_E = torch.from_numpy(self.levels(num_experts, self.value))
        level_on = functools.cache(level_E.to)
        return lambda p_TE: procedures.step_up(p_TE, level_on(p_TE.device))

    def smallest_level(self, num_experts: int) -> float:
        """Return the first level."""
        return float(self.levels(num_experts, self.value)[0])

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return a ranker by critical values if the null has them, otherwise by p-values."""
        import torch

        from moe_routing.routing.nulls.step_up import StepUpTest
        from moe_routing.routing.ranking import Ranking

        null = self.fitted_null(calibration, num_experts)
        if not null.layer_monotone:
            return super().ranker(calibration, num_experts)
        level_E = torch.from_numpy(self.levels(num_experts, self.value))
        test = StepUpTest.build(null, level_E, calibration.sample.num_layers)
        test_on = functools.cache(test.to)

        def rank(inputs: RouterInputs, _: Tensor) -> Ranking:
            experts, rejected_T = test_on(inputs.logits_TE.device)(inputs)
            return Ranking.bounded(
                experts.order_TE, experts.key_TE, rejected_T, self.min_k, self.max_k
            )

        return rank


class BH(StepUp):
    """Benjamini-Hochberg; see :func:`levels.bh_levels`."""

    family: ClassVar[Family] = Family(
        "bh",
        label="Benjamini-Hochberg",
        look=Look("#D55E00", "P", (0, (5, 1))),
        definition="BH at {alpha}, at most {k}, null {null}, weights {weighting}",
        selection="Benjamini-Hochberg on the token's p-values, at least 1, at most k (@eq-bh)",
        words="Benjamini-Hochberg routing",
        complete=True,
    )
    guarantee: ClassVar[str] = "independence, positive dependence"

    @staticmethod
    def levels(experts: int, alpha: float) -> Levels:
        """Return the levels; see :func:`moe_routing.routing.levels.bh_levels`."""
        return levels.bh_levels(experts, alpha)


class BY(StepUp):
    """Benjamini-Yekutieli; see :func:`levels.by_levels`."""

    family: ClassVar[Family] = Family(
        "by",
        label="Benjamini-Yekutieli",
        look=Look("#5C18A1", "p"),
        definition="Benjamini-Yekutieli at {alpha}, at most {k}, null {null}, weights {weighting}",
        selection="Benjamini-Yekutieli on the token's p-values [@benjamini2001]",
        words="Benjamini-Yekutieli routing",
    )
    guarantee: ClassVar[str] = "any dependence"

    @staticmethod
    def levels(experts: int, alpha: float) -> Levels:
        """Return the levels; see :func:`moe_routing.routing.levels.by_levels`."""
        return levels.by_levels(experts, alpha)


class Storey(MultipleTesting):
    """Storey's adaptive BH; see :func:`procedures.storey`."""

    family: ClassVar[Family] = Family(
        "storey",
        label="Storey",
        look=Look("#63EB23", (4, 1, 0)),
        definition="Storey's adaptive BH at {alpha}, at most {k}, null {null}, weights {weighting}",
        selection="BH with Storey's estimate of the number of true nulls [@storey2002]",
        words="BH routing with Storey's estimate",
    )
    guarantee: ClassVar[str] = "independence"
    conditional: ClassVar[bool] = True

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        from moe_routing.routing import procedures

        alpha = self.value
        return lambda p_TE: procedures.storey(p_TE, alpha)


class EBH(StepUp):
    """e-BH on calibrated p-values; see :func:`levels.ebh_levels`."""

    family: ClassVar[Family] = Family(
        "ebh",
        label="e-BH",
        look=Look("#DBC500", "8"),
        definition="e-BH at {alpha}, at most {k}, null {null}, weights {weighting}",
        selection="e-BH on the token's e-values [@wang2022]",
        words="e-BH routing",
    )
    guarantee: ClassVar[str] = "any dependence"

    @staticmethod
    def levels(experts: int, alpha: float) -> Levels:
        """Return the levels; see :func:`moe_routing.routing.levels.ebh_levels`."""
        return levels.ebh_levels(experts, alpha)


class HigherCriticism(MultipleTesting):
    """Higher Criticism at level alpha; see :func:`procedures.higher_criticism`."""

    family: ClassVar[Family] = Family(
        "hc",
        label="Higher Criticism",
        look=Look("#FF9EBB", "d"),
        definition="Higher Criticism at {alpha}, at most {k}, null {null}, weights {weighting}",
        selection="Higher Criticism's threshold [@donoho2004]",
        words="Higher Criticism routing",
    )
    guarantee: ClassVar[str] = "none"
    conditional: ClassVar[bool] = True

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        from moe_routing.routing import procedures

        critical = procedures.hc_critical(num_experts, self.value)
        return lambda p_TE: procedures.higher_criticism(p_TE, critical)


class Threshold(StepUp):
    """Every expert with p at most alpha; see :func:`levels.threshold_levels`."""

    family: ClassVar[Family] = Family(
        "threshold",
        label="Per-expert threshold",
        look=Look("#786112", ">"),
        definition="p at most {alpha}, at most {k}, null {null}, weights {weighting}",
        selection="every expert whose own p-value passes, without correction",
        words="a threshold for each p-value",
    )
    guarantee: ClassVar[str] = "none"

    @staticmethod
    def levels(experts: int, alpha: float) -> Levels:
        """Return the levels; see :func:`moe_routing.routing.levels.threshold_levels`."""
        return levels.threshold_levels(experts, alpha)
