"""The vocabulary of the study: tasks, data sets, metrics, weightings, nulls, kinds of control.

An entry holds what the stages need: a label, a unit, which direction is better, text for reports.
Families of strategies have similar entries (:class:`Family`), each defined on the strategy's class;
see :mod:`moe_routing.routing.strategies`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import Literal, Protocol, TypeVar, cast, get_args

from moe_routing.errors import InputError

OwnWeighting = Literal["softmax", "renormalised"]
"""How models weight the experts they select: OLMoE by raw probabilities, others renormalise."""
FixedWeighting = Literal["softmax", "renormalised", "uniform", "mass_matched", "sqrt_mass_matched"]
"""A weighting that does not depend on the model."""
Weighting = Literal[
    "model", "softmax", "renormalised", "uniform", "mass_matched", "sqrt_mass_matched"
]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
"""How selected experts are weighted; see :func:`moe_routing.routing.weighting.weigh`. ``model`` is
the model's own weighting: it is trained for these weights, any other changes more than the choice
of experts."""

ExpertScore = Literal["probability", "mean_norm", "norm", "consequence", "exact_norm"]
EXPERT_SCORES: tuple[ExpertScore, ...] = get_args(ExpertScore)
"""What ranks experts; see :mod:`moe_routing.routing.scores`. It never enters the weights."""
Candidates = Literal["all", "own"]
"""Which experts a strategy may select: all of a layer, or those of the model's own choice, so that
it only drops some."""
Dropped = Literal["omitted", "compensated"]
"""What stands in for an expert of the model's own choice that is not selected: nothing, or its mean
output on calibration text, with the weight that the model gives the expert."""
Scaling = Literal["unscaled", "scaled"]
"""Whether the output of the experts is multiplied by one number for all layers, fitted on
calibration text."""

RAW_WEIGHTING: FixedWeighting = "softmax"
"""The weighting under which fewer experts have a smaller total weight."""

FAMILY_COLUMNS = ("k", "alpha", "null", "weighting")
"""Columns of the table of cells that the definition of a family may refer to."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=_Named)


def _by_name(entries: Iterable[Entry]) -> Mapping[str, Entry]:
    return MappingProxyType({entry.name: entry for entry in entries})


@dataclass(frozen=True)
class Look:
    """How a family of strategies is drawn, in every figure.

    Attributes:
        colour: hexadecimal, such as ``#0072B2``; unique to the family.
        marker: matplotlib marker; unique to the family.
        dash: matplotlib line style.
    """

    colour: str
    marker: str | tuple[int, int, int]
    dash: str | tuple[int, tuple[int, ...]] = "-"


@dataclass(frozen=True)
class ControlKind:
    """A kind of control: what is replaced in the strategy that it is compared with, its base.

    Attributes:
        name: value of the column ``kind``.
        absent: text for what is missing from a study without such a control.
        short: short description for a table; empty if the kind has no row there.
        done: start of a sentence that says what the control does; contains ``{base}`` or
            ``{control}``.
        meanings: interpretation of the outcomes ``worse``, ``better`` and ``none``.
        raw_meanings: interpretations that differ if the base uses raw softmax weights.
        on_curves: whether it is a setting in its own right, included in the comparison at matched
            compute and in the Pareto fronts; other kinds are only compared with their base.
    """

    name: str
    absent: str
    short: str = ""
    done: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict)
    raw_meanings: Mapping[str, str] = field(default_factory=dict)
    on_curves: bool = False


