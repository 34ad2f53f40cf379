"""Strategies with a fixed number of experts per token, under three weightings."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from moe_routing.routing.strategies.base import Strategy
from moe_routing.vocabulary import Family, Look, Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.types import RouterInputs, Selection, Selector

_LARGEST = "the k largest logits"


class Regular(Strategy):
    """Top k with raw softmax weights; with the model's own k this is the stock model."""

    family: ClassVar[Family] = Family(
        "regular",
        label="Top-k, softmax",
        look=Look("#000000", "o", "-"),
        definition="top {k}, softmax weights",
        selection=_LARGEST,
        words="static top-k with softmax weights",
        static_weighting="softmax",
        complete=True,
    )
    codes: ClassVar[dict[str, str]] = {"k": "k"}

    k: int = Field(ge=1, description="Experts per token.")

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return self.k

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return cast("Weighting", self.family.static_weighting)  # each of these families has one

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return top-k selection by probability, as the stock router does, ties included."""
        from moe_routing.routing.ordering import top_experts
        from moe_routing.routing.types import Selection

        def select(_: RouterInputs, probability_TE: Tensor) -> Selection:
            return Selection.fixed(top_experts(probability_TE, self.k))

        return select


class Normalized(Regular):
    """Top k, weights renormalised to sum 1."""

    family: ClassVar[Family] = Family(
        "normalized",
        label="Top-k, renormalised",
        look=Look("#0072B2", "s", "--"),
        definition="top {k}, renormalised weights",
        selection=_LARGEST,
        words="static top-k with renormalised weights",
        static_weighting="renormalised",
        complete=True,
    )


class Uniform(Regular):
    """Top k, equal weights 1/k."""

    family: ClassVar[Family] = Family(
        "uniform",
        label="Top-k, uniform",
        look=Look("#56B4E9", "^", ":"),
        definition="top {k}, equal weights",
        selection=_LARGEST,
        words="static top-k with uniform weights",
        static_weighting="uniform",
        complete=True,
    )
