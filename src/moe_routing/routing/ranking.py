"""The order of a token's experts, and how many of them a strategy keeps.

Shape letters: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe_routing.routing.ordering import order_experts, sort_descending
from moe_routing.routing.types import RouterInputs, Selection, Selector

BLOCK = 1 << 18
"""Number of logits that the CPU processes at once: 4,096 tokens with 64 experts. In smaller
blocks the overhead of many small operators dominates; larger blocks do not fit in the cache."""


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
        """Apply floor and cap to the number of experts that a rule chose.

        Neither the rule nor the floor may choose masked experts: where the rule counts more
        experts than are not masked, all of those are kept.

        Args:
            order_TE: all experts in order.
            value_TE: values in descending order, -inf for masked experts.
            rejected_T: how many the rule chose.
            floor: fewest experts per token.
            cap: most experts per token.
        """
        available_T = (value_TE[:, :cap] > -math.inf).sum(1)
        count_T = rejected_T.maximum(available_T.clamp(max=floor)).minimum(available_T)
        return cls(order_TE[:, :cap], value_TE[:, :cap], count_T, rejected_T)

    @classmethod
    def counted(cls, order_TE: Tensor, value_TE: Tensor, count_T: Tensor, cap: int) -> Ranking:
        """Keep a given number of experts, at most ``cap``, and no masked ones."""
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
    """Return a ranker that, on the CPU, processes tokens in blocks that fit in its cache."""

    def rank_blocks(inputs: RouterInputs, probability_TE: Tensor) -> Ranking:
        blocks = blocks_of(*probability_TE.shape)
        if len(blocks) == 1 or probability_TE.device.type != "cpu":
            return rank(inputs, probability_TE)
        return Ranking.concatenated([rank(inputs.rows(b), probability_TE[b]) for b in blocks])

    return rank_blocks


def blocks_of(tokens: int, experts: int) -> list[slice]:
    """Return blocks of tokens that fit in the processor's cache, at least one."""
    rows = BLOCK // experts + 1
    return [slice(start, start + rows) for start in range(0, max(1, tokens), rows)]


def by_score(inputs: RouterInputs, num_ranks: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the float32 scores in descending order and the experts in that order.

    Masked experts come last with a score of minus infinity.

    Args:
        inputs: what the experts are ranked by.
        num_ranks: how many ranks to return; None: all.
    """
    return order_experts(inputs.ranked_by_TE.float(), num_ranks=num_ranks)


def in_descending_order(weight_TE: Tensor, inputs: RouterInputs, order_TK: Tensor) -> Tensor:
    """Return each token's largest weights, (tokens, slots), for rules that count by weight.

    Args:
        weight_TE: weights in the order of the logits.
        inputs: what the experts are ranked by.
        order_TK: the first experts by that rank.
    """
    if inputs.score_TE is None:
        return weight_TE.gather(1, order_TK)
    return sort_descending(weight_TE)[:, : order_TK.shape[1]]


def prefix_selector(rank: Ranker, num_experts: int) -> Selector:
    """Return a selector that keeps the number of experts given by the ranking."""

    def select_block(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
        kept = rank(inputs, probability_TE)
        return Selection.prefix(kept.order_TK, kept.count_T, num_experts, kept.rejected_T)

    def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
        if probability_TE.device.type != "cpu":
            return select_block(inputs, probability_TE)
        blocks = blocks_of(*probability_TE.shape)
        # Slots that no token fills are dropped from each block before the blocks are concatenated.
        parts = [select_block(inputs.rows(b), probability_TE[b]) for b in blocks]
        return Selection.concatenated(parts, num_experts)

    return select
