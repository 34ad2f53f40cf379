"""Inputs and outputs of a router.

Shape letters: T tokens, K slots per token, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_routing.routing.rule import ModelRule


@dataclass(frozen=True)
class RouterInputs:
    """The inputs of one layer's router.

    Attributes:
        layer: index of the layer.
        logits_TE: router logits, (tokens, experts), in the model's dtype.
        hidden_TH: inputs of the router, (tokens, hidden).
        weight_EH: the router's weight, (experts, hidden).
        mask_T: True for real tokens, False for padding, (tokens,); None: all are real.
        probability_TE: float32 softmax over all experts, (tokens, experts), if it is known.
        centred_norm_E: norms of the centred router vectors, (experts,), where ``weight_EH`` is not
            known; see :func:`centred_norms`.
        rule: the model's own routing rule; None: raw softmax weights.
        score_TE: what ranks the experts where it is not the logit, float, (tokens, experts), such
            as a logit with a bias for balance, or a score of :mod:`moe_routing.routing.scores`.
            Masked experts, whose logit is minus infinity, have a score of minus infinity. It never
            enters the weights.
        log_size_TE: log of the norm of each expert's output, or of what a compensated strategy
            drops with it, float32, (tokens, experts), where it is not predicted from
            ``hidden_TH``.
        own_TK: the experts of the model's own choice, int64, (tokens, top k), if they are known.
        key_T: a hash of the text up to each token, int64, (tokens,), for random draws; see
            :mod:`moe_routing.routing.draws`.
    """

    layer: int
    logits_TE: Tensor
    hidden_TH: Tensor | None = None
    weight_EH: Tensor | None = None
    mask_T: Tensor | None = None
    probability_TE: Tensor | None = None
    centred_norm_E: Tensor | None = None
    rule: ModelRule | None = None
    score_TE: Tensor | None = None
    log_size_TE: Tensor | None = None
    own_TK: Tensor | None = None
    key_T: Tensor | None = None

    @property
    def softmax_TE(self) -> Tensor:
        """The float32 softmax over all experts, computed if it is not known."""
        if self.probability_TE is None:
            return self.logits_TE.float().softmax(-1)
        return self.probability_TE

    @property
    def own_weight_TE(self) -> Tensor:
        """The weight that the model gives, or would give, every expert, float32."""
        probability_TE = self.softmax_TE
        scale_T1 = self.rule.scale(probability_TE) if self.rule else None
        return probability_TE if scale_T1 is None else probability_TE * scale_T1

    @property
    def ranked_by_TE(self) -> Tensor:
        """What ranks the experts, larger first, (tokens, experts)."""
        return self.logits_TE if self.score_TE is None else self.score_TE

    def rows(self, tokens: slice) -> RouterInputs:
        """Return the inputs of a slice of the tokens."""
        by_token = (
            "logits_TE", "hidden_TH", "mask_T", "probability_TE", "score_TE", "log_size_TE",
            "own_TK", "key_T",
        )  # fmt: skip
        parts = {
            name: value[tokens] for name in by_token if (value := getattr(self, name)) is not None
        }
        return replace(self, **parts)


def centred_norms(weight_EH: Tensor) -> Tensor:
    """Return the norm of each router vector minus the mean of all, float32, (experts,).

    The softmax does not change if the same vector is added to all of them.
    """
    weight_EH = weight_EH.float()
    return torch.linalg.vector_norm(weight_EH - weight_EH.mean(0), dim=1)


@dataclass(frozen=True)
class Selection:
    """The selected experts of each token, in order of preference.

    Attributes:
        index_TK: distinct expert ids, (tokens, slots), int64; E (the number of experts) marks
            padded slots, which come last.
        count_T: number of experts selected for each token, (tokens,), int64.
        rejected_T: number of experts that the rule selected before floor and cap were applied,
            (tokens,), int64; equal to ``count_T`` for rules without them.
    """

    index_TK: Tensor
    count_T: Tensor
    rejected_T: Tensor

    @classmethod
    def fixed(cls, index_TK: Tensor) -> Selection:
        """Return the selection of a rule that fills every slot."""
        tokens, k = index_TK.shape
        count_T = torch.full((tokens,), k, dtype=torch.int64, device=index_TK.device)
        return cls(index_TK, count_T, count_T)

    @classmethod
    def prefix(
        cls, order_TK: Tensor, count_T: Tensor, experts: int, rejected_T: Tensor
    ) -> Selection:
        """Keep the first ``count_T`` of ``order_TK`` and pad the rest.

        On the CPU, slots that no token fills are dropped, except the first.
        """
        if order_TK.device.type == "cpu" and order_TK.numel():
            # Experts implementations of transformers need a slot, though it be empty.
            order_TK = order_TK[:, : max(1, int(count_T.max()))]
        slot_K = torch.arange(order_TK.shape[1], device=order_TK.device)
        index_TK = order_TK.where(slot_K < count_T[:, None], experts)
        return cls(index_TK, count_T, rejected_T)

    @classmethod
    def concatenated(cls, parts: list[Selection], experts: int) -> Selection:
        """Concatenate the selections of consecutive tokens, padded to the same number of slots."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.index_TK.shape[1] for part in parts)
        index_TK = torch.cat([
            F.pad(part.index_TK, (0, width - part.index_TK.shape[1]), value=experts)
            for part in parts
        ])  # fmt: skip
        count_T = torch.cat([part.count_T for part in parts])
        return cls(index_TK, count_T, torch.cat([part.rejected_T for part in parts]))


Selector = Callable[[RouterInputs, Tensor], Selection]
"""Maps (inputs, float32 softmax probabilities (tokens, experts)) to a selection."""


@dataclass(frozen=True)
class Routing:
    """The experts of each token and their weights.

    Attributes:
        selection: the selected experts.
        weight_TK: float32 weights, (tokens, slots); 0 at padded slots.
        probability_TE: float32 softmax over all experts, (tokens, experts).
        score_TE: what ranked the experts, (tokens, experts); the weights do not depend on it.
        dropped_weight_TE: float32 weights of the mean outputs that stand in for experts of the
            model's own choice that are not selected, (tokens, experts); 0 for all others. None if
            nothing stands in for them.
    """

    selection: Selection
    weight_TK: Tensor
    probability_TE: Tensor
    score_TE: Tensor
    dropped_weight_TE: Tensor | None = None
