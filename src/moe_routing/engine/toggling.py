"""Toggle one expert of one token in one layer, many at once, and compare the predictions.

A branch is the continuation of a document from one token on, with one expert of that token toggled
in one layer. Branches are rows of the same packed batch as their documents. They enter at the layer
of their toggle, as copies of the document's hidden states, and from there on go through the model's
own layers like any other token: their attention reads the document's tokens before them, and their
own. So nothing below the toggled layer is computed again, and no key or value is copied.

What is toggled is decided by the routing of the document's own token, which the branch takes over
in that layer: rounding cannot make a branch miss its expert. Later layers route as usual.

The last branches of a token may be compensated: there the expert's mean output takes the place of
the output of a removed expert, with the same weight.

Shape letters: T tokens of the batch, P probed tokens, A branches of a probed token in a layer, C
compensated ones of them, L layers with branches, S positions of a branch, K slots, E experts, H
hidden size, V vocabulary, N rows of logits, B branches of a probed token so far, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.adapters import RouterModule, find_experts, find_routers
from moe_routing.engine.attention import Layout, PaddedLayout, SlicedLayout, packed_attention
from moe_routing.engine.experts import EXPERTS_IMPLEMENTATION
from moe_routing.engine.head import logits_of
from moe_routing.engine.kernels import fused_cpu_kernels
from moe_routing.engine.offload import input_device
from moe_routing.engine.packable import packable_attention
from moe_routing.engine.packing import Span
from moe_routing.engine.patching import Forward, patched_forward
from moe_routing.engine.routed import chosen_experts
from moe_routing.engine.upcast import upcast, wide_dtype
from moe_routing.errors import InputError
from moe_routing.routing.ordering import order_experts

BATCH_ROWS = 8192
"""Most rows of a forward pass: tokens of documents, and of branches of all layers."""
LOGIT_NUMBERS = 1 << 21
"""Most logits of branches at once; they are compared in double precision, which takes 40 MB."""


@dataclass(frozen=True)
class Probe:
    """A document and the tokens in it whose experts are toggled.

    Attributes:
        document: its index or id.
        ids_S: its token ids, int64; the last one is only predicted.
        positions: the tokens, in order; each has a token after it.
    """

    document: int | str
    ids_S: Tensor
    positions: tuple[int, ...]


def batches(probes: Sequence[Probe], branches: int, steps: int = 1) -> Iterator[list[Probe]]:
    """Fill batches of at most ``BATCH_ROWS`` rows.

    A document with too many tokens is in several batches. One token makes a batch in any case.

    Args:
        probes: documents and tokens.
        branches: branches of a token, in all layers.
        steps: positions of a branch.
    """
    batch: list[Probe] = []
    rows, most = 0, max(1, BATCH_ROWS // (branches * steps))
    for probe in probes:
        for start in range(0, len(probe.positions), most):
            positions = probe.positions[start : start + most]
            own = positions[-1] + steps + len(positions) * branches * steps
            if batch and rows + own > BATCH_ROWS:
                yield batch
                batch, rows = [], 0
            batch.append(replace(probe, positions=positions))
            rows += own
    yield batch


@dataclass(frozen=True)
class Substitutes:
    """Mean outputs that stand in for removed experts in compensated branches.

    Attributes:
        mean_LEH: mean output of each expert, in every layer of the model.
        branches: how many branches of a token, the last ones, are compensated.
    """

    mean_LEH: Tensor
    branches: int

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
        hidden_LPH: what the router reads at the probed tokens, float32.
        kl_LPA: KL(stock || toggled) of the next-token distribution at the token, nats, float64.
        change_LPAS: loss of the realised next token at each position of the branch, toggled minus
            stock, nats, float64; 0 beyond the end of the document.
        stock_PSH: final hidden states of the document's own tokens, on the model's device.
    """

    expert_LPA: Tensor
    weight_LPE: Tensor
    logits_LPE: Tensor
    hidden_LPH: Tensor
    kl_LPA: Tensor
    change_LPAS: Tensor
    stock_PSH: Tensor

    @property
    def weight_LPA(self) -> Tensor:
        """The weight that is removed, or added, float32."""
        return self.weight_LPE.gather(-1, self.expert_LPA)

    @classmethod
    def concatenated(cls, parts: Sequence[Effects]) -> Effects:
        """Join the effects of the probed tokens of several batches."""
        names = [field.name for field in fields(cls)]
        axes = [1 if "_L" in name else 0 for name in names]
        return cls(*(
            torch.cat([getattr(part, name) for part in parts], axis)
            for name, axis in zip(names, axes, strict=True)
        ))  # fmt: skip


