"""Strategies with a fixed number of experts per token: the model's own rule, and other weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from moe_routing.routing.strategies.base import Strategy
from moe_routing.vocabulary import Family, Look, Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.rule import ModelRule
    from moe_routing.routing.types import RouterInputs, Selection, Selector

_LARGEST = "the k largest logits"


class Regular(Strategy):
    """Top k with raw softmax weights, as OLMoE weights its experts."""

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
    def nominal_experts(self) -> int:
        """Experts per token: k; None if it is left to the model."""
        return self.k

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return self.k

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return cast("Weighting", self.family.static_weighting)  # each of these families has one

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return top-k selection by score; by probability as the model's router, ties included.

        Where fewer than k may be selected, all of them are.
        """
        from moe_routing.routing.ordering import top_experts
        from moe_routing.routing.ranking import Ranking, by_score
        from moe_routing.routing.types import Selection

        def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            if inputs.score_TE is None:
                return Selection.fixed(top_experts(probability_TE, self.k))
            score_TK, order_TK = by_score(inputs, self.k)
            count_T = order_TK.new_full(order_TK.shape[:1], self.k)
            kept = Ranking.counted(order_TK, score_TK, count_T, self.k)
            return Selection.prefix(kept.order_TK, kept.count_T, num_experts, kept.rejected_T)

        return select


class Normalized(Regular):
    """Top k, weights renormalised to sum 1, as Mixtral and Qwen3-MoE weight their experts."""

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


class Stock(Regular):
    """The model's own rule: its own selection and weighting, with its own k or another.

    ``stock_k4`` is the model as loaded with ``num_experts_per_tok=4``. On a model with raw softmax
    weights it is the same routing as ``regular_k4``, on one that renormalises as ``normalized_k4``.
    With other weights than the model's it has no static curve of its own.
    """

    family: ClassVar[Family] = Family(
        "stock",
        label="Stock",
        look=Look("#151515", (8, 1, 0), "-"),
        definition="the model's own rule, top {k}",
        selection=_LARGEST,
        words="the model's own rule",
        static_weighting="model",
    )

    words: ClassVar[tuple[str, ...]] = ("weighting",)

    k: int | None = Field(default=None, ge=1, description="Experts per token; null: the model's.")
    weighting: Weighting = Field(default="model", description="How selected experts are weighted.")

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting

    @property
    def has_lever(self) -> bool:
        """Whether a parameter, the weighting included, is not that of the family."""
        return super().has_lever or self.weighting != "model"

    def resolved(self, rule: ModelRule) -> Regular:
        """Return top k of the family with these weights, itself with its k if there is none."""
        k = self.k or rule.top_k
        kind = rule.weighting if self.weighting == "model" else self.weighting
        families = {cls.family.static_weighting: cls for cls in (Regular, Normalized, Uniform)}
        if kind not in families:
            return self.model_copy(update={"k": k})
        common = {name: getattr(self, name) for name in self.common_words}
        return families[kind](k=k, **common)
