"""Remove experts of a token together: those that a rule leaves out, in one layer or in all.

Shape letters: L layers, T tokens, E experts, S sets of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_routing.engine.branches import Probe, batches
from moe_routing.engine.removing import Removed, Remover, removing
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.ordering import order_experts
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.scores import ExpertScorer
from moe_routing.routing.strategies import Strategy
from moe_routing.routing.toggles import Toggles

KEPT = (2, 3, 4)
"""Experts of the model's own choice that each order keeps, as far as the model has more."""
RULE, EFFECT, EXACT_NORM, NORM, ROUTER = "bh", "effect", "exact_norm", "norm", "router"
ORDERS = (EFFECT, EXACT_NORM, NORM, ROUTER)
"""What ranks the experts of the model's own choice: the measured effect of removing each alone; its
weight times the norm of its output; times the predicted norm; its weight."""
ALL_LAYERS = "all"
"""In the column ``layer``: experts are removed in all layers at once."""


def kept_by_strategy(strategy: Strategy, calibration: Calibration, toggles: Toggles) -> Tensor:
    """Return which experts a strategy keeps of the toggled tokens, bool, (layers, tokens, experts).

    The strategy reads the router logits of the toggles: the states of the stock model.

    Args:
        strategy: a strategy; what it weights experts by is not looked at.
        calibration: what the strategy needs.
        toggles: experts of the tokens, toggled.
    """
    select = strategy.selector(calibration, toggles.num_experts)
    scorer = ExpertScorer.of(strategy, calibration)
    kept = []
    for layer in range(toggles.num_layers):
        inputs = toggles.inputs(layer, calibration.sample.centred_norm_LE)
        if scorer is not None and scorer.score == "exact_norm":
            exact_LTE = toggles.deviation_LTE if scorer.compensated else toggles.norm_LTE
            inputs = replace(inputs, log_size_TE=exact_LTE[layer].log())
        scored = inputs if scorer is None else scorer(inputs)
        index_TK = select(scored, inputs.softmax_TE).index_TK
        # The last column takes the empty slots.
        kept_TE = torch.zeros(len(index_TK), toggles.num_experts + 1, dtype=torch.bool)
        kept.append(kept_TE.scatter(1, index_TK, True)[:, :-1])
    return torch.stack(kept)


class Set(NamedTuple):
    """Experts of every token and layer that are kept of the model's own choice.

    Attributes:
        order: what they were chosen by.
        kept_LTE: bool.
    """

    order: str
    kept_LTE: Tensor


def kept_numbers(top_k: int) -> list[int]:
    """Return how many experts the orders keep of a model's own ``top_k``.

    >>> kept_numbers(8), kept_numbers(3), kept_numbers(2)
    ([2, 3, 4], [2], [1])
    """
    return [k for k in KEPT if k < top_k] or list(range(1, top_k))


def ordered_sets(toggles: Toggles, outputs: ExpertOutputs) -> list[Set]:
    """Return the experts that each order keeps, for each number of them below the model's own."""
    scorer = ExpertScorer.build("norm", outputs, None, "held-out removals")
    layers = range(toggles.num_layers)
    value = {
        EFFECT: own_effects(toggles),
        EXACT_NORM: toggles.weight_LTE * toggles.norm_LTE,
        NORM: torch.stack([scorer.of_toggles(toggles, layer) for layer in layers]),
        ROUTER: toggles.weight_LTE,
    }
    own_LTE, sets = own_experts(toggles), []
    for order in ORDERS:
        value_LTE = value[order].float().masked_fill(~own_LTE, -torch.inf)
        _, order_NE = order_experts(value_LTE.flatten(0, 1))
        for k in kept_numbers(toggles.rule.top_k):
            kept_NE = torch.zeros_like(order_NE, dtype=torch.bool).scatter(1, order_NE[:, :k], True)
            sets.append(Set(order, kept_NE.view_as(own_LTE)))
    return sets


def own_experts(toggles: Toggles) -> Tensor:
    """Return which experts are of the model's own choice, bool, (layers, tokens, experts)."""
    return ~own_effects(toggles).isnan()


