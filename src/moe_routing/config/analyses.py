"""Settings of the analyses: how much text each one uses, and what it varies."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Annotated, TypeVar

from pydantic import Field, model_validator

from moe_routing.schema import MOST, ClosedModel, Count, Distinct, Natural, Positive
from moe_routing.vocabulary import LOGIT_NULLS, NULL_IDS, is_null

Part = TypeVar("Part", bound=ClosedModel)
Level = Annotated[float, Field(gt=0, lt=1)]

PROMPTS = (
    "The capital of France is",
    "In quantum mechanics, the uncertainty principle states that",
    "Once upon a time, there was a",
)
FEWER_K = (1, 2, 3, 4, 6)
FIT_TIMES = 2
"""Tokens used to fit a null, per token used to test it: noise of the fit adds to that of the
test."""
GENERATION_PROMPT = "The theory of relativity fundamentally changed our understanding of"

_ALPHA = Field(default=[0.01, 0.05, 0.1], min_length=1, description="Significance levels.")
_NULLS = Field(
    default=None,
    min_length=1,
    description="Ids of the null hypotheses; null uses those in calibration.nulls.",
)


def _check_nulls(names: list[str] | None) -> None:
    unknown = [name for name in names or [] if not is_null(name)]
    if unknown:
        raise ValueError(f"nulls has '{unknown[0]}'; allowed: {', '.join(NULL_IDS)}")


class BaselineAnalysis(ClosedModel):
    """Measurements of the stock model with its routing unchanged."""

    tokens: Count = Field(default=4096, description="Minimum number of tokens of evaluation text.")
    domain_tokens: Count = Field(
        default=2048,
        description="Tokens from each of the other evaluation sets, for the analysis of domain "
        "specialisation.",
    )
    prompts: Distinct[str] = Field(
        default=list(PROMPTS),
        min_length=1,
        description="Prompts for which a separate table is written.",
    )


class BHAnalysis(ClosedModel):
    """Benjamini-Hochberg routing over a grid of max_k and alpha, compared with top-k."""

    tokens: Count = Field(default=6144, description="Minimum number of tokens of evaluation text.")
    max_k: Distinct[Count] | None = Field(
        default=None,
        min_length=1,
        description="Values of max_k, also used as k for top-k; null uses the model's own k "
        "and its doublings up to the number of experts: 8, 16, 32, 64 for OLMoE.",
    )
    alpha: Distinct[Level] = _ALPHA
    nulls: Distinct[str] | None = _NULLS
    fewer_k: Distinct[Count] | None = Field(
        default=None,
        description="Additional values of static k that BH must beat to be recommended; null "
        "uses 1, 2, 3, 4 and 6, up to the number of experts.",
    )
    prompt: str = Field(
        default=GENERATION_PROMPT, min_length=1, description="Prompt for text generation."
    )
    new_tokens: Count = Field(default=32, description="Number of tokens to generate greedily.")
    union: Count = Field(
        default=16,
        description="Batch size, in tokens, for counting the distinct experts that a batch uses.",
    )

    @model_validator(mode="after")
    def _nulls(self) -> BHAnalysis:
        _check_nulls(self.nulls)
        return self


class ValidityAnalysis(ClosedModel):
    """Whether the p-values are valid."""

    tokens: int = Field(
        default=3072,
        ge=256,
        le=MOST,
        description="Simulated tokens to test nulls on; twice as many are used to fit them.",
    )
    nulls: Distinct[str] | None = Field(
        default=None,
        min_length=1,
        description="Ids of the null hypotheses to check in designs; null uses all that are fitted "
        "on logits alone, except kernel estimates, which smooth those without _kde.",
    )
    alpha: Distinct[Level] = _ALPHA
    level: Level = Field(
        default=0.05, description="Significance level at which a null is judged valid or invalid."
    )
    largest_size: Level = Field(
        default=0.06,
        description="Largest proportion of pure-noise tokens with a selection, in any layer, "
        "at which a null is still judged valid.",
    )
    max_k: Count | None = Field(
        default=None,
        description="Value of max_k for counting how often the cap binds; null uses the "
        "model's own k.",
    )
    repeats: int = Field(
        default=10000, ge=100, le=10_000_000, description="Simulated tokens per setting."
    )
    signals: Distinct[Natural] | None = Field(
        default=None,
        min_length=1,
        description="Numbers of experts with a true effect in the simulation; null uses none, one "
        "sixteenth and one quarter of the model's experts: 0, 4, 16 for OLMoE's 64.",
    )
    effect: Positive = Field(
        default=3.0, description="Mean of the simulated effects, in standard deviations."
    )
    correlation: Distinct[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.0, 0.5], description="Correlations between experts in the simulation."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ValidityAnalysis:
        # Simulated logits have no toggled experts.
        toggled = [name for name in self.nulls or [] if name not in LOGIT_NULLS]
        if toggled:
            raise ValueError(f"nulls has '{toggled[0]}'; allowed: {', '.join(LOGIT_NULLS)}")
        if self.level not in self.alpha:
            raise ValueError(f"level is {self.level}; allowed: one of alpha, {self.alpha}")
        return self


class AblationAnalysis(ClosedModel):
    """What discoveries are worth: toggled experts of held-out text, under every null and level."""

    alpha: Distinct[Level] = _ALPHA
    nulls: Distinct[str] | None = _NULLS
    epsilon: Distinct[Positive] = Field(
        default=[0.001, 0.01, 0.1],
        min_length=1,
        description="Losses, in nats: a discovery is false if its removal does not raise the loss "
        "of the next token by this much, and harmful if it lowers the loss by this much.",
    )
    primary_epsilon: Positive = Field(
        default=0.01, description="Value of epsilon that the text of the report refers to, in nats."
    )

    @model_validator(mode="after")
    def _consistent(self) -> AblationAnalysis:
        _check_nulls(self.nulls)
        if self.primary_epsilon not in self.epsilon:
            raise ValueError(
                f"primary_epsilon is {self.primary_epsilon}; allowed: one of epsilon, "
                f"{self.epsilon}"
            )
        return self


class HeldOutAnalysis(ClosedModel):
    """Toggled experts of text that nothing was fitted on, which validity and ablation read."""

    tokens: Count = Field(
        default=400,
        description="Tokens of held-out calibration text whose experts are toggled, one at a time "
        "and together.",
    )
    dataset_tokens: Count = Field(
        default=120,
        description="The same of each evaluation set, and of calibration text in the states of the "
        "model under BH.",
    )
    datasets: Distinct[str] | None = Field(
        default=None,
        description="Evaluation sets whose contexts are read beside calibration text; null uses "
        "all whose items have a context.",
    )
    dead_experts: Count | None = Field(
        default=None,
        description="Experts of each layer, drawn at random, whose output is set to 0 to test the "
        "null needed where it is true; null uses one eighth of the model's experts: 8 for OLMoE's "
        "64.",
    )
    dead_tokens: Count = Field(
        default=100,
        description="Tokens whose experts are toggled in that model: as many to calibrate it as to "
        "test it.",
    )


class EfficiencyAnalysis(ClosedModel):
    """Time of a fixed text under every strategy, and the experts that batches of tokens need."""

    tokens: Count = Field(
        default=8192,
        description="Tokens of running text that are timed under every strategy, in rows of the "
        "window.",
    )
    repeats: int = Field(
        default=5,
        ge=5,
        le=1000,
        description="Times that each strategy reads them, all strategies once per repeat in random "
        "order.",
    )
    batch_sizes: Distinct[Count] = Field(
        default=[1, 2, 4, 8, 16, 32, 64],
        min_length=1,
        description="Tokens of different documents in a batch, as in decoding, for counting the "
        "distinct experts that it needs; sizes above the number of documents are left out.",
    )


class AnalysisConfig(ClosedModel):
    """Settings of the analyses that accompany the comparison of strategies."""

    resamples: int = Field(
        default=2000,
        ge=100,
        le=100_000,
        description="Bootstrap resamples of the analyses; statistics.resamples are those of the "
        "comparison.",
    )
    baseline: BaselineAnalysis = Field(
        default_factory=BaselineAnalysis, description="Statistics of the stock router."
    )
    bh: BHAnalysis = Field(
        default_factory=BHAnalysis, description="BH over a grid of max_k and alpha."
    )
    validity: ValidityAnalysis = Field(
        default_factory=ValidityAnalysis, description="Size of the nulls and FDR of the procedures."
    )
    ablation: AblationAnalysis = Field(
        default_factory=AblationAnalysis, description="What discoveries are worth."
    )
    held_out: HeldOutAnalysis = Field(
        default_factory=HeldOutAnalysis,
        description="Toggled experts of held-out text, for validity and ablation.",
    )
    efficiency: EfficiencyAnalysis = Field(
        default_factory=EfficiencyAnalysis,
        description="Time of each strategy, and distinct experts of batches.",
    )

    def of_model(self, experts: int, top_k: int) -> AnalysisConfig:
        """Return these settings with unset values filled in from the model.

        Args:
            experts: number of experts per layer.
            top_k: experts per token that the model was trained with.
        """
        bh = {"max_k": doublings(top_k, experts), "fewer_k": [k for k in FEWER_K if k <= experts]}
        validity = {
            # A model that selects every expert has no rejected ones to fit ``unselected`` on.
            "nulls": [
                name
                for name in LOGIT_NULLS
                if not name.endswith("_kde") and (name != "unselected" or top_k < experts)
            ],
            "max_k": top_k,
            "signals": sorted({0, max(1, experts // 16), max(1, experts // 4)}),
        }
        parts = {
            "bh": _filled(self.bh, bh),
            "validity": _filled(self.validity, validity),
            "held_out": _filled(self.held_out, {"dead_experts": max(1, experts // 8)}),
        }
        return self.model_copy(update=parts)


def doublings(k: int, most: int) -> list[int]:
    """Return k, 2k, 4k, ... below ``most``, followed by ``most``.

    >>> doublings(8, 64), doublings(2, 8), doublings(4, 60), doublings(3, 3)
    ([8, 16, 32, 64], [2, 4, 8], [4, 8, 16, 32, 60], [3])
    """
    return [*takewhile(lambda value: value < most, (k << n for n in count())), most]


def _filled(part: Part, values: Mapping[str, object]) -> Part:
    unset = {name: value for name, value in values.items() if getattr(part, name) is None}
    return part.model_copy(update=unset)
