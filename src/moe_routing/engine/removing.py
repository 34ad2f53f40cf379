"""Remove several experts of one token together, many sets at once, and compare the predictions.

Each set is a branch (:mod:`moe_routing.engine.branches`) from the token on. The experts of the
token are removed in one layer alone, or in all layers at once. A branch of all layers enters at the
first one. Its hidden states differ from those of the document from there on, so its own routers
might choose other experts. They are not asked: in every layer the branch has the experts that the
document's own token has there, without the removed ones. So how many are kept is exactly what is
asked for. Their weights are those that the router gives, or would give, them in the branch's own
hidden states; nothing is renormalised.

Shape letters: T tokens of the batch, P probed tokens, B branches of a probed token in all layers, L
layers, R rows of a block, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_routing.engine.adapters import RouterModule, find_routers
from moe_routing.engine.branches import (
    BranchBatch,
    Probe,
    branching,
    most_copies,
    tokens_of,
    would_weights,
)


@dataclass(frozen=True)
class Removed:
    """What removals did: nats, float64.

    Attributes:
        alone_kl_LP: KL(stock || removed) of the next-token distribution at the token, where experts
            of one layer are removed.
        alone_change_LP: loss of the realised next token, removed minus stock.
        kl_PB: the KL where experts of all layers are removed.
        change_PB: the change of the loss in that case.
        loss_P: loss of the realised next token under stock.
    """

    alone_kl_LP: Tensor
    alone_change_LP: Tensor
    kl_PB: Tensor
    change_PB: Tensor
    loss_P: Tensor

    @classmethod
    def concatenated(cls, parts: Sequence[Removed]) -> Removed:
        """Join what removals of several batches did."""
        names = [field.name for field in fields(cls)]
        return cls(*(
            torch.cat([getattr(part, name) for part in parts], 1 if "_L" in name else 0)
            for name in names
        ))  # fmt: skip


@contextmanager
def removing(model: PreTrainedModel, longest: int, what: str) -> Iterator[Remover]:
    """Prepare the stock model; inside the context, call what is yielded for each batch.

    Args:
        model: the stock model.
        longest: most tokens of a document that are read.
        what: what removes, for messages.

    Raises:
        InputError: see :func:`~moe_routing.engine.branches.branching`.
    """
    with branching(model, longest, what) as packed:
        yield Remover(model, what, packed)


@dataclass(frozen=True)
class Remover:
    """Removes experts of a model that :func:`removing` has prepared."""

    model: PreTrainedModel
    what: str
    packed: bool

    @torch.inference_mode()
    def __call__(self, probes: Sequence[Probe], alone_LPE: Tensor, removed_LPBE: Tensor) -> Removed:
        """Remove experts of the probed tokens, in one forward pass if the batch is packed.

        Args:
            probes: documents and tokens.
            alone_LPE: experts to remove in each layer alone, bool, (layers, probed tokens in order,
                experts). Those that are not of the token's own choice stay as they are.
            removed_LPBE: experts to remove in all layers at once, bool, (layers, probed tokens,
                branches, experts).

        Raises:
            InputError: a loss is not finite, or the model is routed.
        """
        if self.packed:
            return self._of_batch(probes, alone_LPE, removed_LPBE)
        parts = [
            self._of_token(probe, alone_LPE[:, [index]], removed_LPBE[:, [index]])
            for index, probe in enumerate(tokens_of(probes))
        ]
        return Removed.concatenated(parts)

    def _of_token(self, probe: Probe, alone_LPE: Tensor, removed_LPBE: Tensor) -> Removed:
        """Remove experts of one token, as many sets at once as a batch holds copies for."""
        most = most_copies(probe)
        layers, none_LPBE = range(len(alone_LPE)), removed_LPBE[:, :, :0]
        alone = [
            self._of_batch([probe], alone_LPE, none_LPBE, alone=layers[start : start + most])
            for start in range(0, len(layers), most)
        ]
        together = [
            self._of_batch([probe], alone_LPE, removed_LPBE[:, :, start : start + most], alone=())
            for start in range(0, removed_LPBE.shape[2], most)
        ]
        return replace(
            alone[0],
            alone_kl_LP=torch.cat([part.alone_kl_LP for part in alone]),
            alone_change_LP=torch.cat([part.alone_change_LP for part in alone]),
            kl_PB=torch.cat([part.kl_PB for part in (alone[0], *together)], 1),
            change_PB=torch.cat([part.change_PB for part in (alone[0], *together)], 1),
        )

    def _of_batch(
        self,
        probes: Sequence[Probe],
        alone_LPE: Tensor,
        removed_LPBE: Tensor,
        alone: Sequence[int] | None = None,
    ) -> Removed:
        """Remove experts in one forward pass, in some layers alone; None: in each."""
        layers = [router.layer for router in find_routers(self.model)]
        alone = layers if alone is None else alone
        batch = _Removals(probes, layers, alone, alone_LPE, removed_LPBE)
        found = batch.run(self.model, self.what, packed=self.packed)
        # Blocks of one branch: those of all layers, then those of layers alone.
        kl_BP, alone_kl_LP = found.kl_LPA[..., 0].tensor_split([batch.together])
        change_BP, alone_change_LP = found.change_LPA[..., 0].tensor_split([batch.together])
        return Removed(alone_kl_LP, alone_change_LP, kl_BP.T, change_BP.T, found.loss_P)


class _Removals(BranchBatch):
    """Documents, blocks that lack experts in all layers, and a block for each of some layers."""

    sole = "toggled"

    def __init__(
        self,
        probes: Sequence[Probe],
        layers: Sequence[int],
        alone: Sequence[int],
        alone_LPE: Tensor,
        removed_LPBE: Tensor,
    ) -> None:
        super().__init__(probes, branches=1)
        self.together, self.alone = removed_LPBE.shape[2], frozenset(alone)
        self.entering = {
            layer: (layer in self.alone) + self.together * (layer == layers[0]) for layer in layers
        }
        self.changed = frozenset(layers) if self.together else self.alone
        # By layer and row, those of the layer alone last.
        self.removed_LRE = torch.cat([removed_LPBE.transpose(1, 2), alone_LPE[:, None]], 1).flatten(
            1, 2
        )

    def route(
        self,
        router: RouterModule,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
    ) -> None:
        """Give branches of all layers, and that of this layer, the experts that are not removed.

        The branches of earlier layers are routed as usual.
        """
        rows_R = self._rows(router.layer, index_TK.shape[0]).to(index_TK.device)
        removed_RE = self.removed_LRE[router.layer, : len(rows_R)].to(index_TK.device)
        source_R = self.source_R.to(index_TK.device).repeat(len(rows_R) // len(self.source_R))
        weight_RE, _ = would_weights(
            logits_TE[rows_R].softmax(-1), index_TK[rows_R], weight_TK[rows_R]
        )
        index_RK = index_TK[source_R]
        real_RK = index_RK < router.num_experts
        chosen_RK = index_RK.where(real_RK, 0)
        kept_RK = real_RK & ~removed_RE.gather(1, chosen_RK)
        index_TK[rows_R] = index_RK.where(kept_RK, router.num_experts)
        weight_TK[rows_R] = weight_RE.gather(1, chosen_RK) * kept_RK

    def _rows(self, layer: int, rows: int) -> Tensor:
        """Return the rows of the blocks of all layers, and of the block of a layer alone."""
        block = self.source_R.numel()
        first = torch.arange(self.together * block) + self.tokens
        newest = torch.arange(rows - block, rows)
        return torch.cat([first, newest]) if layer in self.alone else first
