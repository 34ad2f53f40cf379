"""Remove one selected expert of one token in one layer, and measure the change of the loss.

Only the weight of the pair (token, expert) in that layer is set to 0: the other experts' weights
are not renormalised, and later layers route as usual. With causal attention only the token itself
and later ones can change, so the tokens before it are read once and kept as a cache. The
interventions on a token are the rows of one batch, whose first row is the unchanged token.

The selected pairs are those of the pass over the whole document. The batch routes the token again,
and rounding may change the selection. A removal of an expert that is then not selected hits nothing
and says nothing about the expert; it is marked.

Shape letters: T tokens, K slots, R rows of a batch, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from moe_routing.analysis.optional import present
from moe_routing.engine.adapters import RouterModule, find_routers
from moe_routing.engine.head import logits_of, plain_head
from moe_routing.engine.packable import rope_span
from moe_routing.engine.patching import Forward, patched_forward
from moe_routing.engine.recorder import Recorder
from moe_routing.errors import InputError
from moe_routing.routing.types import Routing

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin


@dataclass(frozen=True)
class Removal:
    """One pair that is removed.

    Attributes:
        layer: layer.
        expert: expert.
        rank: its rank among the token's experts, from 0.
        weight: the weight that is set to 0.
    """

    layer: int
    expert: int
    rank: int
    weight: float


class SelectionRecorder(Recorder):
    """Keeps the routing of the last forward pass, layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.routings: dict[int, Routing] = {}

    def add(self, layer: int, routing: Routing, floor: int, cap: int) -> None:
        """Keep the routing of one layer."""
        self.routings[layer] = routing

    def removals(self, token: int, layers: Sequence[int]) -> list[Removal]:
        """Return every selected pair of a token in the given layers."""
        found = []
        for layer in layers:
            selection = self.routings[layer].selection
            count = int(selection.count_T[token])
            experts = selection.index_TK[token, :count].tolist()
            weights = self.routings[layer].weight_TK[token, :count].tolist()
            found += [
                Removal(layer, expert, rank, weight)
                for rank, (expert, weight) in enumerate(zip(experts, weights, strict=True))
            ]
        return found


@contextmanager
def removed(
    routers: Sequence[RouterModule], removals: Sequence[Removal], steps: int
) -> Iterator[Tensor]:
    """Remove one pair from each row of a batch except the first; use inside ``routed``.

    Args:
        routers: the routers of the model.
        removals: the pairs that rows 1, 2, ... lose at their first position.
        steps: positions of a row.

    Yields:
        Whether each removal hit an expert that its row had selected, bool, (removals,); filled in
        by the forward pass.
    """
    hit_R = torch.zeros(len(removals), dtype=torch.bool)
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for index, removal in enumerate(removals):
        by_layer.setdefault(removal.layer, []).append((index, removal.expert))
    with ExitStack() as stack:
        for router in routers:
            if router.layer in by_layer:
                without = partial(_without, by_layer[router.layer], steps, hit_R)
                stack.enter_context(patched_forward(router.module, without))
        yield hit_R