@dataclass(frozen=True)
class Family:
    """A family of strategies.

    Attributes:
        name: first part of the ids of its strategies.
        label: name in figures and tables.
        look: how it is drawn.
        definition: what one of its strategies does, for the table of results; may contain
            the parameters in :data:`FAMILY_COLUMNS`, such as ``top {k}``.
        selection: what it chooses, with a citation, for the table of strategies.
        words: name of the family in running text.
        static_weighting: the weighting whose static curve this family is: top k with these weights
            for every token; ``model`` for the model's own. None for every other family.
        complete: whether the complete comparison includes it; a study without it says so.
        control: for a family of controls, the kind.
    """

    name: str
    label: str
    look: Look
    definition: str
    selection: str
    words: str
    static_weighting: Weighting | None = None
    complete: bool = False
    control: ControlKind | None = None


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over items, on some scale.

    Attributes:
        name: value of the column ``metric``.
        label: its name in figures and tables.
        column: column of the item table that is summed.
        per: column that it is divided by; None counts items.
        sign: -1 turns log-likelihoods into nats.
        scale: increasing function from the ratio to the metric: none, exp, or nats to bits.
        is_proportion: whether the metric is the proportion of items that are right.
        higher_is_better: which way is better.
        margin: non-inferiority margin of the config that applies to a difference, if any.
        unit: unit of a difference.
        noun: name of the metric in running text; the label if not given.
        better: verb phrase for a strategy with a better value.
        worse: verb phrase for a strategy with a worse value.
    """

    name: str
    label: str
    column: str = "log_likelihood"
    per: str | None = None
    sign: float = -1.0
    scale: Literal["exp", "bits"] | None = None
    is_proportion: bool = False
    higher_is_better: bool = False
    margin: Literal["accuracy", "nats"] | None = None
    unit: str = ""
    noun: str = ""
    better: str = "predicted better"
    worse: str = "predicted worse"

    @property
    def arrow(self) -> str:
        """Arrow in the direction of better values."""
        return "\N{UPWARDS ARROW}" if self.higher_is_better else "\N{DOWNWARDS ARROW}"

    @property
    def percent(self) -> float:
        """Factor by which values are multiplied for display: proportions are shown in percent."""
        return 100.0 if self.is_proportion else 1.0

    def loss(self, value: float) -> float:
        """Return a value or difference, negated if need be, so that smaller is better."""
        return 0.0 - value if self.higher_is_better else value  # never -0.0


def _accuracy(name: str, label: str, column: str) -> Metric:
    return Metric(
        name,
        label,
        column=column,
        sign=1.0,
        is_proportion=True,
        higher_is_better=True,
        margin="accuracy",
        unit="percentage points",
        better="was more accurate",
        worse="was less accurate",
    )


METRICS: Mapping[str, Metric] = _by_name(
    [
        Metric("token_perplexity", "token perplexity", per="tokens", scale="exp"),
        Metric("word_perplexity", "word perplexity", per="words", scale="exp"),
        Metric("byte_perplexity", "byte perplexity", per="bytes", scale="exp"),
        Metric("bits_per_byte", "bits per byte", per="bytes", scale="bits"),
        _accuracy("accuracy", "accuracy", "correct"),
        _accuracy("accuracy_norm", "length-normalised accuracy", "correct_norm"),
        Metric("last_word_perplexity", "perplexity of the last word", scale="exp"),
        Metric(
            "nats_per_token",
            "nats per token",
            per="tokens",
            margin="nats",
            unit="nats per token",
            noun="loss",
        ),
        # The margin is in nats per token, and a last word has several tokens: no margin applies.
        Metric(
            "nats_per_target",
            "nats per last word",
            unit="nats per last word",
            noun="loss on the last word",
        ),
        # A mean over items, so that every item counts alike (OLMo's task suites; Signal and Noise,
        # 2508.13144). It moves where accuracy is at chance.
        Metric(
            "gold_bits_per_byte",
            "bits per byte of the right continuation",
            column="gold_bits_per_byte",
            sign=1.0,
            unit="bits per byte",
        ),
        Metric(
            "gold_margin",
            "margin of the right continuation",
            column="gold_margin",
            sign=1.0,
            higher_is_better=True,
            unit="nats",
        ),
        Metric(
            "kl_from_baseline",
            "KL from the baseline, nats per token",
            column="kl",
            per="tokens",
            sign=1.0,
            unit="nats per token",
        ),
    ]
)
"""Definitions are those of lm-evaluation-harness. Strategies are compared by accuracy and by nats,
but not by perplexity, whose differences are not sums over items. A difference of d nats per token
is a ratio exp(d) of token perplexities. For words and bytes d is multiplied by a constant, so
testing them as well would repeat the same test."""

DIVERGENCE = METRICS["kl_from_baseline"]
"""Metric of every task, measured on a subset of the items: KL(baseline || strategy)."""


@dataclass(frozen=True)
class Task:
    """A kind of evaluation set.

    Attributes:
        name: value of the column ``task``.
        words: name in tables.
        metrics: metrics of each cell, proportions first.
        compared: metrics by which strategies are compared. The main one of a data set is one of
            them, the first if its config does not say.
        shown_as: the metric of a cell that shows a compared metric, where it is not the same.
        scoring: text on how it is scored; may contain ``{windows}``.
        absent: text for the kind of data missing from a study without such a set.
    """

    name: str
    words: str
    metrics: tuple[str, ...]
    compared: tuple[str, ...]
    scoring: str
    absent: str
    shown_as: Mapping[str, str] = field(default_factory=dict)

    def shown(self, measure: str) -> str:
        """Return the metric of a cell that shows a compared metric."""
        return self.shown_as.get(measure, measure)

    @property
    def examples(self) -> str:
        """What is missing from a study without such a set, with the available data sets."""
        labels = [dataset.label for dataset in DATASETS.values() if dataset.task == self.name]
        return f"{self.absent} ({' or '.join(labels)})"


TASKS: Mapping[str, Task] = _by_name(
    [
        Task(
            "perplexity",
            words="perplexity",
            metrics=("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
            compared=("nats_per_token",),
            scoring="Perplexity is the exponential of the mean negative log-likelihood per token, "
            "with documents scored in {windows}. Every token is predicted once: the last window of "
            "a document is filled with earlier tokens, which are not scored again.",
            absent="running text",
            shown_as={"nats_per_token": "token_perplexity"},
        ),
        Task(
            "multiple_choice",
            words="multiple choice",
            metrics=("accuracy", "accuracy_norm", "gold_bits_per_byte", "gold_margin"),
            compared=("accuracy_norm", "accuracy", "gold_bits_per_byte", "gold_margin"),
            scoring="Multiple choice takes the continuation with the largest log-likelihood per "
            "character. Bits per byte of the right continuation are averaged over items; its "
            "margin is its log-likelihood minus that of the best wrong one.",
            absent="multiple choice",
        ),
        Task(
            "last_word",
            words="last word",
            metrics=("accuracy", "last_word_perplexity", "gold_bits_per_byte"),
            compared=("accuracy", "gold_bits_per_byte", "nats_per_target"),
            scoring="A last word counts as correct if greedy decoding produces it. Its bits per "
            "byte are averaged over items.",
            absent="last words",
            shown_as={"nats_per_target": "last_word_perplexity"},
        ),
    ]
)
"""In the order of columns."""


@dataclass(frozen=True)
class Dataset:
    """An evaluation set.

    Attributes:
        name: its key in the config.
        label: its name in text.
        task: name of its task.
        citation: text after the label where it is cited.
        license: the licence of the published set.
        chance: accuracy of random guessing; 0 if guessing is never right.
    """

    name: str
    label: str
    task: str
    citation: str
    license: str
    chance: float = 0.0


DATASETS: Mapping[str, Dataset] = _by_name(
    [
        Dataset("wikitext", "WikiText-2", "perplexity", "[@merity2017]", "CC BY-SA 3.0"),
        Dataset(
            "wikipedia",
            "Wikipedia",
            "perplexity",
            "passages [collected by @clark2019]",
            "CC BY-SA 3.0",
        ),
        Dataset("hellaswag", "HellaSwag", "multiple_choice", "[@zellers2019]", "MIT", chance=0.25),
        Dataset(
            "lambada",
            "LAMBADA",
            "last_word",
            "[@paperno2016]",
            "MIT (OpenAI's version); the passages are from novels",
        ),
    ]
)

EMBEDDED_TEXT_LICENSES = ("CC BY-SA 3.0", "public domain")
"""Licences of the embedded model's training text; config/pretrain.yaml has the sources."""


