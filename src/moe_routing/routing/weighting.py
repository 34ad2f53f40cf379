"""How much each selected expert counts: the second of a strategy's two decisions.

The model was trained with raw softmax weights; every other choice changes the scale of the
layer's output as well, so that weighting is a factor of the study by itself.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_routing.routing.types import Selection

Weighting = Literal["softmax", "renormalised", "uniform", "mass_matched"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def weigh(kind: Weighting, probability_TE: Tensor, selection: Selection, native_k: int) -> Tensor:
    """Return float32 weights (tokens, slots), 0 at padded slots.

    Args:
        kind: ``softmax`` (raw probability), ``renormalised`` (sum 1), ``uniform`` (1/count), or
            ``mass_matched`` (rescaled to the mass of the token's own top ``native_k``).
        probability_TE: float32 softmax over all experts, (tokens, experts).
        selection: the selected experts.
        native_k: the number of experts the model was trained with.
    """
    experts = probability_TE.shape[1]
    if kind == "uniform":
        padded_TK = selection.index_TK >= experts
        share_T1 = 1.0 / selection.count_T[:, None].clamp(min=1).float()
        return share_T1.expand(padded_TK.shape).masked_fill(padded_TK, 0.0)
    raw_TK = selected_probability(probability_TE, selection.index_TK)
    if kind == "softmax":
        return raw_TK
    share_TK = raw_TK / raw_TK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if kind == "renormalised":
        return share_TK
    mass_T1 = probability_TE.topk(min(native_k, experts), dim=1).values.sum(1, keepdim=True)
    return share_TK * mass_T1


def selected_probability(probability_TE: Tensor, index_TK: Tensor) -> Tensor:
    """Return the probability of each selected expert, (tokens, slots), 0 at padded slots."""
    # Padded slots read the column of zeros behind the last expert.
    return F.pad(probability_TE, (0, 1)).gather(1, index_TK)
