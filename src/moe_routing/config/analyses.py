"""Settings of the analyses: how much text each one looks at, and what it varies."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Annotated, TypeVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe_routing.schema import ClosedModel
from moe_routing.vocabulary import HYPOTHESES

Part = TypeVar("Part", bound=ClosedModel)
Level = Annotated[float, Field(gt=0, lt=1)]

PROMPTS = (
    "The capital of France is",
    "In quantum mechanics, the uncertainty principle states that",
    "Once upon a time, there was a",
)
FEWER_K = (1, 2, 3, 4, 6)
FIT_TIMES = 2
"""Tokens to fit a null on for one token to test it on: the noise of the fit adds to that of the
test."""
GENERATION_PROMPT = "The theory of relativity fundamentally changed our understanding of"


def _known_nulls(names: list[str] | None, key: str) -> None:
    unknown = [name for name in names or [] if name not in HYPOTHESES]
    if unknown:
        raise ValueError(f"{key} has '{unknown[0]}'; allowed: {', '.join(HYPOTHESES)}")


class BaselineAnalysis(ClosedModel):
    """The stock model, watched but not changed."""

    tokens: PositiveInt = Field(default=4096, description="Tokens of evaluation text, at least.")
    domain_tokens: PositiveInt = Field(
        default=2048, description="Tokens of every other evaluation set, for domain specialisation."
    )
    prompts: list[str] = Field(
        default=list(PROMPTS), min_length=1, description="Prompts with a table of their own."
    )


class BHAnalysis(ClosedModel):
    """Benjamini-Hochberg routing over max_k and alpha, beside top-k."""

    tokens: PositiveInt = Field(default=6144, description="Tokens of evaluation text, at least.")
    max_k: list[PositiveInt] | None = Field(
        default=None,
        min_length=1,
        description="Caps, and the k of top-k beside them; null takes the model's own k, doubled "
        "until it is all experts: 8, 16, 32, 64 of OLMoE.",
    )
    alpha: list[Level] = Field(default=[0.01, 0.05, 0.1], min_length=1, description="Levels.")
    nulls: list[str] | None = Field(
        default=None, min_length=1, description="Nulls; null takes those of calibration.nulls."
    )
    fewer_k: list[PositiveInt] | None = Field(
        default=None,
        description="Further static k: what BH must beat to be recommended; null takes 1, 2, 3, 4, "
        "6, as far as the model has experts.",
    )
    prompt: str = Field(
        default=GENERATION_PROMPT, min_length=1, description="Prompt to go on from."
    )
    new_tokens: PositiveInt = Field(default=32, description="Tokens to generate greedily.")
    union: PositiveInt = Field(
        default=16, description="Tokens of a batch whose distinct experts are counted."
    )

    @model_validator(mode="after")
    def _nulls(self) -> BHAnalysis:
        _known_nulls(self.nulls, "nulls")
        return self


class ValidityAnalysis(ClosedModel):
    """Whether p-values are what they claim to be."""

    tokens: int = Field(
        default=6144, ge=256, description="Tokens to test on, and twice as many to fit on."
    )
    nulls: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Nulls to look at; null takes all that the model has draws for.",
    )
    alpha: list[Level] = Field(default=[0.01, 0.05, 0.1], min_length=1, description="Levels.")
    level: Level = Field(default=0.05, description="Level at which a null is called valid or not.")
    largest_size: Level = Field(
        default=0.06,
        description="Largest proportion of pure-noise tokens with a selection in any layer for a "
        "valid null.",
    )
    max_k: PositiveInt | None = Field(
        default=None, description="Cap whose binding is counted; null takes the model's own k."
    )
    repeats: int = Field(default=10000, ge=100, description="Simulated tokens of each setting.")
    signals: list[NonNegativeInt] | None = Field(
        default=None,
        min_length=1,
        description="Experts with an effect, simulated; null takes none, a sixteenth and a quarter "
        "of the model's: 0, 4, 16 of OLMoE's 64.",
    )
    effect: PositiveFloat = Field(default=3.0, description="Their mean, in standard deviations.")
    correlation: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.0, 0.5], description="Correlation between experts, simulated."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ValidityAnalysis:
        _known_nulls(self.nulls, "nulls")
        if self.level not in self.alpha:
            raise ValueError(f"level is {self.level}; allowed: one of alpha, {self.alpha}")
        return self


class AblationAnalysis(ClosedModel):
    """What happens to the loss when one expert of the stock router's choice is left out."""

    tokens: PositiveInt = Field(
        default=200, description="Tokens, four a document, more where documents are few."
    )
    layers: PositiveInt = Field(
        default=4,
        description="Layers, evenly spaced, first and last included; all of a model that has "
        "fewer.",
    )
    alpha: list[Level] = Field(default=[0.01, 0.05, 0.1], min_length=1, description="Levels.")
    nulls: list[str] | None = Field(
        default=None, min_length=1, description="Nulls; null takes those of calibration.nulls."
    )
    epsilon: list[PositiveFloat] = Field(
        default=[0.001, 0.01, 0.1],
        min_length=1,
        description="Changes of the loss that count as none, nats: a table and a panel for each.",
    )
    primary_epsilon: PositiveFloat = Field(
        default=0.01,
        description="The one of epsilon that the sentences of the report are about, nats.",
    )
    context: int = Field(default=64, ge=16, description="Tokens of a document that are read.")
    horizon: PositiveInt = Field(
        default=4, description="Tokens whose loss is followed, the own one first."
    )

    @model_validator(mode="after")
    def _consistent(self) -> AblationAnalysis:
        _known_nulls(self.nulls, "nulls")
        if self.horizon >= self.context // 2:
            raise ValueError(f"horizon is {self.horizon}; allowed: less than half of context")
        if self.primary_epsilon not in self.epsilon:
            raise ValueError(
                f"primary_epsilon is {self.primary_epsilon}; allowed: one of epsilon, "
                f"{self.epsilon}"
            )
        return self