def task_of(dataset: str) -> Task:
    """Return the task of an evaluation set."""
    return TASKS[DATASETS[dataset].task]


STATIC_KIND = ControlKind("static", absent="the longer static curve", on_curves=True)
WEIGHTING_KIND = ControlKind(
    "weighting",
    absent="mass-matched weights",
    short="other weights",
    done="With other weights than {base} ({control})",
    meanings={
        "worse": "these weights are worse than the strategy's own",
        "better": "these weights are better than the strategy's own",
        "none": "nothing shows that the weights matter",
    },
)
RIVAL_KIND = ControlKind(
    "rival",
    absent="rival rules",
    short="another rule",
    done="With the rule of {control} in place of that of {base}",
    meanings={
        "worse": "the rule does worse at the number of experts that it uses",
        "better": "the rule does better at the number of experts that it uses",
        "none": "nothing shows that the rule does better or worse at the number of experts that "
        "it uses",
    },
    on_curves=True,
)
"""The kinds without a control family: points of a static curve, strategies with weights other than
their family's default, and any other strategy. Control families define the other kinds."""

_TYPICAL_OF_LAYER = "the logit is typical of all (token, expert) pairs of the layer"
_TYPICAL_OF_EXPERT = "the logit is typical of this expert's logits"
_IN_THE_BULK = "the expert belongs to the bulk of this token's experts"

