"""Controls: what is left of a strategy when one part of it is replaced by chance or by a mean.

The id of a control is its family, a point, and the id of the strategy that it takes apart:
``shuffle.bh_k16_a005``; another seed is written ``shuffle_s1.bh_k16_a005``.

Shape letters: L layers, T tokens, K slots a token, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import sample_inputs
from moe_routing.routing.strategies.base import Selector, Strategy
from moe_routing.routing.strategies.ranked import Ranked, Ranker, Ranking, blockwise
from moe_routing.routing.types import RouterInputs, Selection
from moe_routing.routing.weighting import Weighting


class Control(Strategy):
    """A strategy made from another one, with its floor, cap, null and weights."""

    codes: ClassVar[dict[str, str]] = {}

    base: SerializeAsAny[Ranked] = Field(description="The strategy that is taken apart.")

    @property
    def id(self) -> str:
        """The stable id."""
        return f"{super().id}.{self.base.id}"

    @property
    def needs_null(self) -> str | None:
        """Id of the base strategy's null."""
        return self.base.needs_null

    @property
    def needs_calibration(self) -> bool:
        """Whether the base strategy needs one."""
        return self.base.needs_calibration

    @property
    def max_experts(self) -> int:
        """The most experts a token can get."""
        return self.base.max_experts

    @property
    def min_experts(self) -> int:
        """The fewest experts a token can get."""
        return self.base.min_experts

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.base.weighting_kind


class RandomControl(Control):
    """A control that draws; its draws are a function of seed, layer and forward pass."""

    codes: ClassVar[dict[str, str]] = {"seed": "s"}
    in_order: ClassVar[bool] = True

    seed: int = Field(0, ge=0, description="Seed.")

    @abstractmethod
    def replace(
        self, inputs: RouterInputs, ranking: Ranking, experts: int, generator: torch.Generator
    ) -> Selection:
        """Return the selection made of the base's ranking and chance."""

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the control's selection; each selector draws its own sequence in each layer."""
        rank = blockwise(self.base.ranker(calibration, num_experts))
        generators: dict[tuple[int, torch.device], torch.Generator] = {}

        def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            ranking = rank(inputs, probability_TE)
            key = (inputs.layer, ranking.order_TK.device)
            if key not in generators:
                # Seed and layer share one number; 2^20 layers are enough.
                seed = (self.seed << 20) + inputs.layer
                generators[key] = torch.Generator(key[1]).manual_seed(seed)
            return self.replace(inputs, ranking, num_experts, generators[key])

        return select


class Shuffle(RandomControl):
    """The base's numbers of experts, permuted over the tokens of a layer and forward pass.

    Each token keeps its own order of experts; padding keeps its own counts. If this is as good as
    the base, which token got how many did not matter. In a pass of one token nothing is permuted.
    """

    family: ClassVar[str] = "shuffle"

    def replace(
        self, inputs: RouterInputs, ranking: Ranking, experts: int, generator: torch.Generator
    ) -> Selection:
        """Permute counts."""
        source_T = permutation(ranking.count_T, inputs.mask_T, generator)
        count_T = ranking.count_T[source_T].minimum(ranking.available_T)
        return Selection.prefix(ranking.order_TK, count_T, experts, ranking.rejected_T[source_T])


def permutation(count_T: Tensor, mask_T: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return for each token the token whose count it gets; padding stays where it is."""
    tokens, device = count_T.numel(), count_T.device
    key_T = torch.rand(tokens, generator=generator, device=device, dtype=torch.float64)
    if mask_T is None:
        return key_T.argsort()
    padding_T = ~mask_T.to(device)
    # Real tokens in order of place, then padding; and real tokens at random, then padding.
    target_T = padding_T.sort(stable=True).indices
    place_T = torch.arange(tokens, device=device, dtype=torch.float64)
    drawn_T = torch.where(padding_T, 1 + place_T, key_T).argsort()
    return torch.empty_like(target_T).scatter_(0, target_T, drawn_T)


class RandomIdentity(RandomControl):
    """The base's number of experts for each token, but random experts, without replacement."""

    family: ClassVar[str] = "randomid"

    def replace(
        self, inputs: RouterInputs, ranking: Ranking, experts: int, generator: torch.Generator
    ) -> Selection:
        """Draw experts that are not masked."""
        logits_TE = inputs.logits_TE
        key_TE = torch.rand(
            logits_TE.shape, generator=generator, device=logits_TE.device, dtype=torch.float64
        )
        order_TE = key_TE.masked_fill(logits_TE.isneginf(), 2.0).argsort(dim=1)
        return Selection.prefix(order_TE, ranking.count_T, experts, ranking.rejected_T)


class LayerMean(Control):
    """Each layer's mean number of experts on calibration tokens, rounded, for every token.

    Separates what a strategy gains by treating layers differently from what it gains by treating
    tokens differently.
    """

    family: ClassVar[str] = "layermean"

    @property
    def needs_calibration(self) -> bool:
        """The mean is taken over calibration tokens."""
        return True

    def counts(self, rank: Ranker, calibration: Calibration) -> list[int]:
        """Return the number of experts of each layer; halves are rounded to the even number."""
        sample = calibration.sample
        means = []
        for layer in range(sample.num_layers):
            inputs = sample_inputs(sample, layer)
            ranking = rank(inputs, inputs.logits_TE.softmax(-1))
            means.append(ranking.count_T.double().mean())
        return [max(1, round(float(mean))) for mean in means]

    def selector(self, calibration: Calibration, num_experts: int) -> Selector:
        """Return the base's order with the layer's count."""
        rank = blockwise(self.base.ranker(calibration, num_experts))
        counts = self.counts(rank, calibration)

        def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            ranking = rank(inputs, probability_TE)
            count_T = ranking.available_T.clamp(max=counts[inputs.layer])
            return Selection.prefix(ranking.order_TK, count_T, num_experts, count_T)

        return select