RouterForward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From hidden states to logits, weights and expert ids."""


def _without(
    pairs: Sequence[tuple[int, int]], steps: int, hit_R: Tensor, inner: Forward
) -> RouterForward:
    index_R, expert_R = (torch.tensor(column) for column in zip(*pairs, strict=True))
    token_R = (index_R + 1) * steps
    route = cast("RouterForward", inner)

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weight_TK, index_TK = route(hidden_states)
        token, expert = token_R.to(index_TK.device), expert_R.to(index_TK.device)
        # A padded slot may carry the id of an expert, with weight 0.
        hit_RK = (index_TK[token] == expert[:, None]) & (weight_TK[token] != 0)
        hit_R[index_R] = hit_RK.any(1).cpu()
        weight_TK = weight_TK.clone()
        weight_TK[token] = weight_TK[token].masked_fill(hit_RK, 0.0)
        return logits_TE, weight_TK, index_TK

    return forward


@dataclass(frozen=True)
class Intervened:
    """The effect of removing every selected pair of one token.

    Attributes:
        position: the token.
        removals: the pairs.
        hit_R: whether the batch of interventions had selected the pair too; bool, (removals,).
        change_RS: change of the next-token loss from that of the unchanged row, nats, float64,
            (removals, positions followed).
        noise_floor: difference in the token's loss between the unchanged row and the pass over the
            whole document, nats; rounding only.
    """

    position: int
    removals: list[Removal]
    hit_R: np.ndarray
    change_RS: np.ndarray
    noise_floor: float


@torch.inference_mode()
def loss_changes(
    model: PreTrainedModel,
    ids_S: Tensor,
    positions: Sequence[int],
    layers: Sequence[int],
    horizon: int,
    recorder: SelectionRecorder,
) -> Iterator[Intervened]:
    """Remove every selected pair of some tokens, one at a time; use inside ``routed``.

    Losses are computed from the final hidden states in float32 or better, whatever the dtype of the
    model: half-precision logits are coarser than most effects. Where more than a linear layer lies
    between states and logits, the model computes them in its own dtype.

    Args:
        model: the model, with a strategy in place that writes to ``recorder``.
        ids_S: token ids of one document, int64, (positions,).
        positions: tokens to intervene on; each needs one token after it.
        layers: layers to intervene in.
        horizon: positions whose next-token loss is followed, the intervened one first.
        recorder: the recorder given to ``routed``.

    Yields:
        One result per position.

    Raises:
        InputError: a loss is not finite, or the document is so long that rotary embeddings depend
            on its length.
    """
    longest = rope_span(model.config)
    if ids_S.numel() - 1 > longest:
        raise InputError(
            f"ablation: a document of {ids_S.numel() - 1} tokens; allowed: at most {longest}, "
            "because the model's rotary embeddings depend on the longest sequence beyond"
        )
    routers, losses = find_routers(model), partial(_losses, model, plain_head(model))
    # The last token is only predicted.
    whole = model.base_model(ids_S[None, :-1], use_cache=True, past_key_values=DynamicCache())
    by_position = {position: recorder.removals(position, layers) for position in positions}
    for position, removals in by_position.items():
        end = min(position + horizon, ids_S.numel() - 1)
        input_S, target_S = ids_S[position:end], ids_S[position + 1 : end + 1]
        rows = len(removals) + 1
        with removed(routers, removals, input_S.numel()) as hit_R:
            hidden_RSH = model.base_model(
                input_S.expand(rows, -1),
                past_key_values=_cut(whole.past_key_values, position, rows),
                use_cache=True,
            ).last_hidden_state
        loss_RS = losses(hidden_RSH, target_S.expand(rows, -1))
        read = losses(whole.last_hidden_state[:, position:end], target_S[None])
        if not (loss_RS.isfinite().all() and read.isfinite().all()):
            raise InputError(
                f"ablation: a loss at position {position} is not finite; allowed: numbers (check "
                "the weights and the dtype)"
            )
        change_RS = (loss_RS[1:] - loss_RS[:1]).cpu().numpy()
        noise_floor = float((loss_RS[0, 0] - read[0, 0]).abs())
        yield Intervened(position, removals, hit_R.numpy(), change_RS, noise_floor)


def _losses(
    model: PreTrainedModel, head: nn.Linear | None, hidden_RSH: Tensor, target_RS: Tensor
) -> Tensor:
    """Return next-token losses in nats, float64, (rows, positions)."""
    hidden_NH = hidden_RSH.flatten(0, 1)
    if head is None:
        logits_NV = logits_of(model, hidden_NH)
    else:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        bias = None if head.bias is None else head.bias.to(dtype)
        hidden_NH = hidden_NH.to(head.weight.device, dtype)
        logits_NV = F.linear(hidden_NH, head.weight.to(dtype), bias)
    target_N = target_RS.to(logits_NV.device).flatten()
    losses = F.cross_entropy(logits_NV.double(), target_N, reduction="none")
    return losses.view(target_RS.shape)


def _cut(cache: DynamicCache, length: int, rows: int) -> DynamicCache:
    """Return the first positions of a cache of one row, repeated over rows; a copy.

    Caches are made without the model's config, so that they keep what a sliding window has left.
    """
    copy = DynamicCache()
    for layer, entry in enumerate(cast("list[CacheLayerMixin]", cache.layers)):
        keys, values = present(entry.keys)[:, :, :length], present(entry.values)[:, :, :length]
        copy.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return copy
