"""Other published rules for the number of experts per token, applied to a frozen router.

All rank experts by logit (ties by the lower index), or by another score; how many they keep depends
on probabilities alone. The per-expert threshold (Expert Threshold,
arXiv 2603.11535) needs no class: it is ``threshold`` under the null ``per_expert``, at
alpha = k / E for k experts per token on average.

Shape letters: L layers, T tokens, K slots, E experts, J ranks, M thresholds, S samples; 1 a kept
axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, model_validator

from moe_routing.routing.strategies.ranked import Budgeted, Ranked
from moe_routing.vocabulary import Family, Look, Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.ranking import Ranker, Ranking
    from moe_routing.routing.types import RouterInputs


class Rival(Ranked):
    """A choice of weights, and at least one expert per token."""

    words: ClassVar[tuple[str, ...]] = ("weighting",)

    weighting: Weighting = Field(default="model", description="How selected experts are weighted.")

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return 1

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting


class Capped(Rival, Budgeted):
    """A rival with a cap on the number of experts per token, and a free parameter below it."""

    max_k: int = Field(ge=1, description="Most experts per token.")

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return self.max_k


class MinP(Capped):
    """Keep every expert whose probability exceeds ``ratio`` times the largest, at least ``min_k``.

    The min-p rule of token sampling (Nguyen et al., 2407.01082) on experts, which ik_llama.cpp
    calls smart expert reduction.
    """

    family: ClassVar[Family] = Family(
        "minp",
        label="Ratio (min-p)",
        look=Look("#B01A1A", "v"),
        definition="Ratio (min-p), at most {k}, weights {weighting}",
        selection="every expert above a proportion of the largest probability",
        words="min-p routing",
    )
    codes: ClassVar[dict[str, str]] = {"max_k": "k", "ratio": "t", "budget": "b", "min_k": "m"}
    free: ClassVar[str] = "ratio"

    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="Proportion of the largest probability."
    )
    min_k: int = Field(default=1, ge=1, description="Fewest experts per token.")

    @model_validator(mode="after")
    def _consistent(self) -> MinP:
        if self.max_k < self.min_k:
            raise ValueError(f"max_k is {self.max_k}; allowed: at least min_k = {self.min_k}")
        return self

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return self.min_k

    def ranker(self, calibration: Calibration | None, num_experts: int) -> Ranker:
        """Return a ranker with a count from the ratio."""
        from moe_routing.routing.ranking import Ranking, by_score

        ratio = self.value

        def rank(inputs: RouterInputs, probability_TE: Tensor) -> Ranking:
            logits_TE, order_TE = by_score(inputs)
            largest_T1 = probability_TE.amax(1, keepdim=True).double()
            count_T = (probability_TE > ratio * largest_T1).sum(1)
            return Ranking.bounded(order_TE, logits_TE, count_T, self.min_k, self.max_k)

        return rank


class TopP(Capped):
    """Keep the fewest experts whose probabilities sum to at least ``mass``.

    The rule of Huang et al. (2403.07652), who train with it; here it is applied post hoc.
    """

    family: ClassVar[Family] = Family(
        "topp",
        label="Top-p",
        look=Look("#DB9100", "X"),
        definition="Top-p, at most {k}, weights {weighting}",
        selection="the fewest experts whose probabilities reach a total [@huang2024]",
        words="top-p routing",
    )
    codes: ClassVar[dict[str, str]] = {"max_k": "k", "mass": "p", "budget": "b"}
    free: ClassVar[str] = "mass"

    mass: float | None = Field(default=None, gt=0, lt=1, description="Cumulative probability.")

    def ranker(self, calibration: Calibration | None, num_experts: int) -> Ranker:
        """Return a ranker with a count from the cumulative mass, summed in float64."""
        from moe_routing.routing.ranking import Ranking, by_score, in_descending_order

        mass = self.value

        def rank(inputs: RouterInputs, probability_TE: Tensor) -> Ranking:
            logits_TE, order_TE = by_score(inputs)
            sorted_TE = in_descending_order(inputs.own_weight_TE, inputs, order_TE).double()
            short_TE = sorted_TE.cumsum(1) < mass
            count_T = 1 + (short_TE[:, :-1] & (sorted_TE[:, 1:] > 0)).sum(1)
            return Ranking.bounded(order_TE, logits_TE, count_T, 1, self.max_k)

        return rank


class EntropyBands(Capped):
    """Between ``min_k`` and ``max_k`` experts, fewer where the router's softmax has less entropy.

    A token gains one expert for each of the m = max_k - min_k thresholds of its layer that its
    entropy exceeds. They are quantiles of the entropy on calibration tokens: a proportion
    ``lowest`` of these has the fewest experts, and every other number is equally frequent. By
    default every number is, and the fewest are ceil(max_k / 2).
    """

    family: ClassVar[Family] = Family(
        "entropy",
        label="Entropy bands",
        look=Look("#1C591B", "<"),
        definition="Entropy bands, at most {k}, weights {weighting}",
        selection="up to k by the entropy of the router's softmax",
        words="entropy bands",
    )
    codes: ClassVar[dict[str, str]] = {"max_k": "k", "lowest": "q", "budget": "b", "min_k": "m"}
    free: ClassVar[str] = "lowest"
    has_default: ClassVar[bool] = True

    lowest: float | None = Field(
        default=None, gt=0, lt=1, description="Proportion of tokens with the fewest experts."
    )
    min_k: int | None = Field(default=None, ge=1, description="Fewest experts per token.")

    @model_validator(mode="after")
    def _consistent(self) -> EntropyBands:
        if self.max_k < self.min_experts:
            raise ValueError(f"max_k is {self.max_k}; allowed: at least min_k = {self.min_k}")
        return self

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return (self.max_k + 1) // 2 if self.min_k is None else self.min_k

    @property
    def needs_calibration(self) -> bool:
        """Thresholds come from calibration tokens."""
        return True

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return a ranker with a count from the entropy bands."""
        import torch

        from moe_routing.routing.ranking import Ranking, by_score

        m = self.max_experts - self.min_experts
        lowest = 1 / (m + 1) if self.lowest is None and self.budget is None else self.value
        levels_M = lowest + (1 - lowest) * torch.arange(m) / max(1, m)
        probability_LTE = calibration.sample.logits_LTE.softmax(-1)
        entropy_LT = torch.special.entr(probability_LTE).sum(-1)
        threshold_LM = torch.quantile(entropy_LT, levels_M, dim=1).T

        def rank(inputs: RouterInputs, probability_TE: Tensor) -> Ranking:
            logits_TE, order_TE = by_score(inputs)
            entropy_T1 = torch.special.entr(probability_TE).sum(1, keepdim=True)
            threshold_M = threshold_LM[inputs.layer].to(entropy_T1.device)
            count_T = self.min_experts + (entropy_T1 > threshold_M).sum(1)
            return Ranking.counted(order_TE, logits_TE, count_T, self.max_k)

        return rank


