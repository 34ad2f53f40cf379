"""The vocabulary of the study: tasks, data sets, metrics, weightings, nulls, kinds of control.

An entry holds what every stage needs to know of a thing: its label, its unit, which way is better,
its prose. The families of strategies have entries of the same kind (:class:`Family`), but each
stands on its own class: see :mod:`moe_routing.routing.strategies`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol, TypeVar, get_args

Weighting = Literal["softmax", "renormalised", "uniform", "mass_matched"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
"""How selected experts are weighted; see :func:`moe_routing.routing.weighting.weigh`."""

RAW_WEIGHTING: Weighting = "softmax"
"""The weights that the models under study were trained with."""

FAMILY_COLUMNS = ("k", "alpha", "null", "weighting")
"""Columns of the table of cells that the definition of a family may name."""


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
        colour: hexadecimal, such as ``#0072B2``; no two families have the same.
        marker: matplotlib marker; no two families have the same.
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
        absent: what a study without one lacks.
        short: what it is, for a table; empty for one that has no row there.
        done: what is done, as the start of a sentence; names ``{base}`` or ``{control}``.
        meanings: what the outcomes ``worse``, ``better`` and ``none`` of the control mean.
        raw_meanings: meanings that are others where the base keeps raw softmax weights.
        on_curves: whether it is a setting in its own right, which the comparison at matched compute
            and the Pareto fronts take in; the others are made to be compared with their base.
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
        label: its name in figures and tables.
        look: how it is drawn.
        definition: what one of its strategies does, for the table of results; may name the
            parameters in :data:`FAMILY_COLUMNS`, such as ``top {k}``.
        selection: what it chooses, with a citation, for the table of strategies.
        words: the family in running text.
        static_weighting: the weighting whose static curve this family is: top k with these weights
            for every token. None for every other family.
        complete: whether the complete comparison has it, so that a study without it says so.
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
        scale: increasing map from the ratio to the metric: none, exp, or nats to bits.
        is_proportion: whether items are right or wrong, so that it is a proportion of them.
        higher_is_better: which way is better.
        margin: which non-inferiority margin of the config applies to a difference, if one does.
        unit: unit of a difference.
        noun: the metric in running text; its label if not given.
        better: what a strategy with a better value did.
        worse: what a strategy with a worse value did.
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
        """Which way is better."""
        return "\N{UPWARDS ARROW}" if self.higher_is_better else "\N{DOWNWARDS ARROW}"

    @property
    def percent(self) -> float:
        """The factor that a value is shown with: proportions are shown in percent."""
        return 100.0 if self.is_proportion else 1.0

    def loss(self, value: float) -> float:
        """Return a value or difference with the sign by which smaller is better."""
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
        # The margin is one of nats per token, and a last word has several: no margin applies.
        Metric(
            "nats_per_target",
            "nats per last word",
            unit="nats per last word",
            noun="loss on the last word",
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
"""Definitions are those of lm-evaluation-harness. Strategies are compared by accuracies and nats:
perplexities have no differences that add up over items, and a difference of d nats per token is a
ratio of exp(d) of token perplexities. Those of words and bytes differ by a constant factor of d, so
that testing them too would be the same test again."""

DIVERGENCE = METRICS["kl_from_baseline"]
"""Metric of every task, measured on some items: KL(baseline || strategy)."""


@dataclass(frozen=True)
class Task:
    """A kind of evaluation set.

    Attributes:
        name: value of the column ``task``.
        words: its name in tables.
        main_metric: the metric that stands for it in the table of cells.
        metrics: what is measured of a cell, proportions first.
        compared: what strategies are compared by; the first stands for the task.
        scoring: how it is scored; may name ``{windows}``.
        absent: what a study without such a set has no data set of.
    """

    name: str
    words: str
    main_metric: str
    metrics: tuple[str, ...]
    compared: tuple[str, ...]
    scoring: str
    absent: str

    @property
    def measures(self) -> tuple[Metric, ...]:
        """What strategies are compared by; the first stands for the task."""
        return tuple(METRICS[name] for name in self.compared)

    @property
    def main_measure(self) -> Metric:
        """What strategies are compared by where only one comparison can be shown."""
        return self.measures[0]

    def is_main(self, measure: Metric) -> bool:
        """Return whether a measure stands for the task."""
        return measure == self.main_measure

    @property
    def examples(self) -> str:
        """What a study without such a set lacks, with the data sets that there are."""
        labels = [dataset.label for dataset in DATASETS.values() if dataset.task == self.name]
        return f"{self.absent} ({' or '.join(labels)})"


TASKS: Mapping[str, Task] = _by_name(
    [
        Task(
            "perplexity",
            words="perplexity",
            main_metric="token_perplexity",
            metrics=("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
            compared=("nats_per_token",),
            scoring="Perplexity is the exponential of the mean negative log-likelihood of a token, "
            "documents scored in {windows}: every token is predicted once, and the last window of "
            "a document is filled up with earlier tokens, which are read and not scored.",
            absent="running text",
        ),
        Task(
            "multiple_choice",
            words="multiple choice",
            main_metric="accuracy_norm",
            metrics=("accuracy", "accuracy_norm"),
            compared=("accuracy_norm", "accuracy"),
            scoring="Multiple choice takes the continuation with the largest log-likelihood a "
            "character.",
            absent="multiple choice",
        ),
        Task(
            "last_word",
            words="last word",
            main_metric="accuracy",
            metrics=("accuracy", "last_word_perplexity"),
            compared=("accuracy", "nats_per_target"),
            scoring="A last word counts if greedy decoding gives it.",
            absent="last words",
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
        citation: what follows its label where it is cited.
        chance: accuracy of guessing; 0 where guessing gets nothing right.
    """

    name: str
    label: str
    task: str
    citation: str
    chance: float = 0.0


