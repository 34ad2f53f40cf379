"""Branches: tokens of documents, computed again with other experts.

Branches are rows of the same packed batch as their documents. They enter at the first layer whose
routing they change, as copies of the token's hidden state, and from there on go through the model's
own layers like any other token: their attention reads the document's tokens before them, and
themselves. So nothing below that layer is computed again, and no key or value is copied.

Branches come in blocks of equal shape, by probed token and branch. A subclass of
:class:`BranchBatch` says which blocks enter in which layer, and what they change.

For a model that cannot be packed, each branch is a copy of its document up to the token, in the
model's own forward pass, where only the last token's routing is changed. That is right for every
model, and takes about as many times longer as there are tokens before the probed one.

Shape letters: T tokens of the batch, C copies of a document, P probed tokens, A branches of a
probed token in a block, L blocks, S tokens of a document, R rows of a block, K slots, E experts, H
hidden size, V vocabulary, N rows of logits, B branches of a probed token so far, D head dimension.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_routing.engine.adapters import RouterModule, experts_of_routers, find_routers
from moe_routing.engine.attention import (
    Layout,
    PaddedLayout,
    SlicedLayout,
    check_free,
    packed_attention,
)
from moe_routing.engine.experts import EXPERTS_IMPLEMENTATION
from moe_routing.engine.head import logits_of
from moe_routing.engine.kernels import fused_cpu_kernels
from moe_routing.engine.offload import input_device
from moe_routing.engine.packable import packable_attention
from moe_routing.engine.packing import Span
from moe_routing.engine.passes import reset_rope
from moe_routing.engine.patching import Forward, patched_forward
from moe_routing.engine.routed import chosen_experts
from moe_routing.engine.upcast import upcast, wide_dtype
from moe_routing.errors import InputError

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


def batches(probes: Sequence[Probe], branches: int) -> Iterator[list[Probe]]:
    """Fill batches of at most ``BATCH_ROWS`` rows.

    A document with too many tokens is in several batches. One token makes a batch in any case.

    Args:
        probes: documents and tokens.
        branches: branches of a token, in all layers.
    """
    batch: list[Probe] = []
    rows, most = 0, max(1, BATCH_ROWS // branches)
    for probe in probes:
        for start in range(0, len(probe.positions), most):
            positions = probe.positions[start : start + most]
            own = positions[-1] + 1 + len(positions) * branches
            if batch and rows + own > BATCH_ROWS:
                yield batch
                batch, rows = [], 0
            batch.append(replace(probe, positions=positions))
            rows += own
    yield batch


def tokens_of(probes: Sequence[Probe]) -> list[Probe]:
    """Divide probes into those of single tokens."""
    return [replace(probe, positions=(token,)) for probe in probes for token in probe.positions]


def most_copies(probe: Probe) -> int:
    """Return how many copies of the document of one token fit into a plain pass, at least one."""
    return max(1, BATCH_ROWS // (probe.positions[0] + 1) - 1)


@contextmanager
def branching(model: PreTrainedModel, longest: int, what: str) -> Iterator[bool]:
    """Prepare a model for passes with branches, inside the context.

    Everything is computed in float32 or better (:func:`~moe_routing.engine.upcast.upcast`).

    Args:
        model: the model; it may be routed.
        longest: most tokens of a document that are read.
        what: what branches, for messages.

    Yields:
        Whether branches are rows of a packed batch; otherwise a batch takes one probed token.

    Raises:
        InputError: experts cannot be computed one by one, or the model uses packed attention.
    """
    exact = packable_attention(model)
    packed = exact.longest >= longest
    experts_of_routers(model, what)
    with ExitStack() as stack:
        if packed:
            stack.enter_context(packed_attention(model))
            stack.enter_context(fused_cpu_kernels(model))
        else:
            check_free(model)
            tqdm.write(
                f"{what}: documents of {longest} tokens are not packed but computed by plain "
                f"forward passes, which takes many times longer: {exact.reason}",
                file=sys.stderr,
            )
        stack.enter_context(upcast(model))
        stack.enter_context(chosen_experts(model, EXPERTS_IMPLEMENTATION))
        yield packed


@dataclass(frozen=True)
class Compared:
    """Predictions of branches against those of their documents.

    Attributes:
        kl_LPA: KL(document || branch) of the next-token distribution at the token, nats, float64.
        change_LPA: loss of the realised next token, branch minus document, nats, float64.
        loss_P: loss of the realised next token of the document's own token, nats, float64.
        stock_PH: final hidden states of the document's own tokens, on the model's device.
    """

    kl_LPA: Tensor
    change_LPA: Tensor
    loss_P: Tensor
    stock_PH: Tensor


class BranchBatch(ABC):
    """The documents of one forward pass, and their branches.

    Attributes:
        entering: number of blocks that enter in each layer, by layer.
        changed: layers in which branches change the routing.
        sole: what a router does, if it takes only one such change, as for ``patched_forward``.
    """

    entering: Mapping[int, int]
    changed: frozenset[int]
    sole: str | None = None

    def __init__(self, probes: Sequence[Probe], branches: int) -> None:
        """Lay out the rows.

        Args:
            probes: documents and tokens.
            branches: branches of a probed token in a block.
        """
        self.branches = branches
        # By layer, on the host: what ranks the experts of the probed tokens, (P, E), if that is
        # not the logit.
        self.choices: dict[int, Tensor] = {}
        # By layer, if they are not packed: where the tokens of the document, and the rows of the
        # blocks after them, are among the tokens of the forward pass.
        self.place_LN: dict[int, Tensor] = {}
        # Nothing reads what comes after the last branch.
        ends = [probe.positions[-1] + 1 for probe in probes]
        starts = list(accumulate(ends, initial=0))
        self.tokens = starts.pop()
        self.spans = [Span(s, (), end, ()) for s, end in zip(starts, ends, strict=True)]
        ids = [(p.ids_S[:end], p.ids_S[1 : end + 1]) for p, end in zip(probes, ends, strict=True)]
        self.ids_T, self.next_T = (torch.cat(part) for part in zip(*ids, strict=True))
        self.position_T = torch.cat([torch.arange(end) for end in ends])
        count = [len(p.positions) for p in probes]
        self.document_P = [p.document for p in probes for _ in p.positions]
        self.position_P = torch.tensor([position for p in probes for position in p.positions])
        start_P = torch.tensor(starts).repeat_interleave(torch.tensor(count))
        # The row of each probed token, and of the token that each row of a block is a branch of.
        self.source_P = start_P + self.position_P
        self.source_R = self.source_P.repeat_interleave(branches)
        self.prefixes = list(zip(start_P.tolist(), self.source_P.tolist(), strict=True))

    @abstractmethod
    def route(
        self,
        router: RouterModule,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
    ) -> None:
        """Change the experts and weights of branches in place.

        Args:
            router: of a layer in ``changed``.
            hidden_TH: what it reads of all rows, those of the blocks after the tokens.
            logits_TE: its logits.
            index_TK: experts, the number of experts in empty slots; the last slot is empty.
            weight_TK: their weights.
        """

    def run(
        self, model: PreTrainedModel, what: str, *, packed: bool, stock_PH: Tensor | None = None
    ) -> Compared:
        """Compute documents and branches, and compare their predictions.

        Args:
            model: a model that :func:`branching` has prepared.
            what: what branches, for errors.
            packed: whether documents and branches are rows of a packed batch; otherwise there is
                one probed token.
            stock_PH: what to compare branches with, from another batch; None: from this one.

        Raises:
            InputError: a loss is not finite.
        """
        hidden_TH = self._packed_states(model) if packed else self._plain_states(model)
        if stock_PH is None:
            stock_PH = hidden_TH[self.source_P.to(hidden_TH.device)]
        head = partial(logits_of, model)
        compared = self._compare(head, stock_PH, hidden_TH[self.tokens :])
        kl, change, loss = zip(*compared, strict=True)
        found = Compared(torch.stack(kl, 1), torch.stack(change, 1), torch.stack(loss), stock_PH)
        finite_P = (found.kl_LPA + found.change_LPA).isfinite().all(-1).all(0)
        if not finite_P.all():
            index = int((~finite_P).nonzero()[0])
            raise InputError(
                f"{what}: a loss at position {int(self.position_P[index])} of document "
                f"{self.document_P[index]} is not finite; allowed: numbers (check the weights and "
                "the dtype)"
            )
        return found

    def patches(self, router: RouterModule) -> Iterator[AbstractContextManager]:
        """Yield what replaces forwards in a layer whose routing is changed."""
        yield patched_forward(router.module, partial(self._router, router), self.sole)

    def newest(self, layer: int, rows: int) -> Tensor:
        """Return where the rows of the newest block are in a layer's forward pass, (R,), int64.

        Args:
            layer: the layer.
            rows: tokens of the forward pass.
        """
        place_N = self.place_LN.get(layer, torch.arange(rows))
        return place_N[-self.source_R.numel() :]

    def _plain_states(self, model: PreTrainedModel) -> Tensor:
        """Return the final hidden states of a document and its branches, (T, H).

        Copies of the document, up to the probed token, stand for the branches.
        """
        routers, device, entered = find_routers(model), input_device(model), 0
        for router in routers:
            entered += self.entering.get(router.layer, 0) * self.branches
            last_R = torch.arange(2, entered + 2) * self.tokens - 1
            self.place_LN[router.layer] = torch.cat([torch.arange(self.tokens), last_R])
        reset_rope(model)
        with ExitStack() as stack:
            for router in routers:
                if router.layer in self.changed:
                    for patch in self.patches(router):
                        stack.enter_context(patch)
            ids_CT = self.ids_T.expand(1 + entered, -1).to(device)
            hidden_CTH = model.base_model(ids_CT, use_cache=False).last_hidden_state
        return torch.cat([hidden_CTH[0], hidden_CTH[1:, -1]])

    def _packed_states(self, model: PreTrainedModel) -> Tensor:
        """Return the final hidden states of documents and branches, (T, H)."""
        routers = find_routers(model)
        device, dtype = input_device(model), wide_dtype(model.dtype)
        on_cpu = model.device.type == "cpu"  # that of a model with offloaded weights is meta
        stock = (SlicedLayout if on_cpu else PaddedLayout)(self.spans, dtype, device)
        with ExitStack() as stack:
            for layer in cast("nn.ModuleList", model.base_model.layers):
                inside = {id(module) for module in layer.modules()}
                router = next((r for r in routers if id(r.module) in inside), None)
                blocks = 0 if router is None else self.entering.get(router.layer, 0)
                stack.enter_context(patched_forward(layer, partial(self._layer, blocks)))
            for router in routers:
                if router.layer in self.changed:
                    for patch in self.patches(router):
                        stack.enter_context(patch)
            output = model.base_model(
                input_ids=self.ids_T[None].to(device),
                position_ids=self.position_T[None].to(device),
                use_cache=False,
                layout=BranchLayout(stock, self.tokens, self.prefixes, self.branches),
            )
        return output.last_hidden_state[0]

    def _layer(self, entering: int, inner: Forward) -> Callable[..., object]:
        """Return the forward of a decoder layer in which blocks may enter."""

        def forward(
            hidden_1TH: Tensor,
            *args: object,
            position_embeddings: Tensor | tuple[Tensor, ...],
            **kwargs: object,
        ) -> object:
            source_R = self.source_R.to(hidden_1TH.device)
            if entering:
                block_1RH = hidden_1TH[:, source_R]
                hidden_1TH = torch.cat([hidden_1TH, *[block_1RH] * entering], 1)
            blocks = (hidden_1TH.shape[1] - self.tokens) // source_R.numel()

            def extended(part: Tensor) -> Tensor:
                return torch.cat([part, part[:, source_R].repeat(1, blocks, 1)], 1)

            rope = (
                extended(position_embeddings)  # complex numbers
                if isinstance(position_embeddings, Tensor)
                else tuple(map(extended, position_embeddings))
            )
            return inner(hidden_1TH, *args, position_embeddings=rope, **kwargs)

        return forward

    def _router(self, router: RouterModule, inner: Forward) -> Callable[..., object]:
        """Return the forward of a router that changes the routing of branches."""
        route = cast("Callable[..., tuple[Tensor, Tensor, Tensor]]", inner)

        def forward(hidden: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            raw_TE, weight_TK, index_TK = route(hidden, *args)
            hidden_TH, logits_TE = hidden.flatten(0, -2), router.behaviour.logits(raw_TE)
            place = self.place_LN.get(router.layer, slice(None))
            choice_TE = router.behaviour.choice(router.module, raw_TE, *args)
            if choice_TE is not None:
                self.choices[router.layer] = choice_TE[place][self.source_P].cpu()
            # One more slot, for an expert that is added; empty in all other rows.
            index_TK = F.pad(index_TK, (0, 1), value=router.num_experts)
            weight_TK = F.pad(weight_TK, (0, 1))
            # Parts of a slice are views, those of other places are copies.
            changed = index_TK[place], weight_TK[place]
            self.route(router, hidden_TH[place], logits_TE[place], *changed)
            index_TK[place], weight_TK[place] = changed
            return raw_TE, weight_TK, index_TK

        return forward

    def _compare(
        self, head: Callable[[Tensor], Tensor], stock_PH: Tensor, rows_RH: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield KL and change of the loss, (L, A), and the loss of each probed token."""
        rows_LPAH = rows_RH.unflatten(0, (-1, len(self.prefixes), self.branches))
        target_P = self.next_T[self.source_P].tolist()
        for rows_LAH, stock_H, target in zip(rows_LPAH.unbind(1), stock_PH, target_P, strict=True):
            kl_N, change_N, loss = compare(head, stock_H, rows_LAH.flatten(0, 1), target)
            yield kl_N.view(-1, self.branches), change_N.view(-1, self.branches), loss


