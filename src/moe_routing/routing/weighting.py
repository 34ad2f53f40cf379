"""The weights of the selected experts, and the router that combines selection and weighting.

A model is trained with one kind of weights. Any other also changes the scale of the layer's output,
so weighting is a factor of the study in its own right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing.ordering import top_experts
from moe_routing.routing.rule import ModelRule, own_mass
from moe_routing.routing.types import RouterInputs, Routing, Selection, Selector
from moe_routing.vocabulary import Weighting

if TYPE_CHECKING:
    from moe_routing.routing.scores import ExpertScorer


def weigh(
    kind: Weighting,
    probability_TE: Tensor,
    selection: Selection,
    rule: ModelRule,
    own_TK: Tensor | None = None,
) -> Tensor:
    """Return float32 weights (tokens, slots), 0 at padded slots.

    Args:
        kind: ``model`` (as the model weights the experts that it selects), ``softmax`` (the
            probability), ``renormalised`` (to sum 1), ``uniform`` (1/count), ``mass_matched``
            (rescaled to the total weight that the model gives its own top k), or
            ``sqrt_mass_matched`` (multiplied by the square root of that factor).
        probability_TE: float32 softmax over all experts, (tokens, experts).
        selection: the selected experts.
        rule: the model's own rule.
        own_TK: the experts of the model's own choice, where they are not the most probable.
    """
    if kind == "model":
        kind = rule.weighting
    experts = probability_TE.shape[1]
    if kind == "uniform":
        padded_TK = selection.index_TK >= experts
        weight_T1 = 1.0 / selection.count_T[:, None].clamp(min=1).float()
        return weight_T1.expand(padded_TK.shape).masked_fill(padded_TK, 0.0)
    softmax_TK = selected_probability(probability_TE, selection.index_TK)
    if kind == "softmax":
        return softmax_TK
    total_T1 = softmax_TK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    normalised_TK = softmax_TK / total_T1
    renormalises = rule.weighting == "renormalised"
    if kind == "renormalised" or (kind == "mass_matched" and renormalises):
        return normalised_TK  # a model that renormalises gives its top k a total weight of 1
    mass_T1 = own_mass(probability_TE, rule.top_k, own_TK)
    if kind == "mass_matched":
        return normalised_TK * mass_T1
    weight_TK = softmax_TK / mass_T1 if renormalises else softmax_TK
    return weight_TK * (mass_T1 / total_T1).sqrt()


def selected_probability(probability_TE: Tensor, index_TK: Tensor) -> Tensor:
    """Return the probability of each selected expert, (tokens, slots), 0 at padded slots."""
    # Padded slots index the column of zeros appended after the last expert.
    return F.pad(probability_TE, (0, 1)).gather(1, index_TK)


@dataclass(frozen=True)
class Router:
    """The router of a strategy: scores experts, selects some, then weights them.

    Attributes:
        select: the strategy's selection.
        weighting: how selected experts are weighted.
        rule: the model's own rule.
        scorer: what ranks the experts; None: the logits, of all experts.
        compensated: whether experts of the model's own choice that are not selected are replaced
            by their mean outputs; then selected ones have the model's own weights.
        scale: factor of all weights.
    """

    select: Selector
    weighting: Weighting
    rule: ModelRule
    scorer: ExpertScorer | None = None
    compensated: bool = False
    scale: float | None = None

    def __call__(self, inputs: RouterInputs) -> Routing:
        """Route the tokens of one layer.

        Raises:
            InputError: a token's logits contain NaN or plus infinity, or are all minus infinity
                (which marks masked experts). Checked on the CPU only, where the check is cheap. On
                an accelerator it would synchronise with the device; there the model's output
                becomes NaN instead.
        """
        probability_TE = inputs.logits_TE.float().softmax(-1)
        # One such logit makes the whole row of the softmax NaN, so checking one column is enough.
        if probability_TE.device.type == "cpu" and bool(probability_TE[:, 0].isnan().any()):
            raise InputError(
                f"router logits of layer {inputs.layer} are not finite; allowed: numbers, and "
                "-inf for masked experts (check the weights and the dtype)"
            )
        inputs = replace(inputs, probability_TE=probability_TE, rule=self.rule)
        if self.scorer is not None:
            inputs = self.scorer(inputs)
        selection = self.select(inputs, probability_TE)
        weight_TK, dropped_weight_TE = self._weights(inputs, selection)
        scale = self.rule.factor * (1.0 if self.scale is None else self.scale)
        if scale != 1.0:
            weight_TK = weight_TK * scale
            if dropped_weight_TE is not None:
                dropped_weight_TE = dropped_weight_TE * scale
        return Routing(selection, weight_TK, probability_TE, inputs.ranked_by_TE, dropped_weight_TE)

    def _weights(self, inputs: RouterInputs, selection: Selection) -> tuple[Tensor, Tensor | None]:
        if not self.compensated:
            probability_TE, own_TK = inputs.softmax_TE, inputs.own_TK
            return weigh(self.weighting, probability_TE, selection, self.rule, own_TK), None
        own_weight_TE = inputs.own_weight_TE
        own_TK = inputs.own_TK
        if own_TK is None:
            own_TK = top_experts(inputs.softmax_TE, self.rule.top_k)
        dropped_weight_TE = dropped_weights(own_weight_TE, own_TK, selection)
        return selected_probability(own_weight_TE, selection.index_TK), dropped_weight_TE


def dropped_weights(own_weight_TE: Tensor, own_TK: Tensor, selection: Selection) -> Tensor:
    """Return the own weights of experts of the model's own choice that are not selected.

    Args:
        own_weight_TE: the weight that the model gives, or would give, every expert.
        own_TK: the experts of the model's own choice, (tokens, top k).
        selection: the selected experts.

    Returns:
        float32, (tokens, experts), 0 for all others.
    """
    # Padded slots index the last column, which is cut off.
    dropped_TE = F.pad(torch.zeros_like(own_weight_TE), (0, 1))
    dropped_TE.scatter_(1, own_TK, own_weight_TE.gather(1, own_TK))
    return dropped_TE.scatter_(1, selection.index_TK, 0.0)[:, :-1]