LOGIT_NULLS: Mapping[str, str] = MappingProxyType(
    {
        "within_token": _IN_THE_BULK,
        "within_token_split": _IN_THE_BULK,
        "within_token_efron": _IN_THE_BULK,
        "pooled": _TYPICAL_OF_LAYER,
        "pooled_kde": _TYPICAL_OF_LAYER,
        "per_expert": _TYPICAL_OF_EXPERT,
        "per_expert_kde": _TYPICAL_OF_EXPERT,
        "unselected": "the logit looks like one of an expert that the model rejects",
        "random_direction": "the expert's vector is no closer to the token than a random one",
        "permuted_context": "the logit is one of this expert's for a mismatched context",
    }
)
"""The nulls that are fitted on router logits alone, by id: H0 in words. Their classes are in
:mod:`moe_routing.routing.nulls`."""

PLAIN_NULL_IDS = (*LOGIT_NULLS, "needed", "needed_e1e4", "needed_loss", "needed_e1e4_loss")
"""The ids of nulls that strategies name, with 1e-4 as an example of an epsilon. What a strategy
ranks by and what stands in for dropped experts are parameters of its own."""
NULL_IDS = (*PLAIN_NULL_IDS, "needed_norm", "needed_compensated", "needed_e1e4_norm_compensated")
"""The ids of nulls, with examples of a score."""

_SCORED: Mapping[str | None, str] = {
    "mean_norm": "ranked by its weight times its mean output norm",
    "norm": "ranked by its weight times its predicted output norm",
    "consequence": "ranked by its predicted consequence",
    "exact_norm": "ranked by its weight times its output norm",
}


