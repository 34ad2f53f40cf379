"""Controls: strategies with one component replaced by random choices or by a mean.

The id of a control is its family, a dot, and the id of its base strategy:
``shuffle.bh_k16_a005``; another seed is written ``shuffle_s1.bh_k16_a005``.

Shape letters: L layers, T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializeAsAny, model_validator

from moe_routing.errors import InputError
from moe_routing.routing.strategies.base import Strategy
from moe_routing.routing.strategies.mixture import Mixture
from moe_routing.routing.strategies.ranked import Ranked
from moe_routing.vocabulary import ControlKind, ExpertScore, Family, Look, Weighting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.certificate import Certificate
    from moe_routing.routing.ranking import Ranking
    from moe_routing.routing.rule import ModelRule
    from moe_routing.routing.types import RouterInputs, Selection, Selector

WHICH_TOKENS = {
    "worse": "which tokens get more experts matters",
    "better": "tokens drawn at random use the same experts better than those of the rule",
    "none": "nothing shows that it matters which tokens get more experts",
}
"""What the outcomes of controls mean that keep the counts and draw the tokens that get them."""


class ControlStrategy(Strategy):
    """A strategy derived from a base strategy: the base in everything that it does not replace.

    The entry of its family gives the kind of control.
    """

    codes: ClassVar[dict[str, str]] = {}
    common_words: ClassVar[tuple[str, ...]] = ()
    inherited: ClassVar[tuple[str, ...]] = Strategy.common_words
    """Named parameters of every family that are those of the base."""

    base: SerializeAsAny[Ranked] = Field(description="The base strategy.")
    score: ExpertScore | None = Field(default=None, description="What ranks the base's experts.")

    @model_validator(mode="before")
    @classmethod
    def _like_the_base(cls, values: dict[str, object]) -> dict[str, object]:
        base = values.get("base")
        if not isinstance(base, Ranked):
            return values
        return {**values, **{name: getattr(base, name) for name in cls.inherited}}

    @classmethod
    def control_kind(cls) -> ControlKind:
        """Return the kind of control; discovery rejects a control without one."""
        kind = cls.family.control
        if kind is None:
            raise TypeError(f"control {cls.__name__} has a family without a ControlKind")
        return kind

    @property
    def id(self) -> str:
        """The stable id."""
        return f"{super().id}.{self.base.id}"

    def resolved(self, rule: ModelRule) -> ControlStrategy:
        """Return the control of the resolved base."""
        return self.model_copy(update={"base": self.base.resolved(rule)})

    @property
    def needs_null(self) -> str | None:
        """Id of the base strategy's null."""
        return self.base.needs_null

    @property
    def needs_calibration(self) -> bool:
        """Whether the base strategy needs calibration data."""
        return self.base.needs_calibration

    @property
    def needs_outputs(self) -> bool:
        """Whether the base strategy needs the outputs of experts."""
        return self.base.needs_outputs

    @property
    def needs_budget(self) -> str | None:
        """Id under which the budget of the base strategy is fitted."""
        return self.base.needs_budget

    def fitted(self, calibration: Calibration | None) -> Self:
        """Return the control of the fitted base."""
        return self.model_copy(update={"base": self.base.fitted(calibration)})

    def score_of(self, calibration: Calibration | None) -> ExpertScore:
        """Return what ranks the experts of the base strategy."""
        return self.base.score_of(calibration)

    def certificate_of(self, calibration: Calibration) -> Certificate | None:
        """Return the certificate of the base strategy."""
        return self.base.certificate_of(calibration)

    def output_scale(self, calibration: Calibration | None) -> float | None:
        """Return the factor that was fitted for the base strategy."""
        return self.base.output_scale(calibration)

    @property
    def max_experts(self) -> int:
        """Maximum number of experts per token."""
        return self.base.max_experts

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return self.base.min_experts

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.base.weighting_kind


class RandomControl(ControlStrategy):
    """A randomised control; its draws depend only on seed, layer and forward pass."""

    codes: ClassVar[dict[str, str]] = {"seed": "s"}
    in_order: ClassVar[bool] = True

    seed: int = Field(default=0, ge=0, description="Seed.")

    @abstractmethod
    def replace(
        self, inputs: RouterInputs, ranking: Ranking, experts: int, generator: torch.Generator
    ) -> Selection:
        """Return a selection from the base's ranking and random draws."""

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the control's selection; each selector draws its own sequence in each layer."""
        import torch

        from moe_routing.routing.ranking import blockwise

        rank = blockwise(self.base.ranker(calibration, num_experts))
        generators: dict[tuple[int, torch.device], torch.Generator] = {}

        def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            ranking = rank(inputs, probability_TE)
            key = (inputs.layer, ranking.order_TK.device)
            if key not in generators:
                # Seed and layer are combined into one number, with room for 2^20 layers.
                seed = (self.seed << 20) + inputs.layer
                generators[key] = torch.Generator(key[1]).manual_seed(seed)
            return self.replace(inputs, ranking, num_experts, generators[key])

        return select


