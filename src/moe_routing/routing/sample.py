"""Router logits of calibration tokens, the data that nulls and thresholds are fitted to.

Shape letters: L layers, T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from moe_routing.routing.rule import ModelRule
from moe_routing.routing.tensors import TensorFile
from moe_routing.routing.types import RouterInputs


@dataclass(frozen=True)
class CalibrationSample(TensorFile):
    """Router logits of one model on calibration text.

    Attributes:
        logits_LTE: float32 router logits on the text, (layers, tokens, experts).
        permuted_LTE: the same on the text with the tokens of each window shuffled, so that every
            token is in a mismatched context.
        input_norm_LT: Euclidean norm of the router's input, (layers, tokens).
        permuted_norm_LT: the same on the shuffled text.
        centred_norm_LE: Euclidean norm of each expert's router vector minus their mean,
            (layers, experts).
        hidden_size: width of the router's input.
        rule: the model's own routing rule.
        fingerprint: hash of the router weights, see
            :func:`moe_routing.engine.adapters.router_fingerprint`.
        choice_LTE: what ranks the experts on the text, float32, if that is not the logit.
    """

    logits_LTE: Tensor
    permuted_LTE: Tensor
    input_norm_LT: Tensor
    permuted_norm_LT: Tensor
    centred_norm_LE: Tensor
    hidden_size: int
    rule: ModelRule
    fingerprint: str
    choice_LTE: Tensor | None = None

    WHAT: ClassVar[str] = "a calibration sample"
    TENSORS: ClassVar[tuple[str, ...]] = (
        "logits_LTE", "permuted_LTE", "input_norm_LT", "permuted_norm_LT", "centred_norm_LE",
    )  # fmt: skip
    OPTIONAL: ClassVar[tuple[str, ...]] = ("choice_LTE",)

    @property
    def top_k(self) -> int:
        """Experts per token that the model was trained with."""
        return self.rule.top_k

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.logits_LTE.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens."""
        return self.logits_LTE.shape[1]

    @property
    def num_experts(self) -> int:
        """Number of experts per layer."""
        return self.logits_LTE.shape[2]


def sample_inputs(sample: CalibrationSample, layer: int, *, permuted: bool = False) -> RouterInputs:
    """Return calibration logits as router inputs, for diagnostics and simulations.

    A sample has only the norms of hidden states and router vectors. Those of hidden states are
    returned as vectors of one element; nulls use nothing but the norm.
    """
    logits_LTE = sample.permuted_LTE if permuted else sample.logits_LTE
    norm_LT = sample.permuted_norm_LT if permuted else sample.input_norm_LT
    biased = sample.choice_LTE is not None and not permuted
    choice_TE = cast("Tensor", sample.choice_LTE)[layer] if biased else None
    return RouterInputs(
        layer,
        logits_LTE[layer],
        hidden_TH=norm_LT[layer, :, None],
        centred_norm_E=sample.centred_norm_LE[layer],
        rule=sample.rule,
        score_TE=choice_TE,
        own_TK=None if choice_TE is None else choice_TE.topk(sample.top_k).indices,
    )
