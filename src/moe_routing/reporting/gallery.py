"""The figures of the manuscript: file, caption, alternative text, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass

from moe_routing.reporting.findings import CELLS
from moe_routing.reporting.plots import CAPTIONS, FOLDER


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        path: PNG under the results folder.
        caption: what it shows.
        alt: what a reader who cannot see it should know of its make-up.
        source: file that its numbers stand in.
        needs: what is missing where it was not drawn.
    """

    path: str
    caption: str
    alt: str
    source: str
    needs: str


def _comparison(name: str, alt: str, source: str, needs: str) -> Picture:
    return Picture(f"{FOLDER}/{name}.png", CAPTIONS[name], alt, source, needs)


def _analysis(folder: str, name: str, caption: str, alt: str, source: str) -> Picture:
    needs = f"the analysis {folder}/ was not made"
    return Picture(f"{folder}/{folder}_plots/{name}.png", caption, alt, f"{folder}/{source}", needs)


GALLERY: dict[str, Picture] = {
    "fig-pareto": _comparison(
        "pareto",
        "One panel a data set: mean experts a token across, quality up, one marker and line a "
        "family of strategies, the static curve in black, vertical bars for intervals, a grey "
        "step for the Pareto front.",
        CELLS,
        "the table of cells was not plotted",
    ),
    "fig-forest": _comparison(
        "forest",
        "One panel a data set, one row a strategy: the paired difference from the baseline with a "
        "horizontal interval; the side of losses beyond the margin is shaded.",
        "statistics/paired.csv",
        "there are no paired comparisons",
    ),
    "fig-layers": _comparison(
        "experts_by_layer",
        "One panel a family and data set: layer across, mean experts a token up, one line a "
        "strategy.",
        "cells/<strategy>/<dataset>.json",
        "no strategy of this run varies its number of experts",
    ),
    "fig-tokens": _comparison(
        "experts_per_token",
        "One panel a family and data set: number of experts across, cumulative share of decisions "
        "up, one step line a strategy.",
        "cells/<strategy>/<dataset>.json",
        "no strategy of this run varies its number of experts",
    ),
    "fig-max-k": _comparison(
        "quality_by_max_k",
        "One panel a data set: most experts a token across, quality up, one line for BH and one "
        "for static top-k, with the mean experts BH used written beside its points.",
        CELLS,
        "this run has no BH settings that differ in max_k alone",
    ),
    "fig-ranks": _comparison(
        "critical_difference",
        "Strategies down, average rank across, with a band around the baseline as wide as the "
        "critical difference.",
        "statistics/friedman.csv",
        "ranks need at least two data sets and three strategies",
    ),
    "fig-speed": _comparison(
        "speed",
        "One panel a data set: mean experts a token across, tokens a second up, one marker and "
        "line a family.",
        CELLS,
        "the table of cells was not plotted",
    ),
    "fig-logits": _analysis(
        "baseline",
        "router_logit_distributions",
        "Router logits of the stock model: density by layer, the mean in black.",
        "One ridge a layer, the first on top: logit across, density up, a dot at the mean.",
        "logit_histogram.csv",
    ),
    "fig-usage": _analysis(
        "baseline",
        "expert_usage",
        "How often the stock router uses each expert.",
        "Layers and experts, with the share of tokens that each expert gets.",
        "expert_usage.csv",
    ),
    "fig-entropy": _analysis(
        "baseline",
        "entropy_by_layer",
        "Entropy of the stock router's softmax by layer, on text and on prompts.",
        "Layer across, entropy up, with a band for the interval and one thin line a prompt.",
        "baseline_routing_stats.csv",
    ),
    "fig-weights": _analysis(
        "baseline",
        "weight_concentration",
        "How concentrated the stock router's weights are, by layer.",
        "Layer across, largest weight and mass of the chosen experts up, with intervals.",
        "baseline_routing_stats.csv",
    ),
    "fig-bh-counts": _analysis(
        "bh",
        "counts_distribution",
        "Experts under BH at the largest max_k: share of decisions with at least c of them, and "
        "their mean by layer.",
        "One column a null, one line an alpha. Above: experts across, share of decisions up. "
        "Below: layer across, mean experts up, a band for 5 to 95 % of the tokens.",
        "bh_counts.csv",
    ),
    "fig-bh-alpha": _analysis(
        "bh",
        "alpha_sensitivity",
        "Mean experts and loss of BH against alpha.",
        "Alpha across, mean experts or loss up, one line a max_k and null.",
        "bh_routing_results.csv",
    ),
    "fig-bh-quality": _analysis(
        "bh",
        "quality_vs_experts",
        "Loss against mean experts: BH at every max_k and alpha, and the static curve.",
        "Mean experts across, loss against the baseline up, the static curve as a line.",
        "bh_routing_results.csv",
    ),
    "fig-bh-topk": _analysis(
        "bh",
        "bh_vs_topk_by_max_k",
        "Mean experts of BH beside top-k at the same limit.",
        "Bars by max_k, one a level alpha, beside a bar for top-k.",
        "bh_routing_results.csv",
    ),
    "fig-bh-heatmap": _analysis(
        "bh",
        "heatmap_alpha_max_k",
        "Mean experts of BH by alpha and max_k.",
        "A grid of alpha and max_k with the mean experts in each field.",
        "bh_routing_results.csv",
    ),
    "fig-bh-saturation": _analysis(
        "bh",
        "saturation_curve",
        "Mean experts of BH as max_k grows, and where it stops mattering.",
        "Max_k across, mean experts up, one line an alpha and null.",
        "bh_saturation.csv",
    ),
    "fig-bh-reduction": _analysis(
        "bh",
        "reduction_percent",
        "Experts saved by BH against the baseline.",
        "Bars by max_k and alpha: share of experts saved.",
        "bh_routing_results.csv",
    ),
    "fig-size": _analysis(
        "validity",
        "size_by_layer",
        "Size of BH where its null holds: share of tokens for which it selects anything.",
        "One panel a null: layer across, share of tokens up, one line a design, and the limit.",
        "size.csv",
    ),
    "fig-bound": _analysis(
        "validity",
        "marginal_bound",
        "How often BH selects anything on real text, and the bound on it for marginal nulls.",
        "One panel a null: alpha across, share of tokens up, with the bound as a line.",
        "binding.csv",
    ),
    "fig-audit": _analysis(
        "audit",
        "false_discoveries",
        "Audit by intervention: chosen experts whose removal changes the loss by less than "
        "a threshold, as a share, against alpha.",
        "One panel a null and threshold: alpha across, share up, with intervals.",
        "audit.csv",
    ),
    "fig-importance": _analysis(
        "audit",
        "weight_importance",
        "How well a router weight predicts what removing its expert does, by layer.",
        "Layer across, rank correlation of weight and change of loss up, with intervals.",
        "weight_importance.csv",
    ),
}
"""By cross-reference label."""
