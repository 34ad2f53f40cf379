"""Toggle one expert of one token in one layer, many at once, and compare the predictions.

Each toggle is a branch (:mod:`moe_routing.engine.branches`). What is toggled is decided by the
routing of the document's own token, which the branch takes over in that layer: rounding cannot make
a branch miss its expert. Later layers route as usual.

The last branches of a token may be compensated: there the expert's mean output takes the place of
the output of a removed expert, with the same weight.

Shape letters: T tokens of the batch, P probed tokens, A branches of a probed token in a layer, C
compensated ones of them, L layers with branches, R rows of the branches of a layer, K slots, E
experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_routing.engine.adapters import RouterModule
from moe_routing.engine.branches import (
    BranchBatch,
    Probe,
    branching,
    most_copies,
    tokens_of,
    would_weights,
)
from moe_routing.engine.patching import Forward, patched_forward
from moe_routing.routing.ordering import order_experts


@dataclass(frozen=True)
class Substitutes:
    """Mean outputs that stand in for removed experts in compensated branches.

    Attributes:
        mean_LEH: mean output of each expert, in every layer of the model.
        branches: how many branches of a token, the last ones, are compensated.
    """

    mean_LEH: Tensor
    branches: int

    def between(self, first: int, last: int, branches: int) -> Substitutes | None:
        """Return those of some of the branches of a token; None if none of them is compensated."""
        count = last - max(first, branches - self.branches)
        return Substitutes(self.mean_LEH, count) if count > 0 else None

    def of(self, layer: int, expert_PA: Tensor, removed_PA: Tensor) -> Tensor:
        """Return what is added to the outputs of compensated branches, (P, C, H).

        Args:
            layer: the layer.
            expert_PA: the toggled expert of every branch.
            removed_PA: the weight that was removed, 0 where an expert was added.
        """
        expert_PC, removed_PC = expert_PA[:, -self.branches :], removed_PA[:, -self.branches :]
        return removed_PC[..., None] * self.mean_LEH[layer].to(removed_PC)[expert_PC]


@dataclass(frozen=True)
class Effects:
    """What the toggles of one batch did, by layer (in the model's order), probed token and branch.

    Attributes:
        expert_LPA: the toggled expert, int64.
        weight_LPE: the weight that the model gives, or would give, every expert, float32.
        logits_LPE: router logits of every expert, float32.
        own_LPE: whether an expert is of the model's own choice, or of that of its routing, bool.
        hidden_LPH: what the router reads at the probed tokens, float32.
        kl_LPA: KL(stock || toggled) of the next-token distribution at the token, nats, float64.
        change_LPA: loss of the realised next token, toggled minus stock, nats, float64.
        loss_P: loss of the realised next token under stock, nats, float64.
        stock_PH: final hidden states of the document's own tokens, on the model's device.
        choice_LPE: what ranks the experts, float32, if that is not the logit.
    """

    expert_LPA: Tensor
    weight_LPE: Tensor
    logits_LPE: Tensor
    own_LPE: Tensor
    hidden_LPH: Tensor
    kl_LPA: Tensor
    change_LPA: Tensor
    loss_P: Tensor
    stock_PH: Tensor
    choice_LPE: Tensor | None = None

    @property
    def weight_LPA(self) -> Tensor:
        """The weight that is removed, or added, float32."""
        return self.weight_LPE.gather(-1, self.expert_LPA)

    @classmethod
    def concatenated(cls, parts: Sequence[Effects]) -> Effects:
        """Join the effects of the probed tokens of several batches."""
        names = [f.name for f in fields(cls) if getattr(parts[0], f.name) is not None]
        axes = [1 if "_L" in name else 0 for name in names]
        return cls(**{
            name: torch.cat([getattr(part, name) for part in parts], axis)
            for name, axis in zip(names, axes, strict=True)
        })  # fmt: skip

    @classmethod
    def of_branches(cls, parts: Sequence[Effects]) -> Effects:
        """Join the effects of several branches, on the same tokens and layers."""
        names = [f.name for f in fields(cls) if f.name.endswith("_LPA")]
        joined = {name: torch.cat([getattr(part, name) for part in parts], 2) for name in names}
        return replace(parts[0], **joined)

    @classmethod
    def of_layers(cls, parts: Sequence[Effects]) -> Effects:
        """Join the effects of several groups of layers, on the same tokens."""
        names = [f.name for f in fields(cls) if "_L" in f.name]
        joined = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in names
            if getattr(parts[0], name) is not None
        }
        return replace(parts[0], **joined)


@contextmanager
def toggling(
    model: PreTrainedModel, longest: int, what: str, *, of_routed: bool = False
) -> Iterator[Toggler]:
    """Prepare a model; inside the context, call what is yielded for each batch.

    Args:
        model: the stock model, or a routed one.
        longest: most tokens of a document that are read.
        what: what toggles, for messages.
        of_routed: whether the model may be routed. Its tokens then have the experts of that
            routing, which are the ones that toggles remove, and later layers of a branch are routed
            by it, too.

    Raises:
        InputError: see :func:`~moe_routing.engine.branches.branching`.
    """
    with branching(model, longest, what) as packed:
        yield Toggler(model, what, packed, of_routed)


@dataclass(frozen=True)
class Toggler:
    """Toggles experts of a model that :func:`toggling` has prepared."""

    model: PreTrainedModel
    what: str
    packed: bool
    of_routed: bool = False

    @torch.inference_mode()
    def __call__(
        self,
        probes: Sequence[Probe],
        rank_LPA: Mapping[int, Tensor],
        *,
        weightless: bool = False,
        stock_PH: Tensor | None = None,
        substitutes: Substitutes | None = None,
    ) -> Effects:
        """Toggle experts of the probed tokens, in one forward pass if the batch is packed.

        An expert of the model's own choice gets the weight 0, and nothing is renormalised. Any
        other is added with its probability, scaled as the model scales those of its own choice.

        Args:
            probes: documents and tokens.
            rank_LPA: by layer, the ranks of the experts to toggle, from 0, int64, (probed tokens in
                order, branches). Those of the model's own choice come first, then by probability;
                of equal ones, the lower index.
            weightless: change no weight, and add experts with the weight 0: rounding only.
            stock_PH: what to compare branches with, from another batch; None: from this one.
            substitutes: what stands in for removed experts; None: nothing.

        Raises:
            InputError: a loss is not finite, or the model is routed and must not be.
        """
        rank_LPA = dict(sorted(rank_LPA.items()))  # branches enter in this order
        if self.packed:
            return self._of_batch(probes, rank_LPA, weightless, stock_PH, substitutes)
        parts = []
        for index, probe in enumerate(tokens_of(probes)):
            here = slice(index, index + 1)
            of_token = {layer: rank_PA[here] for layer, rank_PA in rank_LPA.items()}
            stock_1H = None if stock_PH is None else stock_PH[here]
            parts.append(self._of_token(probe, of_token, weightless, stock_1H, substitutes))
        return Effects.concatenated(parts)

    def _of_token(
        self,
        probe: Probe,
        rank_LPA: Mapping[int, Tensor],
        weightless: bool,
        stock_PH: Tensor | None,
        substitutes: Substitutes | None,
    ) -> Effects:
        """Toggle experts of one token, as many at once as a batch holds copies for."""
        branches = next(iter(rank_LPA.values())).shape[1]
        most = most_copies(probe)
        at_once, layers, groups = max(1, most // branches), list(rank_LPA), []
        for start in range(0, len(layers), at_once):
            group, parts = layers[start : start + at_once], []
            for first in range(0, branches, most):
                last = min(branches, first + most)
                chosen = {layer: rank_LPA[layer][:, first:last] for layer in group}
                given = None if substitutes is None else substitutes.between(first, last, branches)
                parts.append(self._of_batch([probe], chosen, weightless, stock_PH, given))
            groups.append(Effects.of_branches(parts))
        return Effects.of_layers(groups)

    def _of_batch(
        self,
        probes: Sequence[Probe],
        rank_LPA: Mapping[int, Tensor],
        weightless: bool,
        stock_PH: Tensor | None,
        substitutes: Substitutes | None,
    ) -> Effects:
        """Toggle experts in one forward pass."""
        batch = _Toggles(probes, rank_LPA, weightless, substitutes)
        batch.sole = None if self.of_routed else "toggled"
        found = batch.run(self.model, self.what, packed=self.packed, stock_PH=stock_PH)
        columns = zip(*(batch.seen[layer] for layer in rank_LPA), strict=True)
        seen = map(torch.stack, columns)
        choices = [batch.choices[layer] for layer in rank_LPA if layer in batch.choices]
        return Effects(
            *seen,
            *(getattr(found, field.name) for field in fields(found)),
            choice_LPE=torch.stack(choices) if choices else None,
        )


class _Toggles(BranchBatch):
    """Documents, and a block of branches for each layer."""

    def __init__(
        self,
        probes: Sequence[Probe],
        rank_LPA: Mapping[int, Tensor],
        weightless: bool,
        substitutes: Substitutes | None,
    ) -> None:
        super().__init__(probes, next(iter(rank_LPA.values())).shape[1])
        self.entering, self.changed = dict.fromkeys(rank_LPA, 1), frozenset(rank_LPA)
        self.rank_LPA, self.weightless, self.substitutes = rank_LPA, weightless, substitutes
        # By layer, on the host: experts, (P, A), weights and logits, (P, E), whether an expert is
        # of the model's own choice, (P, E), and router inputs, (P, H).
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = {}
        # By layer: what stands in for the removed experts, (P, C, H), until it is added.
        self.added: dict[int, Tensor] = {}

    def route(
        self,
        router: RouterModule,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
    ) -> None:
        """Let the newest branches take over their tokens' routing, with one expert toggled."""
        token_P = self.source_P.to(logits_TE.device)
        index_PAK, weight_PAK = self._toggled(
            router, hidden_TH[token_P], logits_TE[token_P], index_TK[token_P], weight_TK[token_P]
        )
        for rows, own in ((index_TK, index_PAK), (weight_TK, weight_PAK)):
            rows[-self.source_R.numel() :] = own.flatten(0, 1)

    def patches(self, router: RouterModule) -> Iterator[AbstractContextManager[None]]:
        """Yield what replaces forwards in a layer: of the router, and to add substitutes."""
        yield from super().patches(router)
        if self.substitutes is not None:
            compensate = partial(self._experts, router.layer, self.substitutes)
            yield patched_forward(router.experts, compensate)

    def _toggled(
        self,
        router: RouterModule,
        hidden_PH: Tensor,
        logits_PE: Tensor,
        index_PK: Tensor,
        weight_PK: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the experts and weights of the probed tokens' branches, (P, A, K).

        What is toggled, and what stands in for it, is kept.
        """
        probability_PE = logits_PE.softmax(-1)
        weight_PE, own_PE = would_weights(probability_PE, index_PK, weight_PK)
        _, order_PE = order_experts(own_PE.float(), probability_PE)
        expert_PA = order_PE.gather(1, self.rank_LPA[router.layer].to(order_PE.device))
        hit_PAK = index_PK[:, None] == expert_PA[..., None]
        hit_PA = hit_PAK.any(-1)
        weight, logits, hidden = (x.float().cpu() for x in (weight_PE, logits_PE, hidden_PH))
        self.seen[router.layer] = (expert_PA.cpu(), weight, logits, own_PE.bool().cpu(), hidden)
        changed_PA = weight_PE.gather(1, expert_PA)
        if self.substitutes is not None:
            self.added[router.layer] = self.substitutes.of(
                router.layer, expert_PA, changed_PA * hit_PA
            )
        gone_PAK = hit_PAK & (not self.weightless)
        index_PAK = index_PK[:, None].where(~gone_PAK, router.num_experts)
        weight_PAK = weight_PK[:, None].where(~gone_PAK, 0.0)
        # The last slot is empty so far.
        index_PAK[..., -1] = expert_PA.where(~hit_PA, router.num_experts)
        weight_PAK[..., -1] = changed_PA.where(~hit_PA, 0.0) * (not self.weightless)
        return index_PAK, weight_PAK

    def _experts(
        self, layer: int, substitutes: Substitutes, inner: Forward
    ) -> Callable[..., object]:
        """Return the forward of experts that adds what stands in for removed ones."""
        compute = cast("Callable[[Tensor, Tensor, Tensor], Tensor]", inner)

        def forward(hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
            out_TH = compute(hidden_TH, index_TK, weight_TK)
            newest_R = self.newest(layer, out_TH.shape[:-1].numel())
            place_PC = newest_R.view(-1, self.branches)[:, -substitutes.branches :]
            added_PCH = self.added.pop(layer).to(out_TH)
            out_TH.view(-1, out_TH.shape[-1])[place_PC.flatten()] += added_PCH.flatten(0, 1)
            return out_TH

        return forward