class AnalysisConfig(ClosedModel):
    """The analyses that go with the table of cells."""

    baseline: BaselineAnalysis = Field(
        default_factory=BaselineAnalysis, description="Statistics of the stock router."
    )
    bh: BHAnalysis = Field(default_factory=BHAnalysis, description="BH over max_k and alpha.")
    validity: ValidityAnalysis = Field(
        default_factory=ValidityAnalysis, description="Size of the nulls, FDR of procedures."
    )
    ablation: AblationAnalysis = Field(
        default_factory=AblationAnalysis, description="Interventions on selected experts."
    )

    def of_model(self, experts: int, top_k: int) -> AnalysisConfig:
        """Return these settings with those that are left to the model filled in.

        Args:
            experts: experts of a layer.
            top_k: experts per token that the model was trained with.
        """
        bh = {
            "max_k": doublings(top_k, experts),
            "fewer_k": [k for k in FEWER_K if k <= experts],
        }
        validity = {
            # Where the model selects every expert, none is left to draw ``unselected`` from.
            "nulls": [name for name in HYPOTHESES if name != "unselected" or top_k < experts],
            "max_k": top_k,
            "signals": sorted({0, max(1, experts // 16), max(1, experts // 4)}),
        }
        parts = {"bh": _filled(self.bh, bh), "validity": _filled(self.validity, validity)}
        return self.model_copy(update=parts)


def doublings(k: int, most: int) -> list[int]:
    """Return k, 2k, 4k, ... below ``most``, and ``most``.

    >>> doublings(8, 64), doublings(2, 8), doublings(4, 60), doublings(3, 3)
    ([8, 16, 32, 64], [2, 4, 8], [4, 8, 16, 32, 60], [3])
    """
    return [*takewhile(lambda value: value < most, (k << n for n in count())), most]


def _filled(part: Part, values: Mapping[str, object]) -> Part:
    unset = {name: value for name, value in values.items() if getattr(part, name) is None}
    return part.model_copy(update=unset)
