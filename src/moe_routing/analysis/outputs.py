"""The analyses beside the cells: their files and figures, and the words in their columns.

One list for the workflow, the scripts, the figures and the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_LAYERS = "all"
"""In the column ``layer``: a row about all layers together."""

NO_NULL = "none"
"""In the column ``null``: what the stock router chose, without any test."""

REMOVED, ADDED, EITHER = "removed", "added", "all"
"""In the column ``part``: toggled experts of the model's own choice, the others, or both."""

STOCK, ROUTED = "stock", "routed"
"""In the column ``states``: experts were toggled in the states of the stock model, or of the model
that a strategy routes."""

NATS_PER_TOKEN = ("perplexity", "multiple_choice")
"""Tasks whose loss is in nats per token."""

RULE, ROUTED = "rule", "routed"
"""In the column ``part``: what a procedure selects, and what is routed, floor and cap included."""

BH_RULE, BY_RULE, BLOCK_EXACT = "bh", "by", "block_exact"
"""In the column ``procedure``: BH, BY, and BH with p-values that are valid at any number of
calibration tokens."""

SUM_TO_ZERO = "sum to zero"
"""In the column ``dependence``: each token's noise is centred, as logits that softmax reads are."""

VALID, NOT_SHOWN, NOT_VALID = "valid", "not shown", "not valid"
"""Outcomes of a verdict. Not shown: some layer was above the allowed size, but by no more than
chance explains."""


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: the rule, the folder under ``results/<study>/``, and the module in ``analysis`` and
            ``figures``, which has ``write_<name>`` and ``draw_<name>``.
        title: what it does, for the log of the workflow.
        category: heading of its figures in the Snakemake report.
        settings: parts of the config that it depends on.
        files: tables and records in the folder.
        plots: figures, without suffix, in ``<name>/<name>_plots/``.
        runs_model: whether it loads the model.
        mem_mb: least memory of its job.
    """

    name: str
    title: str
    category: str
    settings: tuple[str, ...]
    files: tuple[str, ...]
    plots: tuple[str, ...]
    runs_model: bool = True
    mem_mb: int = 0

    def file_paths(self, results: str) -> list[str]:
        """Return the paths of the tables and records."""
        return [f"{results}/{self.name}/{name}" for name in self.files]

    def plot_paths(self, results: str, suffix: str) -> list[str]:
        """Return the paths of the figures."""
        return [f"{results}/{self.name}/{self.name}_plots/{plot}.{suffix}" for plot in self.plots]


_INTERVALS = ("analysis.resamples", "statistics.confidence", "seed")
_SCORED = ("model", "evaluation.window", *_INTERVALS)


BASELINE = Analysis(
    "baseline",
    "Observing the stock router",
    "Baseline",
    (*_SCORED, "analysis.baseline"),
    (
        "baseline_routing_stats.csv",
        "baseline_prompts.csv",
        "baseline_findings.json",
        "expert_usage.csv",
        "prompt_usage.csv",
        "logit_histogram.csv",
        "coactivation.csv",
        "domain_specialisation.csv",
        "vocabulary_specialisation.csv",
        "router_logits.safetensors",
    ),
    ("router_logit_distributions", "expert_usage", "entropy_by_layer", "weight_concentration"),
)
BH = Analysis(
    "bh",
    "Routing by BH over max_k, alpha and null",
    "BH routing",
    (*_SCORED, "analysis.bh", "evaluation", "statistics.baseline", "statistics.margin_nats"),
    (
        "bh_routing_results.csv",
        "bh_pivot.csv",
        "bh_pivot.md",
        "bh_counts.csv",
        "binding_by_layer.csv",
        "bh_saturation.csv",
        "bh_static_curve.csv",
        "bh_generation.json",
        "recommendation.json",
        "bh_p_values.parquet",
    ),
    (
        "counts_distribution",
        "alpha_sensitivity",
        "quality_vs_experts",
        "bh_vs_topk_by_max_k",
        "heatmap_alpha_max_k",
        "saturation_curve",
        "reduction_percent",
    ),
)
VALIDITY = Analysis(
    "validity",
    "Verifying the nulls and the error rates of the procedures",
    "Validity",
    ("analysis.validity", "calibration.epsilon", "statistics.primary", *_INTERVALS),
    (
        "verdict.csv",
        "verdict_by_design.csv",
        "designs.csv",
        "size.csv",
        "binding.csv",
        "simulation.csv",
        "false_discoveries.csv",
        "resampled.csv",
        "worst_experts.csv",
        "dead_layers.csv",
        "dead_experts.csv",
        "scores.csv",
    ),
    (
        "false_discoveries",
        "false_discoveries_by_level",
        "dead_experts",
        "size_by_design",
        "marginal_bound",
        "binding_by_layer",
        "simulation",
    ),
    runs_model=False,
    mem_mb=6000,
)
ABLATION = Analysis(
    "ablation",
    "Judging discoveries, and what is left out, by toggled experts",
    "Ablation",
    (
        "analysis.ablation",
        "analysis.held_out.datasets",
        "calibration.epsilon",
        "calibration.nulls",
        "statistics.primary",
        *_INTERVALS,
    ),
    (
        "ablation.csv",
        "left_out.csv",
        "states.csv",
        "needed_experts.csv",
        "class_contrasts.csv",
        "presence.csv",
        "joint_removals.csv",
        "headroom.csv",
    ),
    ("false_discoveries", "needed_experts", "left_out"),
    runs_model=False,
)
CONSEQUENCE = Analysis(
    "consequence",
    "Comparing the effects of removed experts with their weights and the sizes of their outputs",
    "Consequence",
    (),
    ("consequence_law.csv", "rank_correlations.csv", "removals.parquet"),
    ("consequence_law",),
    runs_model=False,
)
ANALYSES = (BASELINE, BH, VALIDITY, ABLATION, CONSEQUENCE)