DATASETS: Mapping[str, Dataset] = _by_name(
    [
        Dataset("wikitext", "WikiText-2", "perplexity", "[@merity2017]"),
        Dataset("wikipedia", "Wikipedia", "perplexity", "passages [collected by @clark2019]"),
        Dataset("hellaswag", "HellaSwag", "multiple_choice", "[@zellers2019]", chance=0.25),
        Dataset("lambada", "LAMBADA", "last_word", "[@paperno2016]"),
    ]
)


def task_of(dataset: str) -> Task:
    """Return the task of an evaluation set."""
    return TASKS[DATASETS[dataset].task]


STATIC_KIND = ControlKind("static", absent="the longer static curve", on_curves=True)
WEIGHTING_KIND = ControlKind(
    "weighting",
    absent="mass-matched weights",
    short="other weights",
    done="With the weights of {base} rescaled to the mass of the token's own top experts",
    meanings={
        "worse": "the rescaled weights cost quality",
        "better": "part of what the strategy loses is due to its smaller weights",
        "none": "nothing shows that the smaller weights matter",
    },
)
RIVAL_KIND = ControlKind(
    "rival",
    absent="rival rules",
    short="another rule",
    done="With the rule of {control} in place of that of {base}",
    meanings={
        "worse": "the rule does worse, at the number of experts that it takes",
        "better": "the rule does better, at the number of experts that it takes",
        "none": "nothing shows that the rule does better or worse, at the number of experts that "
        "it takes",
    },
    on_curves=True,
)
"""The kinds that are no families: points of a static curve, a strategy under other weights than its
family's default, any other strategy. The others belong to the families that make them."""

_TYPICAL_OF_LAYER = "the logit is typical of all (token, expert) pairs of the layer"
_TYPICAL_OF_EXPERT = "the logit is typical of this expert's logits"
_IN_THE_BULK = "the expert belongs to the bulk of this token's experts"

HYPOTHESES: Mapping[str, str] = MappingProxyType(
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
"""The nulls by id: H0 in words. Their classes are in :mod:`moe_routing.routing.nulls`."""
