"""The static rule between two whole numbers of experts.

Shape letters: T tokens, K slots per token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moe_routing.routing.strategies.base import Strategy
from moe_routing.routing.strategies.topk import Stock
from moe_routing.vocabulary import Family, Look, Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.rule import ModelRule
    from moe_routing.routing.types import RouterInputs, Selection, Selector


class Mixture(Strategy):
    """Top k or top k + 1, drawn at random for each token and layer, so that the mean is ``budget``.

    What static top-k costs at a number of experts that is not whole, without interpolation. With a
    whole number it is top k.
    """

    family: ClassVar[Family] = Family(
        "mixture",
        label="Static mixture",
        look=Look("#8C6D31", (8, 2, 0)),
        definition="static mixture of two numbers of experts, weights {weighting}",
        selection="the k or k + 1 largest logits, k or k + 1 drawn at random",
        words="a static mixture",
    )
    codes: ClassVar[dict[str, str]] = {"budget": "b", "seed": "s"}
    words: ClassVar[tuple[str, ...]] = ("weighting",)

    budget: float = Field(gt=0, lt=10, description="Mean experts per token and layer.")
    seed: int = Field(default=0, ge=0, description="Seed.")
    weighting: Weighting = Field(default="model", description="How selected experts are weighted.")

    @property
    def nominal_experts(self) -> float:
        """The budget."""
        return self.budget

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return math.ceil(self.budget)

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return math.floor(self.budget)

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting

    def resolved(self, rule: ModelRule) -> Strategy:
        """Return top k for a whole number of experts."""
        if not self.budget.is_integer():
            return super().resolved(rule)
        common = {name: getattr(self, name) for name in self.common_words}
        return Stock(k=int(self.budget), weighting=self.weighting, **common).resolved(rule)

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return top-k selection with a random number of experts."""
        from moe_routing.routing.draws import uniform
        from moe_routing.routing.ordering import top_experts
        from moe_routing.routing.ranking import Ranking, by_score
        from moe_routing.routing.types import Selection

        def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            more_T = uniform(inputs, self.seed) < self.budget - self.min_experts
            count_T = self.min_experts + more_T.long()
            if inputs.score_TE is None:
                order_TK = top_experts(probability_TE, self.max_experts)
                return Selection.prefix(order_TK, count_T, num_experts, count_T)
            score_TK, order_TK = by_score(inputs, self.max_experts)
            kept = Ranking.counted(order_TK, score_TK, count_T, self.max_experts)
            return Selection.prefix(kept.order_TK, kept.count_T, num_experts, kept.rejected_T)

        return select
