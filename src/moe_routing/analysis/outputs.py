"""Which files each analysis makes, and the words in their columns.

One list for the workflow, the scripts, the figures and the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_LAYERS = "all"
"""In the column ``layer``: a row about all layers together."""

NO_NULL = "none"
"""In the column ``null``: what the stock router chose, without any test."""

VALID, NOT_SHOWN, NOT_VALID = "valid", "not shown", "not valid"
"""Outcomes of a verdict. Not shown: some layer was above the allowed size, by no more than chance
may put it; that is neither a size that holds nor one that is broken."""


@dataclass(frozen=True)
class Outputs:
    """The files of one analysis.

    Attributes:
        folder: folder under ``results/<study>/``.
        files: tables and records in it.
        plots: figures, without suffix, in ``<folder>/<folder>_plots/``.
    """

    folder: str
    files: tuple[str, ...]
    plots: tuple[str, ...]

    def file_paths(self, results: str) -> list[str]:
        """Return the paths of the tables and records."""
        return [f"{results}/{self.folder}/{name}" for name in self.files]

    def plot_path(self, results: str, plot: str, suffix: str) -> str:
        """Return the path of a figure."""
        return f"{results}/{self.folder}/{self.folder}_plots/{plot}.{suffix}"


BASELINE = Outputs(
    "baseline",
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
BH = Outputs(
    "bh",
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
VALIDITY = Outputs(
    "validity",
    (
        "verdict.csv",
        "verdict_by_design.csv",
        "designs.csv",
        "size.csv",
        "pvalue_histogram.csv",
        "pvalue_qq.csv",
        "binding.csv",
        "simulation.csv",
    ),
    (
        "size_by_layer",
        "marginal_bound",
        "binding_by_layer",
        "simulation",
    ),
)
ABLATION = Outputs(
    "ablation",
    ("ablation.csv", "removals.parquet", "discoveries.parquet", "weight_importance.csv"),
    ("false_discoveries",),
)
