"""A fixed number of experts for every token, under three weightings."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from moe_routing.routing.calibration import Calibration
from moe_routing.routing.ordering import top_experts
from moe_routing.routing.strategies.base import Selector, Strategy
from moe_routing.routing.types import RouterInputs, Selection
from moe_routing.routing.weighting import Weighting


class Regular(Strategy):
    """Top k with raw softmax weights; with the model's own k this is the stock model."""

    family: ClassVar[str] = "regular"
    codes: ClassVar[dict[str, str]] = {"k": "k"}
    weighting: ClassVar[Weighting] = "softmax"

    k: int = Field(ge=1, description="Experts a token.")

    @property
    def max_experts(self) -> int:
        """The most experts a token can get."""
        return self.k

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return top-k selection by probability, as the stock router does, ties included."""

        def select(_: RouterInputs, probability_TE: Tensor) -> Selection:
            return Selection.fixed(top_experts(probability_TE, self.k))

        return select


class Normalized(Regular):
    """Top k, weights renormalised to sum 1."""

    family: ClassVar[str] = "normalized"
    weighting: ClassVar[Weighting] = "renormalised"


class Uniform(Regular):
    """Top k, equal weights 1/k."""

    family: ClassVar[str] = "uniform"
    weighting: ClassVar[Weighting] = "uniform"