class PerLayer(Rival):
    """A fixed number of experts in each layer, ``mean_k`` on average over layers.

    The idea of LExI (2509.02753), with the router's own mass in place of a search: starting from
    one expert per layer, the next expert goes to the layer whose next-ranked expert has the largest
    mean softmax probability on calibration tokens, until the layers hold ``mean_k`` on average; no
    layer gets more than 2 * ``mean_k`` (or all it has).
    """

    family: ClassVar[Family] = Family(
        "perlayer",
        label="Per-layer k",
        look=Look("#49A3A3", "h"),
        definition="Per-layer k, {k} on average, weights {weighting}",
        selection="a fixed number for each layer, from calibration text",
        words="per-layer k",
    )
    codes: ClassVar[dict[str, str]] = {"mean_k": "k"}

    mean_k: int = Field(ge=1, description="Experts per token, averaged over layers.")

    @property
    def nominal_experts(self) -> int:
        """Experts per token: the mean over layers, exactly."""
        return self.mean_k

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return 2 * self.mean_k

    @property
    def needs_calibration(self) -> bool:
        """The allocation comes from calibration tokens."""
        return True

    def allocation(self, calibration: Calibration) -> list[int]:
        """Return the number of experts of each layer."""
        import torch

        sample = calibration.sample
        cap = min(self.max_experts, sample.num_experts)
        mass_LJ = sample.logits_LTE.softmax(-1).sort(-1, descending=True).values.mean(1)[:, :cap]
        # Mass decreases with rank, so the largest entries are the greedy choice.
        layer_J = torch.arange(sample.num_layers).repeat_interleave(cap - 1)
        spare = (self.mean_k - 1) * sample.num_layers
        best_J = mass_LJ[:, 1:].flatten().argsort(descending=True, stable=True)[:spare]
        return (1 + torch.bincount(layer_J[best_J], minlength=sample.num_layers)).tolist()

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return a ranker with the layer's number of experts."""
        from moe_routing.routing.ranking import Ranking, by_score

        counts = self.allocation(calibration)

        def rank(inputs: RouterInputs, _: Tensor) -> Ranking:
            logits_TE, order_TE = by_score(inputs)
            k = counts[inputs.layer]
            count_T = order_TE.new_full(order_TE.shape[:1], k)
            return Ranking.counted(order_TE, logits_TE, count_T, k)

        return rank


