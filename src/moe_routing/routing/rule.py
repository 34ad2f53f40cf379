"""A model's own routing rule, as far as strategies depend on it; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing.errors import InputError
from moe_routing.vocabulary import OwnWeighting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelRule:
    """The routing that a model was trained with: the ``top_k`` most probable experts.

    Attributes:
        top_k: experts per token.
        weighting: how the model weights them: by their softmax probabilities, raw or renormalised
            to sum 1 (``norm_topk_prob``).
    """

    top_k: int
    weighting: OwnWeighting

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
        return cls(described["top_k"], described["weighting"])

    def scale(self, probability_TE: Tensor) -> Tensor | None:
        """Return the factor from softmax probabilities to the model's own weights.

        The weight that the model gives, or would give, an expert is its probability times this
        factor. Thresholds and test statistics on this scale mean the same on every model.

        Args:
            probability_TE: float32 softmax over all experts, (tokens, experts).

        Returns:
            (tokens, 1), the inverse of the total probability of the token's own top k; None where
            the model uses raw probabilities.
        """
        if self.weighting == "softmax":
            return None
        return own_mass(probability_TE, self.top_k).reciprocal()


def own_mass(probability_TE: Tensor, top_k: int) -> Tensor:
    """Return the total probability of each token's ``top_k`` most probable experts, (tokens, 1)."""
    return probability_TE.topk(min(top_k, probability_TE.shape[1]), dim=1).values.sum(
        1, keepdim=True
    )
