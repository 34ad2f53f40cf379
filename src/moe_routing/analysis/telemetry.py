"""Recorders for the BH analysis: experts of a whole batch, and of decoding steps alone.

Shape letters: T tokens, K slots, E experts, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_routing.engine.context import Sums, current_context
from moe_routing.engine.recorder import Recorder
from moe_routing.routing.types import Routing


class UnionRecorder(Recorder):
    """Also counts the distinct experts that a batch of tokens needs.

    Decoding a batch of sequences loads the union of their experts' weights. Here a batch is
    ``batch`` tokens of one forward pass, as far apart as possible, so that most come from different
    documents.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def add(self, layer: int, routing: Routing, floor: int, cap: int) -> None:
        """Add the routing of one layer in one forward pass."""
        super().add(layer, routing, floor, cap)
        index_TK = routing.selection.index_TK
        mask_T = current_context().mask_T
        if mask_T is not None:
            index_TK = index_TK[mask_T.to(index_TK.device)]
        distinct_G = distinct_experts(index_TK, routing.probability_TE.shape[1], self.batch)
        self._accumulate("distinct", layer, distinct_G.sum())
        self._accumulate("groups", layer, distinct_G.numel())

    def mean_distinct(self) -> float:
        """Return the distinct experts of a batch, averaged over batches and layers.

        NaN if no forward pass had ``batch`` tokens.
        """
        groups = sum(int(value) for value in self._by_layer("groups").values())
        total = sum(float(value) for value in self._by_layer("distinct").values())
        return total / groups if groups else float("nan")


def distinct_experts(index_TK: Tensor, experts: int, batch: int) -> Tensor:
    """Count the distinct experts of each group of ``batch`` tokens, int64, (groups,).

    Group g of G holds tokens g, g + G, g + 2 G, ...; tokens that fill no group are left out.

    Args:
        index_TK: expert ids, (tokens, slots); the id ``experts`` marks a padded slot.
        experts: number of experts.
        batch: tokens of a group.
    """
    groups = index_TK.shape[0] // batch
    if groups == 0 or index_TK.shape[1] == 0:
        return index_TK.new_zeros(groups)
    index_GX = index_TK[: groups * batch].view(batch, groups, -1).transpose(0, 1).flatten(1)
    used_GE = torch.zeros(groups, experts + 1, dtype=torch.bool, device=index_TK.device)
    return used_GE.scatter_(1, index_GX, value=True)[:, :experts].sum(1)


class DecodingRecorder(Recorder):
    """Records decoding steps only: forward passes of a single token."""

    def add(self, layer: int, routing: Routing, floor: int, cap: int) -> None:
        """Add the routing of one layer, unless the pass reads a prompt."""
        if routing.probability_TE.shape[0] == 1:
            super().add(layer, routing, floor, cap)


class SwitchedRecorder(Recorder):
    """Passes every routing on to another recorder, which may be replaced while a model is routed.

    To build a router of BH takes longer than a short text, so a model is routed once for all uses.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def add(self, layer: int, routing: Routing, floor: int, cap: int) -> None:
        """Add the routing of one layer in one forward pass to the present recorder."""
        self.recorder.add(layer, routing, floor, cap)

    def merge(self, sums: Sums) -> None:
        """Add the sums of a forward context to the present recorder."""
        self.recorder.merge(sums)
