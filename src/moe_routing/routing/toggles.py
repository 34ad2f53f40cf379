"""Toggled experts of tokens, and what each changes in the model's predictions.

A toggle switches one expert of one token in one layer: an expert of the model's own choice gets the
weight 0 (nothing is renormalised), any other is added with the weight that the model would give it.
A removal is also made as a routing with compensation makes it: the expert's mean output takes the
place of its output, with the same weight.

Shape letters: L layers, T tokens, P pairs of a token and an expert in a layer, E experts, H hidden
size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.tensors import TensorFile
from moe_routing.routing.types import RouterInputs


@dataclass(frozen=True)
class Toggles(TensorFile):
    """Toggled pairs of one model on a text, ordered by layer.

    Attributes:
        document_P: index of the document, int64.
        position_P: position of the token in its document, int64.
        layer_P: layer, int64.
        expert_P: expert, int64.
        rank_P: rank of the expert among the token's experts by probability, from 0, int64; of equal
            ones, those of the model's own choice come first, then the lower index.
        logits_LTE: router logits of all experts of the tokens, which are in order of document and
            position, float32, (layers, tokens, experts).
        hidden_LTH: router inputs of the tokens, in the same order, float32.
        norm_LTE: Euclidean norm of every expert's output for the tokens, not weighted, float32.
        deviation_LTE: Euclidean norm of that output minus the expert's mean output, float32.
        kl_P: KL(stock || toggled) of the next-token distribution at the token, nats, float64.
        loss_change_P: loss of the realised next token, toggled minus stock, nats, float64.
        compensated_kl_P: the KL if the mean output takes the place of a removed expert's output,
            float64; NaN if that was not measured. That of an addition is ``kl_P``.
        compensated_loss_change_P: the change of the loss in that case, float64.
        sampling_weight_P: inverse of the chance that the pair was drawn, float64.
        rank_weight_E: the sampling weight of a pair by its rank, float64, (experts,).
        noise_L: 99th percentile of the KL of toggles that change nothing (weight zero, computed in
            another row and batch shape), nats, float64, (layers,): what rounding alone does.
        rule: the model's own routing rule; pairs of a rank below its top k are removals, the others
            are additions.
        fingerprint: hash of all weights of the model.
        choice_LTE: what ranks the experts of the tokens, float32, if that is not the logit.
    """

    document_P: Tensor
    position_P: Tensor
    layer_P: Tensor
    expert_P: Tensor
    rank_P: Tensor
    logits_LTE: Tensor
    hidden_LTH: Tensor
    norm_LTE: Tensor
    deviation_LTE: Tensor
    kl_P: Tensor
    loss_change_P: Tensor
    compensated_kl_P: Tensor
    compensated_loss_change_P: Tensor
    sampling_weight_P: Tensor
    rank_weight_E: Tensor
    noise_L: Tensor
    rule: ModelRule
    fingerprint: str
    choice_LTE: Tensor | None = None

    WHAT: ClassVar[str] = "a file of toggles"
    TENSORS: ClassVar[tuple[str, ...]] = (
        "document_P", "position_P", "layer_P", "expert_P", "rank_P",
        "logits_LTE", "hidden_LTH", "norm_LTE", "deviation_LTE",
        "kl_P", "loss_change_P", "compensated_kl_P", "compensated_loss_change_P",
        "sampling_weight_P", "rank_weight_E", "noise_L",
    )  # fmt: skip
    PARTIAL: ClassVar[tuple[str, ...]] = ("compensated_kl_P", "compensated_loss_change_P")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("choice_LTE",)

    @functools.cached_property
    def token_P(self) -> Tensor:
        """Index of the pair's token, in the order of ``logits_LTE``, int64."""
        # One number per token: torch finds the unique rows of a matrix in a hundred times the time.
        place_P = self.document_P * (self.position_P.max() + 1) + self.position_P
        return place_P.unique(return_inverse=True)[1]

    @functools.cached_property
    def weight_LTE(self) -> Tensor:
        """The weight that the model gives, or would give, every expert of the tokens, float32.

        Where the model uses raw softmax weights it is the router's probability.
        """
        layers = range(self.num_layers)
        return torch.stack([self.inputs(layer).own_weight_TE for layer in layers])

    @property
    def weight_P(self) -> Tensor:
        """The weight that the model gives, or would give, the pair's expert, float32."""
        return self.weight_LTE[self.layer_P, self.token_P, self.expert_P]

    @property
    def norm_P(self) -> Tensor:
        """Euclidean norm of the pair's expert output, not weighted, float32."""
        return self.norm_LTE[self.layer_P, self.token_P, self.expert_P]

    @functools.cached_property
    def consequence_constants(self) -> tuple[Tensor, Tensor]:
        """Return c of each layer in KL = c (weight x norm)^2, float64, (layers,), twice.

        The first is of experts that are left out, with the norm of their output. The second is of
        experts replaced by their mean output, with the norm of the output minus the mean output.

        c is the geometric mean of KL / (weight x norm)^2 over the removals with a KL above 0,
        because the law holds on the log scale: errors are multiplied. Norms are those of the
        outputs, not predicted ones.

        NaN where compensated removals were not measured.

        Raises:
            InputError: a layer has no such removal.
        """
        pair_P = (self.layer_P, self.token_P, self.expert_P)
        return (
            self._constants(self.kl_P, self.norm_P),
            self._constants(self.compensated_kl_P, self.deviation_LTE[pair_P]),
        )

    def _constants(self, kl_P: Tensor, norm_P: Tensor) -> Tensor:
        if kl_P.isnan().any():
            return torch.full_like(self.noise_L, torch.nan)
        size_P = self.weight_P.double() * norm_P.double()
        used_P = (self.rank_P < self.rule.top_k) & (kl_P > 0) & (size_P > 0)
        layer_P = self.layer_P[used_P]
        count_L = torch.bincount(layer_P, minlength=self.num_layers)
        if not bool(count_L.all()):
            raise InputError(
                f"toggles: no removal in layer {int(count_L.argmin())} changes the prediction; "
                "allowed: at least one, to fit the constant of the score 'consequence'"
            )
        log_ratio_P = kl_P[used_P].double().log() - 2 * size_P[used_P].log()
        total_L = torch.bincount(layer_P, log_ratio_P, minlength=self.num_layers)
        return (total_L / count_L).exp()

    def of_documents(self, documents: Sequence[int]) -> Toggles:
        """Return the toggled pairs of some documents, by index."""
        kept_P = torch.isin(self.document_P, torch.tensor(documents))
        by_pair = [name for name in self.TENSORS if name.endswith("_P")]
        by_token = [name for name in self.TENSORS if "_LT" in name]
        by_token += [name for name in self.OPTIONAL if getattr(self, name) is not None]
        tokens = self.token_P[kept_P].unique()
        return replace(
            self,
            **{name: getattr(self, name)[kept_P] for name in by_pair},
            **{name: getattr(self, name)[:, tokens] for name in by_token},
        )

    def inputs(self, layer: int, centred_norm_LE: Tensor | None = None) -> RouterInputs:
        """Return what the router of a layer read of the tokens, and its logits.

        Args:
            layer: the layer.
            centred_norm_LE: norms of the centred router vectors, as in the calibration sample of
                the model, for nulls that use them.
        """
        choice_TE = None if self.choice_LTE is None else self.choice_LTE[layer]
        return RouterInputs(
            layer,
            self.logits_LTE[layer],
            hidden_TH=self.hidden_LTH[layer],
            centred_norm_E=None if centred_norm_LE is None else centred_norm_LE[layer],
            rule=self.rule,
            score_TE=choice_TE,
            own_TK=None if choice_TE is None else choice_TE.topk(self.rule.top_k).indices,
        )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.noise_L.shape[0]

    @property
    def num_experts(self) -> int:
        """Number of experts per layer."""
        return self.rank_weight_E.shape[0]