class DynamicSkipping(Capped):
    """Top k without the experts whose probability is small relative to the largest, by layer.

    Lu et al. (2402.14800, section 3.3) skip the second of Mixtral's two experts where its weight
    is below beta times the first's, beta being the layer's median ratio on calibration text. Here
    k is any number and beta the layer's ``proportion`` quantile of the ratios p_j / p_1 of slots
    j = 2 ... k; with k = 2 and proportion = 0.5 this is their rule. On calibration text a token has
    1 + (k - 1) * (1 - proportion) experts on average, in every layer.
    """

    family: ClassVar[Family] = Family(
        "dynskip",
        label="Dynamic skipping",
        look=Look("#BF3AC2", "*"),
        definition="Dynamic skipping, at most {k}, weights {weighting}",
        selection="the k largest, less those small beside the largest, by layer [@lu2024]",
        words="dynamic skipping",
    )
    codes: ClassVar[dict[str, str]] = {"max_k": "k", "proportion": "q", "budget": "b"}
    free: ClassVar[str] = "proportion"

    max_k: int = Field(ge=2, description="Most experts per token.")
    proportion: float | None = Field(
        default=None, gt=0, lt=1, description="Proportion of slots 2 ... k skipped on calibration."
    )

    @property
    def needs_calibration(self) -> bool:
        """The ratio comes from calibration tokens."""
        return True

    def ratio_L(self, calibration: Calibration) -> Tensor:
        """Return each layer's ratio, float64."""
        import torch

        top_LTJ = calibration.sample.logits_LTE.topk(self.max_k, dim=-1).values
        ratio_LS = (top_LTJ[..., 1:] - top_LTJ[..., :1]).double().exp().flatten(1)
        # numpy's, because torch.quantile takes at most 16 million values.
        return torch.from_numpy(np.quantile(ratio_LS.numpy(), self.value, axis=1))

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return a ranker with a count from the layer's ratio."""
        from moe_routing.routing.ranking import Ranking, by_score, in_descending_order

        ratios = self.ratio_L(calibration).tolist()

        def rank(inputs: RouterInputs, probability_TE: Tensor) -> Ranking:
            logits_TE, order_TE = by_score(inputs)
            top_TK = in_descending_order(probability_TE, inputs, order_TE[:, : self.max_k]).double()
            count_T = (top_TK >= ratios[inputs.layer] * top_TK[:, :1]).sum(1)
            return Ranking.counted(order_TE, logits_TE, count_T, self.max_k)

        return rank