class Shuffle(RandomControl):
    """The base's expert counts, permuted over the tokens of a layer and forward pass.

    Each token keeps its own order of experts; padding keeps its own counts. If this is as good as
    the base, it does not matter which token gets how many experts. In a pass with one token there
    is nothing to permute.
    """

    family: ClassVar[Family] = Family(
        "shuffle",
        label="Control: counts shuffled",
        look=Look("#172C4D", (6, 1, 0)),
        definition="Control: counts shuffled, at most {k}, weights {weighting}",
        selection="the counts of another strategy, permuted over tokens",
        words="counts shuffled over tokens",
        control=ControlKind(
            "shuffle",
            absent="counts shuffled over tokens",
            short="counts shuffled over tokens",
            done="With the counts of {base} assigned to other tokens of the same layer",
            meanings=WHICH_TOKENS,
        ),
    )

    def replace(
        self, inputs: RouterInputs, ranking: Ranking, experts: int, generator: torch.Generator
    ) -> Selection:
        """Permute counts."""
        from moe_routing.routing.types import Selection

        source_T = permutation(ranking.count_T, inputs.mask_T, generator)
        count_T = ranking.count_T[source_T].minimum(ranking.available_T)
        return Selection.prefix(ranking.order_TK, count_T, experts, ranking.rejected_T[source_T])