@contextmanager
def toggling(model: PreTrainedModel, longest: int, what: str) -> Iterator[Toggler]:
    """Prepare a model; inside the context, call what is yielded for each batch.

    Everything is computed in float32 or better (:func:`~moe_routing.engine.upcast.upcast`).

    Args:
        model: the stock model.
        longest: most tokens of a document that are read.
        what: what toggles, for errors.

    Raises:
        InputError: branches are not exact for the model.
    """
    exact = packable_attention(model)
    if exact.longest < longest:
        raise InputError(
            f"{what}: documents of {longest} tokens; allowed: at most {exact.longest}, because "
            f"{exact.reason}"
        )
    with (
        packed_attention(model),
        fused_cpu_kernels(model),
        upcast(model),
        chosen_experts(model, EXPERTS_IMPLEMENTATION),
    ):
        yield Toggler(model, what)


@dataclass(frozen=True)
class Toggler:
    """Toggles experts of a model that :func:`toggling` has prepared."""

    model: PreTrainedModel
    what: str

    @torch.inference_mode()
    def __call__(
        self,
        probes: Sequence[Probe],
        rank_LPA: Mapping[int, Tensor],
        *,
        steps: int = 1,
        weightless: bool = False,
        stock_PSH: Tensor | None = None,
        substitutes: Substitutes | None = None,
    ) -> Effects:
        """Toggle experts of the probed tokens in one forward pass.

        An expert of the model's own choice gets the weight 0, and nothing is renormalised. Any
        other is added with its probability, scaled as the model scales those of its own choice.

        Args:
            probes: documents and tokens.
            rank_LPA: by layer, the ranks of the experts to toggle, from 0, int64, (probed tokens in
                order, branches). Ranks are by probability; of equal ones, those of the model's own
                choice come first, then the lower index.
            steps: positions whose next-token loss is followed, the probed token first.
            weightless: change no weight, and add experts with the weight 0: rounding only.
            stock_PSH: what to compare branches with, from another batch; None: from this one.
            substitutes: what stands in for removed experts; None: nothing.

        Raises:
            InputError: a loss is not finite, or the model is routed.
        """
        rank_LPA = dict(sorted(rank_LPA.items()))  # branches enter in this order
        batch = _Batch(probes, rank_LPA, steps, weightless, substitutes)
        hidden_TH = batch.final_states(self.model)
        if stock_PSH is None:
            stock_PSH = hidden_TH[batch.source_PS.to(hidden_TH.device)]
        head = partial(logits_of, self.model)
        kl, change = zip(*batch.compare(head, stock_PSH, hidden_TH[batch.tokens :]), strict=True)
        columns = zip(*(batch.seen[layer] for layer in rank_LPA), strict=True)
        expert_LPA, *seen = map(torch.stack, columns)
        effects = Effects(
            expert_LPA,
            *seen,
            kl_LPA=torch.stack(kl, 1),
            change_LPAS=torch.stack(change, 1),
            stock_PSH=stock_PSH,
        )
        self._check(batch, effects)
        return effects

    def _check(self, batch: _Batch, effects: Effects) -> None:
        losses_LPAS = effects.kl_LPA[..., None] + effects.change_LPAS
        finite_P = losses_LPAS.isfinite().all(-1).all(-1).all(0)
        if not finite_P.all():
            index = int((~finite_P).nonzero()[0])
            raise InputError(
                f"{self.what}: a loss at position {int(batch.position_P[index])} of document "
                f"{batch.document_P[index]} is not finite; allowed: numbers (check the weights and "
                "the dtype)"
            )