def own_effects(toggles: Toggles) -> Tensor:
    """Return the KL of removing each expert of the model's own choice; NaN for all others."""
    own_P = toggles.rank_P < toggles.rule.top_k
    kl_LTE = torch.full(toggles.logits_LTE.shape, torch.nan, dtype=torch.float64)
    pair = (toggles.layer_P[own_P], toggles.token_P[own_P], toggles.expert_P[own_P])
    kl_LTE[pair] = toggles.kl_P[own_P]
    return kl_LTE


@dataclass(frozen=True)
class Together:
    """Experts that were removed together.

    Attributes:
        rows: one row per token, order, k and layer, or all layers; see :func:`remove_together`.
        loss_T: loss of the realised next token under stock, nats, float64.
    """

    rows: pd.DataFrame
    loss_T: Tensor


def remove_together(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    toggles: Toggles,
    kept: Set,
    sets: Sequence[Set],
) -> Together:
    """Remove the experts of the model's own choice that are not kept, all at once.

    In each layer alone, for the first set; in all layers at once, for every set. The sets are those
    of the stock model's states: :mod:`moe_routing.engine.removing` says how later layers go on.

    Columns of ``rows``: ``token`` (index, in the order of ``Toggles.token_P``), ``order``, ``k``
    (experts kept of the model's own choice, the mean over layers in rows of all layers),
    ``layer`` (a number, or ``all``), ``removed`` (number of experts), ``kl`` (KL(stock || removed),
    nats), ``loss_change`` (removed minus stock, nats), ``sum_kl`` (sum of the KL of removing each
    of the experts alone, nats).

    Args:
        model: the stock model.
        probes: the documents and tokens of the toggles.
        toggles: experts of the same tokens, toggled one at a time.
        kept: experts that a rule keeps.
        sets: experts that orders keep.

    Raises:
        InputError: see :func:`~moe_routing.engine.removing.removing`.
    """
    own_LTE, every = own_experts(toggles), [kept, *sets]
    removed_LTSE = torch.stack([own_LTE & ~one.kept_LTE for one in every], 2)
    with removing(model, max(p.ids_S.numel() - 1 for p in probes), "held-out removals") as remove:
        found = _run(remove, probes, removed_LTSE)
    sum_LTS = (own_effects(toggles).nan_to_num(0.0)[:, :, None] * removed_LTSE).sum(-1)
    count_LTS = removed_LTSE.sum(-1)
    kept_LTS = (own_LTE.sum(-1)[..., None] - count_LTS).double()
    parts = [
        _rows(kept, str(layer), kept_LTS[layer, :, 0], count_LTS[layer, :, 0],
              found.alone_kl_LP[layer], found.alone_change_LP[layer], sum_LTS[layer, :, 0])
        for layer in range(toggles.num_layers)
    ] + [
        _rows(one, ALL_LAYERS, kept_LTS[..., at].mean(0), count_LTS[..., at].sum(0),
              found.kl_PB[:, at], found.change_PB[:, at], sum_LTS[..., at].sum(0))
        for at, one in enumerate(every)
    ]  # fmt: skip
    return Together(pd.concat(parts, ignore_index=True), found.loss_P)


def _rows(
    one: Set,
    layer: str,
    k_T: Tensor,
    removed_T: Tensor,
    kl_T: Tensor,
    change_T: Tensor,
    sum_T: Tensor,
) -> pd.DataFrame:
    return pd.DataFrame({
        "token": np.arange(len(k_T)), "order": one.order, "k": k_T.numpy(), "layer": layer,
        "removed": removed_T.numpy(), "kl": kl_T.numpy(), "loss_change": change_T.numpy(),
        "sum_kl": sum_T.numpy(),
    })  # fmt: skip


def _run(remove: Remover, probes: Sequence[Probe], removed_LTSE: Tensor) -> Removed:
    """Remove the first set in each layer alone, and all sets in all layers, in batches."""
    layers, tokens, sets = removed_LTSE.shape[:3]
    parts, first = [], 0
    with tqdm(total=tokens, desc="remove together", unit="token") as bar:
        for batch in batches(probes, layers + sets):
            last = first + sum(len(probe.positions) for probe in batch)
            removed_LPSE = removed_LTSE[:, first:last]
            parts.append(remove(batch, removed_LPSE[:, :, 0], removed_LPSE))
            bar.update(last - first)
            first = last
    return Removed.concatenated(parts)