def compare(
    head: Callable[[Tensor], Tensor], stock_H: Tensor, rows_NH: Tensor, target: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the predictions of rows with that of the stock model; on the host, nats, float64.

    Effects may be a millionth of a nat: logits differ in float32, everything after is float64.

    Returns:
        KL(stock || row), (N,); the change of the loss of the target, (N,); the stock's loss.
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
    return torch.cat(kl).clamp_(min=0).cpu(), torch.cat(change).cpu(), -log_p_V[target].cpu()


def would_weights(
    probability_TE: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weight that a router gives, or would give, every expert, and whether it is chosen.

    A weight is the probability, scaled as the router scales those of its own choice.

    Args:
        probability_TE: softmax over all experts.
        index_TK: experts of the router's choice, the number of experts in empty slots.
        weight_TK: their weights.
    """
    experts = probability_TE.shape[1]
    own_TE = F.pad(torch.zeros_like(probability_TE), (0, 1)).scatter(1, index_TK, 1)[:, :-1]
    chosen_TK = probability_TE.gather(1, index_TK.where(index_TK < experts, 0))
    chosen_TK = chosen_TK * (index_TK < experts)
    scale_T1 = weight_TK.sum(1, keepdim=True) / chosen_TK.sum(1, keepdim=True)
    weight_TE = F.pad(probability_TE * scale_T1, (0, 1)).scatter(1, index_TK, weight_TK)[:, :-1]
    return weight_TE, own_TE


class BranchLayout:
    """Attention of documents as in a packed batch, and of branches after them.

    Branches come in blocks of equal shape, by probed token and branch.
    """

    def __init__(
        self,
        documents: Layout,
        tokens: int,
        prefixes: Sequence[tuple[int, int]],
        branches: int,
    ) -> None:
        """Keep the shape.

        Args:
            documents: the layout of the first ``tokens`` tokens.
            tokens: tokens of all documents.
            prefixes: for each probed token, the (start, end) of the tokens before it.
            branches: branches of a probed token in a block.
        """
        self.documents, self.tokens, self.prefixes = documents, tokens, prefixes
        self.block = (len(prefixes), branches)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        """Return attention outputs (1, T, heads, d) for inputs (1, heads, T, d)."""
        given, tokens = (query, key, value), self.tokens
        out = value.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        query_1, key_1, value_1 = (rows[:, :, :tokens] for rows in given)
        out[:, :tokens] = self.documents.attend(query_1, key_1, value_1, scaling, window)
        if query.shape[2] == tokens:
            return out
        blocks = [rows[0, :, tokens:].unflatten(1, (-1, *self.block)) for rows in given]
        rows = out[0, self.tokens :].unflatten(0, (-1, *self.block))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        for index, (start, end) in enumerate(self.prefixes):
            if window:
                start = max(start, end - window + 1)
            past_key, past_value = key[0, :, start:end], value[0, :, start:end]
            own_query, own_key, own_value = (block[:, :, index].flatten(1, 2) for block in blocks)
            part = _branch_attention(own_query, own_key, own_value, past_key, past_value, scale)
            rows[:, index] = part.transpose(0, 1).unflatten(0, (-1, self.block[1]))
        return out


def _branch_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, scale: float
) -> Tensor:
    """Let each branch attend to a common past, and to itself.

    Args:
        query: (heads, B, D).
        key: (heads, B, D).
        value: (heads, B, D).
        past_key: (heads, past, D).
        past_value: (heads, past, D).
        scale: factor of the scores.

    Returns:
        Outputs, (heads, B, D).
    """
    query = query * scale
    past = query @ past_key.transpose(1, 2)
    own = (query * key).sum(-1, keepdim=True)
    past, own = torch.cat([past, own], -1).softmax(-1).split([past.shape[-1], 1], -1)
    return past @ past_value + own * value
