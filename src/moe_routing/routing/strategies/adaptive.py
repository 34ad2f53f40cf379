"""A strategy that uses fewer experts where the router is confident."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moe_routing.routing.strategies.ranked import Ranked
from moe_routing.vocabulary import Family, Look, Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.ranking import Ranker, Ranking
    from moe_routing.routing.types import RouterInputs


class Adaptive(Ranked):
    """Between ceil(k/2) and k experts, depending on the token's largest softmax probability.

    With m = k - ceil(k/2), the m thresholds of a layer are the j/(m+1) quantiles (j = 1 ... m) of
    the largest probability on calibration tokens; a token loses one expert for each threshold that
    its own largest probability exceeds. On calibration text every number of experts between
    ceil(k/2) and k is therefore equally frequent, in every layer.
    """

    family: ClassVar[Family] = Family(
        "adaptive",
        label="Adaptive",
        look=Look("#009E73", "D", "-."),
        definition="up to {k} by confidence, weights {weighting}",
        selection="between k/2 and k: fewer where the largest probability is large, thresholds "
        "from calibration text",
        words="adaptive top-k",
        complete=True,
    )
    codes: ClassVar[dict[str, str]] = {"k": "k"}
    words: ClassVar[tuple[str, ...]] = ("weighting",)

    k: int = Field(ge=1, description="Most experts per token.")
    weighting: Weighting = Field(
        default="renormalised", description="How selected experts are weighted."
    )

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return self.k

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return (self.k + 1) // 2

    @property
    def needs_calibration(self) -> bool:
        """Thresholds come from calibration tokens."""
        return True

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return a ranker with a count from thresholds."""
        import torch

        from moe_routing.routing.ranking import Ranking, by_score

        m = self.max_experts - self.min_experts
        levels_M = torch.arange(1, m + 1) / (m + 1)
        threshold_LM = calibration.confidence_quantiles(levels_M)

        def rank(inputs: RouterInputs, probability_TE: Tensor) -> Ranking:
            logits_TE, order_TE = by_score(inputs)
            largest_T1 = probability_TE.amax(1, keepdim=True)
            threshold_M = threshold_LM[inputs.layer].to(largest_T1.device)
            count_T = self.k - (largest_T1 > threshold_M).sum(1)
            return Ranking.counted(order_TE, logits_TE, count_T, self.k)

        return rank
