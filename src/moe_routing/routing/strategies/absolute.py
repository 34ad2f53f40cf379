"""One threshold for all tokens and layers, or one for each layer.

Shape letters: L layers, T tokens, K slots per token, E experts, n values.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moe_routing.errors import InputError
from moe_routing.routing.strategies.ranked import Budgeted, Ranked
from moe_routing.vocabulary import Candidates, Family, Look, Weighting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_routing.routing.budget import Value
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.ranking import Ranker, Ranking
    from moe_routing.routing.types import RouterInputs


class Thresholded(Ranked):
    """Keep every candidate whose score is at least a threshold, at most ``max_k``.

    The threshold is the same for all tokens. It is on the natural scale of the score: a weight, a
    weight times a norm, or nats. A token may get no expert in a layer. Without the part ``all``,
    candidates are the experts of the model's own choice.
    """

    codes: ClassVar[dict[str, str]] = {"max_k": "k"}
    words: ClassVar[tuple[str, ...]] = ("weighting",)
    floor: ClassVar[int] = 0
    """Fewest experts per token and layer."""

    max_k: int = Field(ge=1, description="Most experts per token.")
    weighting: Weighting = Field(default="model", description="How selected experts are weighted.")
    candidates: Candidates = Field(default="own", description="Experts that may be selected.")

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return self.max_k

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return self.floor

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting

    @abstractmethod
    def threshold_of(self, calibration: Calibration | None) -> Value:
        """Return the threshold of all layers, or that of each.

        Raises:
            InputError: the calibration does not determine it.
        """

    def ranker(self, calibration: Calibration | None, num_experts: int) -> Ranker:
        """Return a ranker with a count from the threshold."""
        from moe_routing.routing.ranking import Ranking

        threshold = self.threshold_of(calibration)

        def rank(inputs: RouterInputs, _: Tensor) -> Ranking:
            score_TE, order_TE = self.ordered_scores(inputs)
            own = threshold[inputs.layer] if isinstance(threshold, tuple) else threshold
            count_T = (score_TE >= math.log(own)).sum(1)
            return Ranking.bounded(order_TE, score_TE, count_T, self.floor, self.max_k)

        return rank

    def ordered_scores(self, inputs: RouterInputs) -> tuple[Tensor, Tensor]:
        """Return the log scores in descending order, -inf for masked experts, and the experts."""
        from moe_routing.routing.ranking import by_score

        score_TE, order_TE = by_score(inputs)
        if self.score != "probability":
            return score_TE, order_TE
        # Ranked by logit, which has the order of the weight.
        weight_TE = inputs.own_weight_TE.detach().gather(1, order_TE)
        return weight_TE.log().masked_fill(score_TE == -math.inf, -math.inf), order_TE

    def sample_scores(self, calibration: Calibration) -> Tensor:
        """Return the largest ``max_k`` log scores of each calibration token, (layers, tokens, K).

        In descending order; -inf where a token has fewer candidates.
        """
        import torch

        from moe_routing.routing.scores import scored_sample

        layers = scored_sample(self, calibration)
        return torch.stack([self.ordered_scores(inputs)[0][:, : self.max_k] for inputs in layers])


class FittedThreshold(Thresholded, Budgeted):
    """A threshold that a budget may stand for."""

    def on_sample(
        self, calibration: Calibration, num_experts: int
    ) -> Callable[[Sequence[float]], Value]:
        """Return the function from mean experts to a threshold: a quantile of the scores.

        Raises:
            InputError: (the function) the calibration tokens have too few candidates.
        """
        del num_experts
        score_LTK = self.sample_scores(calibration)
        parts = list(score_LTK[:, None]) if self.by_layer else [score_LTK]

        def value_for(mean: Sequence[float]) -> Value:
            try:
                found = [budget_threshold(*pair) for pair in zip(parts, mean, strict=True)]
            except InputError as error:
                raise InputError(f"strategy '{self.id}': {error}") from error
            return tuple(found) if self.by_layer else found[0]

        return value_for


class Absolute(FittedThreshold):
    """One threshold for all layers."""

    family: ClassVar[Family] = Family(
        "absolute",
        label="Absolute threshold",
        look=Look("#D3D8FF", (5, 1, 0)),
        definition="One threshold, at most {k}, weights {weighting}",
        selection="every expert whose score is at least one threshold for all tokens and layers",
        words="one absolute threshold",
    )
    codes: ClassVar[dict[str, str]] = {"max_k": "k", "threshold": "t", "budget": "b"}
    free: ClassVar[str] = "threshold"

    threshold: float | None = Field(default=None, gt=0, lt=10, description="Least score.")

    def threshold_of(self, calibration: Calibration | None) -> float:
        """Return the threshold; see :attr:`value`."""
        del calibration
        return self.value


class Layered(FittedThreshold):
    """One threshold for each layer, which keeps the budget in that layer."""

    family: ClassVar[Family] = Family(
        "layered",
        label="Threshold by layer",
        look=Look("#8FB339", (9, 1, 0)),
        definition="One threshold per layer, at most {k}, weights {weighting}",
        selection="every expert whose score is at least the threshold of the layer",
        words="one threshold per layer",
    )
    codes: ClassVar[dict[str, str]] = {"max_k": "k", "budget": "b"}
    free: ClassVar[str] = "thresholds"
    by_layer: ClassVar[bool] = True

    thresholds: tuple[float, ...] | None = Field(
        default=None, description="Least score in each layer."
    )

    def threshold_of(self, calibration: Calibration | None) -> tuple[float, ...]:
        """Return the threshold of each layer; see :attr:`value`."""
        del calibration
        return self.value


def budget_threshold(score_LTK: torch.Tensor, budget: float) -> float:
    """Return the threshold that keeps a mean number of experts.

    Args:
        score_LTK: log scores of the experts that may be kept, (layers, tokens, slots), -inf for
            none.
        budget: experts per token and layer.

    Returns:
        The threshold on the natural scale, itself a score. Scores at least as large are as many as
        the budget asks for, up to equal ones.

    Raises:
        InputError: there are fewer experts.
    """
    import numpy as np

    layers, tokens, _ = score_LTK.shape
    kept = max(1, round(budget * layers * tokens))
    score_n = score_LTK[score_LTK > -math.inf].double().numpy()
    if kept > score_n.size:
        mean = score_n.size / (layers * tokens)
        raise InputError(
            f"budget is {budget:g} experts per token and layer; allowed: at most the {mean:g} "
            "candidates of a calibration token"
        )
    return math.exp(np.partition(score_n, score_n.size - kept)[score_n.size - kept])
