"""The figures of the manuscript: file, caption, alternative text, and what each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_routing.reporting.findings import CELLS_FILE
from moe_routing.reporting.plots import CAPTIONS, FOLDER, planned

if TYPE_CHECKING:
    from moe_routing.reporting.results import StudyResults


@dataclass(frozen=True)
class ArticleFigure:
    """A figure.

    Attributes:
        path: PNG under the results folder.
        caption: what it shows.
        alt: what a reader who cannot see it should know of its make-up.
        sources: files that its numbers stand in.
        needs: what is missing where it is not due.
        due: whether a study must have it: its config plans it, or its analysis was made.
    """

    path: str
    caption: str
    alt: str
    sources: tuple[str, ...]
    needs: str
    due: Callable[[StudyResults], bool]


def _comparison(name: str, alt: str, sources: tuple[str, ...], needs: str) -> ArticleFigure:
    def due(study: StudyResults) -> bool:
        return name in planned(study.config)

    return ArticleFigure(f"{FOLDER}/{name}.png", CAPTIONS[name], alt, sources, needs, due)


def _analysis(folder: str, name: str, caption: str, alt: str, *files: str) -> ArticleFigure:
    needs = f"the analysis {folder}/ was not made"
    sources = tuple(f"{folder}/{file}" for file in files)

    def due(study: StudyResults) -> bool:
        return any((study.folder / source).is_file() for source in sources)

    return ArticleFigure(f"{folder}/{folder}_plots/{name}.png", caption, alt, sources, needs, due)


ARTICLE_FIGURES: dict[str, ArticleFigure] = {
    "fig-pareto": _comparison(
        "pareto",
        "One panel per data set: mean experts per token across, quality up, one marker and line a "
        "family of strategies or rival rule, the static curve in black, vertical bars for "
        "intervals, a grey step for the Pareto front, a ring around the baseline.",
        (CELLS_FILE,),
        "the table of cells was not plotted",
    ),
    "fig-forest": _comparison(
        "forest",
        "One panel per data set, one row per strategy: the paired difference from the baseline "
        "with a horizontal interval; the side of losses beyond the margin is shaded.",
        ("statistics/paired.csv", "statistics/noninferiority.csv"),
        "there are no paired comparisons",
    ),
    "fig-layers": _comparison(
        "experts_by_layer",
        "One panel per family and data set: layer across, mean experts per token up, one line a "
        "strategy.",
        ("cells/<strategy>/<dataset>.json",),
        "no strategy of this run varies its number of experts",
    ),
    "fig-tokens": _comparison(
        "experts_per_token",
        "One panel per family and data set: number of experts across, cumulative proportion of "
        "decisions up, one step line per strategy.",
        ("cells/<strategy>/<dataset>.json",),
        "no strategy of this run varies its number of experts",
    ),
    "fig-max-k": _comparison(
        "quality_by_max_k",
        "One panel per data set: most experts per token across, quality up, one line for static "
        "top-k and one for each alpha, null and weighting of BH, with the mean experts it used "
        "written beside its points.",
        (CELLS_FILE,),
        "this run has no BH settings that differ in max_k alone",
    ),
    "fig-ranks": _comparison(
        "critical_difference",
        "Strategies down, average rank across, with a band that reaches one critical difference to "
        "either side of the baseline, and bars that join strategies that cannot be told apart.",
        ("statistics/friedman.csv",),
        "ranks need at least two data sets and three strategies",
    ),
    "fig-speed": _comparison(
        "speed",
        "One panel per data set: mean experts per token across, tokens per second up, one marker "
        "and line per family, a ring around the baseline.",
        (CELLS_FILE,),
        "the table of cells was not plotted",
    ),
    "fig-logits": _analysis(
        "baseline",
        "router_logit_distributions",
        "Router logits of the stock model: density by layer on text, its mean in black, and the "
        "means of the prompts.",
        "One ridge per layer, the first on top: logit across, density up, a black dot at the mean, "
        "a mark for the mean of each prompt.",
        "logit_histogram.csv",
        "baseline_routing_stats.csv",
    ),
    "fig-usage": _analysis(
        "baseline",
        "expert_usage",
        "How often the stock router uses each expert, relative to uniform use, on text and on the "
        "prompts.",
        "Two maps, layers down and experts across; the colour is an expert's load over the mean "
        "load of its layer.",
        "expert_usage.csv",
    ),
    "fig-entropy": _analysis(
        "baseline",
        "entropy_by_layer",
        "Entropy of the stock router's softmax by layer, on text and on prompts.",
        "Layer across, entropy up, with a band for the interval on text, one thin line per prompt "
        "and a dotted line for a uniform router.",
        "baseline_routing_stats.csv",
        "baseline_prompts.csv",
    ),
    "fig-weights": _analysis(
        "baseline",
        "weight_concentration",
        "How concentrated the stock router's weights are, by layer.",
        "Two panels, the largest weight and the mass of the chosen experts: layer across, "
        "probability up, a band for the interval on text and a grey one for the range of prompts.",
        "baseline_routing_stats.csv",
        "baseline_prompts.csv",
    ),
    "fig-bh-counts": _analysis(
        "bh",
        "counts_distribution",
        "Experts under BH at the largest max_k: proportion of decisions with at least c of them, "
        "and their mean by layer.",
        "One column per null, one line per alpha. Above: experts across, proportion of decisions "
        "up. Below: layer across, mean experts up, a band for 5 to 95 % of the tokens at the "
        "middle alpha.",
        "bh_counts.csv",
    ),
    "fig-bh-alpha": _analysis(
        "bh",
        "alpha_sensitivity",
        "Mean experts of BH, and its loss against the baseline, by alpha.",
        "One column per null, one line per max_k: alpha across; above mean experts up, below the "
        "loss up, with bars for intervals.",
        "bh_routing_results.csv",
    ),
    "fig-bh-quality": _analysis(
        "bh",
        "quality_vs_experts",
        "Loss against the baseline by mean experts: BH at every max_k and alpha, and the static "
        "curve.",
        "Mean experts across, loss against the baseline up (perplexity on the right); static top-k "
        "as a line, BH as points with a colour per alpha and a shape per null; bars for intervals.",
        "bh_routing_results.csv",
        "bh_static_curve.csv",
    ),
    "fig-bh-topk": _analysis(
        "bh",
        "bh_vs_topk_by_max_k",
        "Mean experts of BH beside top-k at the same limit.",
        "One panel per null: max_k across, mean experts as bars, one for top-k beside one for each "
        "alpha.",
        "bh_routing_results.csv",
    ),
    "fig-bh-heatmap": _analysis(
        "bh",
        "heatmap_alpha_max_k",
        "Mean experts and perplexity of BH by alpha and max_k.",
        "One column per null, mean experts above and perplexity below: a grid of alpha and max_k "
        "with the number in each field.",
        "bh_routing_results.csv",
    ),
    "fig-bh-saturation": _analysis(
        "bh",
        "saturation_curve",
        "Mean experts of BH as max_k grows, and the max_k at which they reach 95 % of the mean "
        "without a limit.",
        "One panel per null, one line per alpha: max_k across, mean experts up, marks for runs, a "
        "dotted vertical line at saturation.",
        "bh_saturation.csv",
    ),
    "fig-bh-reduction": _analysis(
        "bh",
        "reduction_percent",
        "Experts saved by BH against top-k at k = max_k.",
        "One panel per null: max_k across, the proportion of experts saved as bars, one for each "
        "alpha.",
        "bh_routing_results.csv",
    ),
    "fig-size": _analysis(
        "validity",
        "size_by_layer",
        "Size of BH where its null holds: proportion of tokens for which it selects anything, "
        "largest over designs, at the alpha of the verdicts. Bold: more than allowed.",
        "A map, nulls down and layers across, with the largest size over designs in each field.",
        "size.csv",
        "verdict.csv",
    ),
    "fig-bound": _analysis(
        "validity",
        "marginal_bound",
        "How often BH selects anything on real text, and the bound on it for marginal nulls.",
        "Two panels, calibration text and evaluation text: alpha across, proportion of tokens up, "
        "one line per null, the bound as a black line and alpha as a dotted one.",
        "binding.csv",
    ),
    "fig-binding": _analysis(
        "validity",
        "binding_by_layer",
        "What decides how many experts per token gets, by layer, on evaluation text at the alpha "
        "of the verdicts: the floor where BH selects nothing, the limit where it selects more than "
        "allowed, or BH.",
        "One panel per null: layer across, proportion of tokens up, a stacked bar of floor, BH and "
        "limit for each layer.",
        "binding.csv",
        "verdict.csv",
    ),
    "fig-simulation": _analysis(
        "validity",
        "simulation",
        "False discovery rate and power of the procedures where the truth is simulated.",
        "One column per correlation, one line a procedure, alpha across; for each number of "
        "signals a row for the false discovery rate, with alpha itself dotted, and one for power.",
        "simulation.csv",
    ),
    "fig-ablation": _analysis(
        "ablation",
        "false_discoveries",
        "expert ablation: experts that the stock router chose and a null calls discoveries, "
        "whose removal from the stock model changes the loss by less than epsilon, as a "
        "proportion, by alpha. Grey: all experts that the stock router chose.",
        "One column an epsilon, one line per null: alpha across, with bars for intervals; above "
        "the proportion of false ones among discoveries, below the false discovery rate; a grey "
        "band for the stock router and a dotted line for alpha.",
        "ablation.csv",
    ),
    "fig-importance": _analysis(
        "ablation",
        "weight_importance",
        "How well a router weight predicts what removing its expert does, by layer.",
        "Layer across, rank correlation of weight and size of the change of loss up, with "
        "intervals.",
        "weight_importance.csv",
    ),
}
"""By cross-reference label."""