class _Batch:
    """The documents of one forward pass, and their branches."""

    def __init__(
        self,
        probes: Sequence[Probe],
        rank_LPA: Mapping[int, Tensor],
        steps: int,
        weightless: bool,
        substitutes: Substitutes | None,
    ) -> None:
        self.rank_LPA, self.steps, self.weightless = rank_LPA, steps, weightless
        self.substitutes = substitutes
        self.branches = next(iter(rank_LPA.values())).shape[1]
        # By layer, on the host: experts, (P, A), weights and logits, (P, E), and router inputs,
        # (P, H).
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        # By layer: what stands in for the removed experts, (P, C, H), until it is added.
        self.added: dict[int, Tensor] = {}
        # Nothing reads what comes after the last branch.
        ends = [min(p.positions[-1] + steps, p.ids_S.numel() - 1) for p in probes]
        starts = list(accumulate(ends, initial=0))
        self.tokens = starts.pop()
        self.spans = [Span(s, (), end, ()) for s, end in zip(starts, ends, strict=True)]
        ids = [(p.ids_S[:end], p.ids_S[1 : end + 1]) for p, end in zip(probes, ends, strict=True)]
        self.ids_T, self.next_T = (torch.cat(part) for part in zip(*ids, strict=True))
        self.position_T = torch.cat([torch.arange(end) for end in ends])
        count = [len(p.positions) for p in probes]
        self.document_P = [p.document for p in probes for _ in p.positions]
        self.position_P = torch.tensor([position for p in probes for position in p.positions])
        start_P, end_P = (
            torch.tensor(bound).repeat_interleave(torch.tensor(count)) for bound in (starts, ends)
        )
        position_PS = self.position_P[:, None] + torch.arange(steps)
        self.inside_PS = position_PS < end_P[:, None]
        # Positions beyond the end of a document repeat its last token; nothing else sees them.
        self.source_PS = start_P[:, None] + position_PS.minimum(end_P[:, None] - 1)
        self.prefixes = list(zip(start_P.tolist(), self.source_PS[:, 0].tolist(), strict=True))
        # The branches of a layer are a block of rows: by probed token, branch, position.
        self.source_R = self.source_PS[:, None].expand(-1, self.branches, -1).flatten()

    def final_states(self, model: PreTrainedModel) -> Tensor:
        """Return the final hidden states of documents and branches, (T, H)."""
        routers, experts = find_routers(model), find_experts(model)
        device, dtype = input_device(model), wide_dtype(model.dtype)
        on_cpu = model.device.type == "cpu"  # that of a model with offloaded weights is meta
        stock = (SlicedLayout if on_cpu else PaddedLayout)(self.spans, dtype, device)
        with ExitStack() as stack:
            for layer in cast("nn.ModuleList", model.base_model.layers):
                inside = {id(module) for module in layer.modules()}
                router = next((r for r in routers if id(r.module) in inside), None)
                branching = router is not None and router.layer in self.rank_LPA
                stack.enter_context(patched_forward(layer, partial(self._layer, branching)))
            for router, expert in zip(routers, experts, strict=True):
                if router.layer in self.rank_LPA:
                    toggle = partial(self._router, router)
                    stack.enter_context(patched_forward(router.module, toggle, "toggled"))
                    if self.substitutes is not None:
                        compensate = partial(self._experts, router.layer, self.substitutes)
                        stack.enter_context(patched_forward(expert, compensate))
            output = model.base_model(
                input_ids=self.ids_T[None].to(device),
                position_ids=self.position_T[None].to(device),
                use_cache=False,
                layout=BranchLayout(stock, self.tokens, self.prefixes, self.branches, self.steps),
            )
        return output.last_hidden_state[0]

    def _layer(self, branching: bool, inner: Forward) -> Callable[..., object]:
        """Return the forward of a decoder layer in which branches may enter."""

        def forward(
            hidden_1TH: Tensor,
            *args: object,
            position_embeddings: tuple[Tensor, ...],
            **kwargs: object,
        ) -> object:
            source_R = self.source_R.to(hidden_1TH.device)
            if branching:
                hidden_1TH = torch.cat([hidden_1TH, hidden_1TH[:, source_R]], 1)
            blocks = (hidden_1TH.shape[1] - self.tokens) // source_R.numel()
            rope = tuple(
                torch.cat([part, part[:, source_R].repeat(1, blocks, 1)], 1)
                for part in position_embeddings
            )
            return inner(hidden_1TH, *args, position_embeddings=rope, **kwargs)

        return forward

    def _router(self, router: RouterModule, inner: Forward) -> Callable[..., object]:
        """Return the forward of a router that toggles in the newest branches."""
        route = cast("Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]", inner)

        def forward(hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE, weight_TK, index_TK = route(hidden_TH)
            # One more slot, for an expert that is added; empty in all other rows.
            index_TK = F.pad(index_TK, (0, 1), value=router.num_experts)
            weight_TK = F.pad(weight_TK, (0, 1))
            token_P = self.source_PS[:, 0].to(logits_TE.device)
            index_PAK, weight_PAK = self._toggled(
                router,
                hidden_TH[token_P],
                logits_TE[token_P],
                index_TK[token_P],
                weight_TK[token_P],
            )
            # The newest branches take over the routing of their document's own tokens.
            source_R = self.source_R.to(logits_TE.device)
            for rows, own in ((index_TK, index_PAK), (weight_TK, weight_PAK)):
                rows[-source_R.numel() :] = rows[source_R]
                rows[-source_R.numel() :: self.steps] = own.flatten(0, 1)
            return logits_TE, weight_TK, index_TK

        return forward

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
        real_PK = index_PK < router.num_experts
        chosen_PK = probability_PE.gather(1, index_PK.where(real_PK, 0)) * real_PK
        own_PE = F.pad(torch.zeros_like(probability_PE), (0, 1)).scatter(1, index_PK, 1)[:, :-1]
        _, order_PE = order_experts(probability_PE.float(), own_PE)
        expert_PA = order_PE.gather(1, self.rank_LPA[router.layer].to(order_PE.device))
        scale_P1 = weight_PK.sum(1, keepdim=True) / chosen_PK.sum(1, keepdim=True)
        would_PE = F.pad(probability_PE * scale_P1, (0, 1))
        weight_PE = would_PE.scatter(1, index_PK, weight_PK)[:, :-1]
        hit_PAK = index_PK[:, None] == expert_PA[..., None]
        hit_PA = hit_PAK.any(-1)
        seen = (x.float().cpu() for x in (weight_PE, logits_PE, hidden_PH))
        self.seen[router.layer] = (expert_PA.cpu(), *seen)
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
            shape = (-1, self.branches, self.steps)
            newest_PASH = out_TH[-self.source_R.numel() :].unflatten(0, shape)
            newest_PASH[:, -substitutes.branches :, 0] += self.added.pop(layer).to(out_TH)
            return out_TH

        return forward

    def compare(
        self, head: Callable[[Tensor], Tensor], stock_PSH: Tensor, rows_RH: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield KL, (L, A), and changes of losses, (L, A, S), of each probed token, on the host."""
        shape = (-1, len(self.prefixes), self.branches, self.steps)
        target_PS = self.next_T[self.source_PS]
        for rows_LASH, stock_SH, target_S, inside_S in zip(
            rows_RH.unflatten(0, shape).unbind(1), stock_PSH, target_PS, self.inside_PS, strict=True
        ):
            parts = [
                _compare(head, stock_H, rows_LAH.flatten(0, 1), int(target))
                for stock_H, rows_LAH, target in zip(
                    stock_SH, rows_LASH.unbind(2), target_S, strict=True
                )
            ]
            kl, change = (
                [part.view(-1, self.branches) for part in column]
                for column in zip(*parts, strict=True)
            )
            yield kl[0], torch.stack(change, -1).where(inside_S, 0.0)


def _compare(
    head: Callable[[Tensor], Tensor], stock_H: Tensor, rows_NH: Tensor, target: int
) -> tuple[Tensor, Tensor]:
    """Return KL(stock || row) and the change of the loss of the target, nats, float64, (N,).

    Effects may be a millionth of a nat: logits differ in float32, everything after is float64.
    """
    log_p_V = head(stock_H[None])[0].double().log_softmax(-1)
    p_V, rows = log_p_V.exp(), max(1, LOGIT_NUMBERS // log_p_V.numel())
    entropy = p_V @ log_p_V
    kl, change = [], []
    for part_NH in rows_NH.split(rows):
        log_q_NV = head(part_NH).double().log_softmax(-1)
        kl.append(entropy - log_q_NV @ p_V)
        change.append(log_p_V[target] - log_q_NV[:, target])
    # Divergences are not negative, but rounding errors may be.
    return torch.cat(kl).clamp_(min=0).cpu(), torch.cat(change).cpu()


class BranchLayout:
    """Attention of documents as in a packed batch, and of branches after them.

    Branches come in blocks of equal shape, one for each layer in which some have entered: by probed
    token, branch and position.
    """

    def __init__(
        self,
        documents: Layout,
        tokens: int,
        prefixes: Sequence[tuple[int, int]],
        branches: int,
        steps: int,
    ) -> None:
        """Keep the shape.

        Args:
            documents: the layout of the first ``tokens`` tokens.
            tokens: tokens of all documents.
            prefixes: for each probed token, the (start, end) of the tokens before it.
            branches: branches of a probed token in a block.
            steps: positions of a branch.
        """
        self.longest = documents.longest
        self.documents, self.tokens, self.prefixes = documents, tokens, prefixes
        self.block = (len(prefixes), branches, steps)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Return attention outputs (1, T, heads, d) for inputs (1, heads, T, d)."""
        given, tokens = (query, key, value), self.tokens
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        query_1, key_1, value_1 = (rows[:, :, :tokens] for rows in given)
        out[:, :tokens] = self.documents.attend(query_1, key_1, value_1, scaling)
        if query.shape[2] == tokens:
            return out
        blocks = [rows[0, :, tokens:].unflatten(1, (-1, *self.block)) for rows in given]
        rows = out[0, self.tokens :].unflatten(0, (-1, *self.block))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        for index, (start, end) in enumerate(self.prefixes):
            past_key, past_value = key[0, :, start:end], value[0, :, start:end]
            own_query, own_key, own_value = (block[:, :, index].flatten(1, 2) for block in blocks)
            part = _branch_attention(own_query, own_key, own_value, past_key, past_value, scale)
            rows[:, index] = part.unflatten(1, rows.shape[:1] + rows.shape[2:3]).permute(
                1, 2, 3, 0, 4
            )
        return out


def _branch_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, scale: float
) -> Tensor:
    """Attend to a common past, and causally to the branch itself.

    Args:
        query: (heads, B, S, D).
        key: (heads, B, S, D).
        value: (heads, B, S, D).
        past_key: (heads, past, D).
        past_value: (heads, past, D).
        scale: factor of the scores.

    Returns:
        Outputs, (heads, B, S, D).
    """
    query, steps = query * scale, query.shape[2]
    flat = query.flatten(1, 2)
    past = flat @ past_key.transpose(1, 2)
    own = query @ key.transpose(2, 3)
    if steps > 1:
        later = torch.ones(steps, steps, dtype=torch.bool, device=query.device).triu(1)
        own = own.masked_fill(later, -torch.inf)
    score = torch.cat([past, own.flatten(1, 2)], -1).softmax(-1)
    past, own = score.split([past.shape[-1], steps], -1)
    return (past @ past_value).view_as(query) + own.reshape(*query.shape[:3], steps) @ value