def permutation(count_T: Tensor, mask_T: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return for each token the index of the token whose count it gets; padding keeps its own."""
    import torch

    tokens, device = count_T.numel(), count_T.device
    key_T = torch.rand(tokens, generator=generator, device=device, dtype=torch.float64)
    if mask_T is None:
        return key_T.argsort()
    padding_T = ~mask_T.to(device)
    # Targets: real tokens in order, then padding. Drawn: real tokens at random, then padding.
    target_T = padding_T.sort(stable=True).indices
    place_T = torch.arange(tokens, device=device, dtype=torch.float64)
    drawn_T = torch.where(padding_T, 1 + place_T, key_T).argsort()
    return torch.empty_like(target_T).scatter_(0, target_T, drawn_T)


class EqualBudget(ControlStrategy):
    """A control with as many experts as the base used on the same text, in another place.

    How many that was is read from the base's cell; :meth:`like` takes it. Draws depend on seed,
    layer and the text up to the token.
    """

    codes: ClassVar[dict[str, str]] = {"seed": "s"}

    seed: int = Field(default=0, ge=0, description="Seed.")
    histogram: tuple[tuple[int, ...], ...] | None = Field(
        default=None, exclude=True, repr=False, description="Decisions of the base by count."
    )

    @property
    def needs_cell(self) -> str:
        """Id of the base strategy."""
        return self.base.id

    def like(self, histogram_LC: Sequence[Sequence[int]]) -> Self:
        """Return the control for a text on which the base made these decisions.

        Args:
            histogram_LC: decisions with C = 0 ... experts, (layers, experts + 1); see
                :class:`moe_routing.engine.recorder.RoutingStatistics`.
        """
        rows = tuple(tuple(int(count) for count in row) for row in histogram_LC)
        return self.model_copy(update={"histogram": rows})

    @property
    def proportion_LC(self) -> NDArray[np.float64]:
        """Proportion of the base's decisions with C experts, (layers, experts + 1).

        Raises:
            InputError: the control was not told.
        """
        if self.histogram is None:
            raise InputError(
                f"control '{self.id}' needs the numbers of experts that '{self.base.id}' uses on "
                "the same text; none given (allowed: control.like(counts by layer), or a study)"
            )
        count_LC = np.array(self.histogram, dtype=np.float64)
        return count_LC / count_LC.sum(1, keepdims=True).clip(1)

    @property
    def mean_L(self) -> NDArray[np.float64]:
        """Mean experts of the base by layer; see :attr:`proportion_LC`."""
        proportion_LC = self.proportion_LC
        return proportion_LC @ np.arange(proportion_LC.shape[1])


class CountedControl(EqualBudget):
    """Experts in the base's order, as many as are drawn for the token."""

    @abstractmethod
    def cumulative_LC(self) -> NDArray[np.float64]:
        """Return the probability of at most C experts, (layers, experts + 1)."""

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the base's order with a random count."""
        import torch

        from moe_routing.routing.draws import uniform
        from moe_routing.routing.ranking import blockwise
        from moe_routing.routing.types import Selection

        rank = blockwise(self.base.ranker(calibration, num_experts))
        below_LC = torch.from_numpy(self.cumulative_LC())

        def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            ranking = rank(inputs, probability_TE)
            below_C = below_LC[inputs.layer].to(ranking.order_TK.device)
            drawn_T = torch.searchsorted(below_C, uniform(inputs, self.seed), right=True)
            count_T = drawn_T.minimum(ranking.available_T)
            return Selection.prefix(ranking.order_TK, count_T, num_experts, count_T)

        return select


class DrawnCounts(CountedControl):
    """Counts drawn at random from those of the base in the same layer.

    If this is as good as the base, it does not matter which token gets how many experts.
    """

    family: ClassVar[Family] = Family(
        "counts",
        label="Control: counts drawn",
        look=Look("#7A2E39", (7, 2, 0)),
        definition="Control: counts drawn at random, at most {k}, weights {weighting}",
        selection="counts drawn from those of another strategy in the layer",
        words="counts drawn at random",
        control=ControlKind(
            "counts",
            absent="counts drawn at random",
            short="counts drawn at random",
            done="With counts drawn at random from those of {base} in the same layer",
            meanings=WHICH_TOKENS,
        ),
    )

    def cumulative_LC(self) -> NDArray[np.float64]:
        """Return the base's law."""
        return self.proportion_LC.cumsum(1)


class LayerMean(CountedControl):
    """Each layer's mean number of experts for every token, rounded up or down at random.

    Separates what a strategy gains by treating layers differently from what it gains by treating
    tokens differently.
    """

    family: ClassVar[Family] = Family(
        "layermean",
        label="Control: layer means",
        look=Look("#473320", "H"),
        definition="Control: layer means, at most {k}, weights {weighting}",
        selection="the mean count of another strategy in each layer, rounded at random",
        words="one mean number of experts per layer",
        control=ControlKind(
            "layermean",
            absent="one number of experts per layer",
            short="one number per layer",
            done="With the mean of {base} in each layer for every token, rounded up or down at "
            "random",
            meanings={
                "worse": "a number for each token carries more than a number for each layer",
                "better": "fixed numbers by layer do better than numbers by token",
                "none": "nothing shows that numbers by token do better than numbers by layer",
            },
        ),
    )

    def cumulative_LC(self) -> NDArray[np.float64]:
        """Return the law with the layer's mean on two whole numbers."""
        mean_L1 = self.mean_L[:, None]
        return (np.arange(self.proportion_LC.shape[1]) + 1 - mean_L1).clip(0, 1)


class StaticMixture(EqualBudget):
    """Static top-k at the base's mean: k or k + 1 experts, drawn at random per token and layer.

    Of the base it has nothing but the mean and the weighting: experts are ranked by probability,
    nothing stands in for dropped ones, and no scale is fitted.
    """

    family: ClassVar[Family] = replace(
        Mixture.family,
        control=ControlKind(
            "mixture",
            absent="the static mixture at the same mean",
            short="static mixture",
            done="With k or k + 1 experts for every token, drawn at random with the mean of {base}",
            meanings={
                "worse": "the rule is better than static top-k at its number of experts",
                "better": "static top-k is better at that number of experts",
                "none": "nothing shows that the rule is better than static top-k at its number of "
                "experts",
            },
        ),
    )
    inherited: ClassVar[tuple[str, ...]] = ()
    score: ExpertScore | None = Field(default="probability", description="What ranks experts.")
    needs_null: ClassVar[None] = None
    needs_budget: ClassVar[None] = None
    needs_calibration: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = False

    def score_of(self, calibration: Calibration | None) -> ExpertScore:
        """Return the model's own ranking."""
        del calibration
        return "probability"

    def fitted(self, calibration: Calibration | None) -> Self:
        """Return itself: nothing of the base is fitted."""
        del calibration
        return self

    def certificate_of(self, calibration: Calibration) -> None:
        """Return None: nothing of the base is certified."""

    def output_scale(self, calibration: Calibration | None) -> None:
        """Return None: no scale is fitted."""

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the static selection."""
        mixture = Mixture(budget=1, seed=self.seed, weighting=self.weighting_kind)
        mean = float(self.mean_L.mean())
        return mixture.model_copy(update={"budget": mean}).selector(calibration, num_experts)


class RandomIdentity(RandomControl):
    """The base's number of experts for each token, but random experts, without replacement."""

    family: ClassVar[Family] = Family(
        "randomid",
        label="Control: random experts",
        look=Look("#400A24", (3, 1, 0)),
        definition="Control: random experts, at most {k}, weights {weighting}",
        selection="the counts of another strategy, experts drawn at random",
        words="experts drawn at random",
        control=ControlKind(
            "randomid",
            absent="experts drawn at random",
            short="random experts",
            done="With the counts of {base} but experts drawn at random",
            meanings={
                "worse": "it matters which experts are chosen",
                "better": "the chosen experts are no better than random ones",
                "none": "nothing shows that it matters which experts are chosen",
            },
            raw_meanings={
                "worse": "random experts keep their own, near-zero softmax weights, so that the "
                "choice of experts cannot be told from the loss of most of the layer's output",
            },
        ),
    )

    def replace(
        self, inputs: RouterInputs, ranking: Ranking, experts: int, generator: torch.Generator
    ) -> Selection:
        """Draw experts that are not masked."""
        import torch

        from moe_routing.routing.types import Selection

        logits_TE = inputs.logits_TE
        key_TE = torch.rand(
            logits_TE.shape, generator=generator, device=logits_TE.device, dtype=torch.float64
        )
        order_TE = key_TE.masked_fill(logits_TE.isneginf(), 2.0).argsort(dim=1)
        return Selection.prefix(order_TE, ranking.count_T, experts, ranking.rejected_T)
