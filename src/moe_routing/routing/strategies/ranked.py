"""Strategies that rank a token's experts and keep the first so many of them.

Shape letters: T tokens, K slots a token, E experts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe_routing.routing.calibration import Calibration
from moe_routing.routing.ordering import order_experts
from moe_routing.routing.strategies.base import Selector, Strategy
from moe_routing.routing.types import RouterInputs, Selection

BLOCK = 1 << 16
"""Logits that the CPU works on at a time: 1,024 tokens of 64 experts."""


@dataclass(frozen=True)
class Ranking:
    """The order of a token's experts, and how many of them a rule keeps.

    Attributes:
        order_TK: expert ids in order of preference, masked ones last, (tokens, cap).
        value_TK: logits or statistics in that order; -inf marks masked experts.
        count_T: how many are kept, floor and cap applied, (tokens,), int64.
        rejected_T: how many the rule itself chose, (tokens,), int64.
    """

    order_TK: Tensor
    value_TK: Tensor
    count_T: Tensor
    rejected_T: Tensor

    @classmethod
    def bounded(
        cls, order_TE: Tensor, value_TE: Tensor, rejected_T: Tensor, floor: int, cap: int
    ) -> Ranking:
        """Apply floor and cap to a rule that chose no masked expert; nor does the floor."""
        floor_T = (value_TE[:, :floor] > -math.inf).sum(1)
        count_T = rejected_T.clamp(max=cap).maximum(floor_T)
        return cls(order_TE[:, :cap], value_TE[:, :cap], count_T, rejected_T)

    @classmethod
    def counted(cls, order_TE: Tensor, value_TE: Tensor, count_T: Tensor, cap: int) -> Ranking:
        """Keep a given number of experts, at most ``cap``, but no masked one."""
        available_T = (value_TE[:, :cap] > -math.inf).sum(1)
        kept_T = count_T.minimum(available_T)
        return cls(order_TE[:, :cap], value_TE[:, :cap], kept_T, kept_T)

    @classmethod
    def concatenated(cls, parts: list[Ranking]) -> Ranking:
        """Join the rankings of consecutive tokens."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    @property
    def available_T(self) -> Tensor:
        """How many of the ranked experts are not masked, (tokens,), int64."""
        return (self.value_TK > -math.inf).sum(1)


Ranker = Callable[[RouterInputs, Tensor], Ranking]
"""Maps (inputs, float32 softmax probabilities (tokens, experts)) to a ranking."""


def blockwise(rank: Ranker) -> Ranker:
    """Return a ranker that works on the CPU in blocks of tokens, which fit its cache."""

    def rank_blocks(inputs: RouterInputs, probability_TE: Tensor) -> Ranking:
        tokens, experts = probability_TE.shape
        rows = BLOCK // experts + 1
        if tokens <= rows or probability_TE.device.type != "cpu":
            return rank(inputs, probability_TE)
        starts = range(0, tokens, rows)
        blocks = [slice(start, start + rows) for start in starts]
        return Ranking.concatenated([rank(inputs.rows(b), probability_TE[b]) for b in blocks])

    return rank_blocks


class Ranked(Strategy):
    """A strategy that keeps a prefix of a ranking, which the controls can take apart."""

    @abstractmethod
    def ranker(self, calibration: Calibration | None, num_experts: int) -> Ranker:
        """Return the function that ranks experts and says how many to keep."""

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the function that chooses experts."""
        rank = blockwise(self.ranker(calibration, num_experts))

        def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            ranking = rank(inputs, probability_TE)
            return Selection.prefix(
                ranking.order_TK, ranking.count_T, num_experts, ranking.rejected_T
            )

        return select


def by_logit(inputs: RouterInputs) -> tuple[Tensor, Tensor]:
    """Return the float32 logits sorted downwards and the experts in that order."""
    return order_experts(inputs.logits_TE.float())
