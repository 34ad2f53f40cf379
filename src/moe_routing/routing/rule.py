"""A model's own routing rule, as far as strategies depend on it; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from moe_routing.errors import InputError
from moe_routing.vocabulary import OwnWeighting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelRule:
    """The routing that a model was trained with: ``top_k`` experts, as a rule the most probable.

    Attributes:
        top_k: experts per token.
        weighting: how the model weights them: by their softmax probabilities, raw or renormalised
            to sum 1 (``norm_topk_prob``). Sigmoid scores are probabilities of their logarithms.
        factor: a constant that multiplies all weights (``routed_scaling_factor``).
        biased: whether something that does not enter the weights has a part in the selection: a
            bias that balances the load, or groups of experts.
    """

    top_k: int
    weighting: OwnWeighting
    factor: float = 1.0
    biased: bool = False

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> ModelRule:
        """Read the rule from a description of a model, as in ``model.json``.

        Raises:
            InputError: a key is missing; earlier versions wrote no weighting.
        """
        missing = [key for key in ("top_k", "weighting") if key not in described]
        if missing:
            raise InputError(
                f"model.json: key '{missing[0]}' is missing; remove the file and run again"
            )
        return cls(**{f.name: described[f.name] for f in fields(cls) if f.name in described})

    def scale(self, probability_TE: Tensor, own_TK: Tensor | None = None) -> Tensor | None:
        """Return the factor from softmax probabilities to the model's own weights.

        The weight that the model gives, or would give, an expert is its probability times this
        factor. Thresholds and test statistics on this scale mean the same on every model, so the
        constant ``factor`` of the rule is left out; it multiplies the weights at the very end.

        Args:
            probability_TE: float32 softmax over all experts, (tokens, experts).
            own_TK: the experts of the model's own choice, where they are not the most probable.

        Returns:
            (tokens, 1), the inverse of the total probability of the token's own top k; None where
            the model uses raw probabilities.
        """
        if self.weighting == "softmax":
            return None
        return own_mass(probability_TE, self.top_k, own_TK).reciprocal()


def own_mass(probability_TE: Tensor, top_k: int, own_TK: Tensor | None = None) -> Tensor:
    """Return the total probability of the experts of each token's own choice, (tokens, 1).

    Those are the ``top_k`` most probable ones, unless they are given.
    """
    if own_TK is not None:
        return probability_TE.gather(1, own_TK).sum(1, keepdim=True)
    return probability_TE.topk(min(top_k, probability_TE.shape[1]), dim=1).values.sum(
        1, keepdim=True
    )