@dataclass(frozen=True)
class NeededId:
    """The id of a null ``needed``, such as ``needed``, ``needed_e25e6`` or ``needed_e1e4_norm``.

    Attributes:
        epsilon: effect below which an expert is not needed, in nats, between 0 and 1; ``e25e6`` is
            25e-6. None: the one of the calibration.
        effect: ``kl``, of the next-token distributions with and without the toggle, or ``loss``, by
            how much the expert's presence lowers the loss of the realised next token.
        score: the test statistic. None: the best of those that cost next to nothing, chosen when
            the null is fitted.
        dropped: ``compensated`` if a toggle replaces an expert of the model's own choice by its
            mean output.
    """

    epsilon: float | None = None
    effect: Literal["kl", "loss"] = "kl"
    score: ExpertScore | None = None
    dropped: Dropped = "omitted"

    @classmethod
    def parse(cls, null_id: str) -> NeededId | None:
        """Return the parts of an id, None if it is not a canonical id of such a null."""
        match = re.fullmatch(
            rf"needed(?:_e([0-9]+)e([0-9]+))?(_loss)?(?:_({'|'.join(EXPERT_SCORES)}))?(_compensated)?",
            null_id,
        )
        if match is None:
            return None
        epsilon = float(f"{match[1]}e-{match[2]}") if match[1] else None
        found = cls(
            epsilon,
            "loss" if match[3] else "kl",
            cast("ExpertScore | None", match[4]),
            "compensated" if match[5] else "omitted",
        )
        in_range = epsilon is None or 0 < epsilon < 1
        return found if in_range and str(found) == null_id else None

    def __str__(self) -> str:
        """Return the id."""
        parts = ["needed"]
        if self.epsilon is not None:
            _, digits, exponent = Decimal(repr(self.epsilon)).normalize().as_tuple()
            parts.append(f"e{''.join(map(str, digits))}e{-int(exponent)}")
        if self.effect == "loss":
            parts.append(self.effect)
        if self.score is not None:
            parts.append(self.score)
        if self.dropped == "compensated":
            parts.append(self.dropped)
        return "_".join(parts)


def is_null(null_id: str) -> bool:
    """Return whether there is a null with this id."""
    return null_id in LOGIT_NULLS or NeededId.parse(null_id) is not None


def hypothesis(null_id: str, epsilon: float | None = None, score: ExpertScore | None = None) -> str:
    """Return H0 of a null in words.

    Args:
        null_id: its id.
        epsilon: what an id of ``needed`` without an epsilon stands for, in nats, if it is known.
        score: the test statistic that an id of ``needed`` without one stands for, if it is known.

    Raises:
        InputError: there is no such null.

    >>> hypothesis("needed_e1e4")
    'toggling the expert changes the next-token distribution by less than epsilon = 1e-4 nats (KL)'
    """
    if null_id in LOGIT_NULLS:
        return LOGIT_NULLS[null_id]
    needed = NeededId.parse(null_id)
    if needed is None:
        raise InputError(f"null '{null_id}' is unknown; allowed: {', '.join(NULL_IDS)}")
    value = needed.epsilon or epsilon
    size = f"epsilon = {_power_of_ten(value)}" if value else "epsilon"
    ranked = needed.score or score
    by = f"; {_SCORED[ranked]}" if ranked in _SCORED else ""
    if needed.effect == "loss":
        than = ", more than its mean output does," if needed.dropped == "compensated" else ""
        return (
            f"the expert lowers the loss of the token that follows{than} by less than {size} "
            f"nats{by}"
        )
    toggle = "toggling the expert"
    if needed.dropped == "compensated":
        toggle = "replacing the expert by its mean output"
    return f"{toggle} changes the next-token distribution by less than {size} nats (KL){by}"


def _power_of_ten(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def text_dataset(datasets: Iterable[str]) -> str:
    """Return the set whose text the analyses read.

    It is the first perplexity set of the study; without one, the first last-word set; without
    either, the first set.

    >>> text_dataset(["hellaswag", "lambada", "wikipedia"]), text_dataset(["hellaswag", "lambada"])
    ('wikipedia', 'lambada')
    """
    names = list(datasets)
    for task in ("perplexity", "last_word"):
        for name in names:
            if DATASETS[name].task == task:
                return name
    return names[0]
