"""The figures of the article: file, caption, alternative text, and what each needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_routing.config.cells import UNIQUE_FILE
from moe_routing.config.study import StudyConfig
from moe_routing.reporting.pages import BUDGETS_FILE, CELLS_FILE

COMPARISON = "comparison/comparison_plots"


@dataclass(frozen=True)
class ArticleFigure:
    """A figure of the article.

    Attributes:
        path: PNG under the results folder.
        caption: what it shows.
        alt: a description for readers who cannot see it.
        sources: the files of its numbers.
        needs: what a study lacks in which it is not due.
        planned: whether a complete run of a config has it; None: it is due where a source is.
    """

    path: str
    caption: str
    alt: str
    sources: tuple[str, ...]
    needs: str
    planned: Callable[[StudyConfig], bool] | None = None

    def due(self, config: StudyConfig, results: Path) -> bool:
        """Return whether a study must have it: its config plans it, or its analysis was run."""
        if self.planned:
            return self.planned(config)
        return any((results / source).is_file() for source in self.sources)


def varying(config: StudyConfig) -> list[str]:
    """Return the compared strategies whose number of experts may vary over tokens."""
    parsed = config.parsed
    return [
        name for name in config.strategies if parsed[name].min_experts != parsed[name].max_experts
    ]


def _has_sweep(config: StudyConfig) -> bool:
    """Return whether two BH settings differ in max_k only."""
    from moe_routing.routing.strategies.testing import BH

    compared = [config.parsed[name] for name in config.strategies]
    bh = [strategy for strategy in compared if type(strategy) is BH]
    rest = [(s.alpha, s.null, s.weighting, s.min_k) for s in bh]
    return len(set(rest)) < len(rest)


def _has_budgets(config: StudyConfig) -> bool:
    """Return whether rules are scored at budgets."""
    return bool(config.levers or config.budgets)


def _comparison(
    name: str,
    caption: str,
    alt: str,
    sources: tuple[str, ...],
    needs: str = "the table of cells was not plotted",
    planned: Callable[[StudyConfig], bool] = lambda _: True,
) -> ArticleFigure:
    return ArticleFigure(f"{COMPARISON}/{name}.png", caption, alt, sources, needs, planned)


def _analysis(folder: str, name: str, caption: str, alt: str, *files: str) -> ArticleFigure:
    needs = f"the analysis {folder}/ was not run"
    sources = tuple(f"{folder}/{file}" for file in files)
    return ArticleFigure(f"{folder}/{folder}_plots/{name}.png", caption, alt, sources, needs)


ARTICLE_FIGURES: dict[str, ArticleFigure] = {
    "fig-pareto": _comparison(
        "pareto",
        "Quality against mean experts per token, with intervals. One line is static top-k "
        "with the model's own weights at every k that was scored (the compared strategies and "
        "those of `comparison/controls.csv`), clipped to the range of the strategies. An adaptive "
        "setting with these weights improves on a fixed number of experts if it lies on the better "
        "side of that line. Other lines connect the settings of a family, rivals included. The "
        "grey step is the Pareto front of all settings drawn. The ring marks the baseline; arrows "
        "point to better values.",
        "One panel per data set: mean experts per token on the x-axis, quality on the y-axis, one "
        "marker and line per family of strategies or rival rule, the static curve in black, "
        "vertical bars for intervals, a grey step for the Pareto front, a ring around the "
        "baseline.",
        (CELLS_FILE,),
    ),
    "fig-budgets": _comparison(
        "budgets",
        "What each rule costs at its mean experts per token: loss over the stock model in the main "
        "metric of each set, as is, with intervals. Black: a fixed number of experts, with the "
        "straight line that rules are compared with. Hollow: the mean output stands in for a "
        "dropped expert. Star: certified. Dotted: the margin.",
        "One panel per data set: mean experts per token on the x-axis, loss over the stock model "
        "on the y-axis, a black line for fixed numbers of experts, one marker and line per rule, "
        "vertical bars for intervals.",
        (BUDGETS_FILE,),
        "this run has no rules at matched budgets",
        _has_budgets,
    ),
    "fig-budgets-fitted": _comparison(
        "budgets_fitted",
        "As @fig-budgets, with the experts' output multiplied by one number fitted on calibration "
        "text for each setting, the stock model included.",
        "One panel per data set: mean experts per token on the x-axis, loss over the stock model "
        "at its own fitted scale on the y-axis, markers and lines as in the figure as is.",
        (BUDGETS_FILE,),
        "no rule was scored at fitted scale",
        lambda config: any(name.endswith("_scaled") for name in (*config.levers, *config.budgets)),
    ),
    "fig-unique": _comparison(
        "unique_experts",
        "Distinct experts that a batch of tokens from different documents needs in a layer, mean "
        "over layers and random batches: in decoding, the weights that are read. In brackets: "
        "experts for one token.",
        "Batch size on the x-axis, logarithmic; distinct experts per layer on the y-axis; one line "
        "per strategy.",
        (UNIQUE_FILE,),
        "distinct experts per batch were not measured",
    ),
    "fig-law": _analysis(
        "consequence",
        "consequence_law",
        "The consequence law. Above: KL from the stock predictions for single removed experts "
        "against weight times norm of the output, in three layers; the line is $c_l (g n)^2$, of "
        "slope 2. Below: Spearman's correlation by layer, with KL on the left and with the change "
        "of the realised loss on the right.",
        "Three panels above, one per layer: weight times norm on the x-axis, KL on the y-axis, "
        "both logarithmic, one point per removal and a line of slope 2. Two panels below: layer on "
        "the x-axis, rank correlation on the y-axis, one line each for the router's weight, its "
        "product with the norm and its product with the predicted norm.",
        "removals.parquet",
        "consequence_law.csv",
        "rank_correlations.csv",
    ),
    "fig-forest": _comparison(
        "forest",
        "Paired differences from the baseline with intervals. Filled markers: significant "
        "after correction for multiplicity. Shaded: losses at least as large as the "
        "non-inferiority margin. Axes with wide ranges are linear near 0 and logarithmic beyond.",
        "One panel per data set, one row per strategy: the paired difference from the baseline "
        "with a horizontal interval; losses beyond the margin are shaded.",
        ("statistics/paired.csv", "statistics/noninferiority.csv"),
        "there are no paired comparisons",
        lambda config: len(config.strategies) > 1,
    ),
    "fig-layers": _comparison(
        "experts_by_layer",
        "Mean experts per token in each layer, for strategies with a varying "
        "number of experts; the dotted line is the baseline.",
        "One panel per family and data set: layer on the x-axis, mean experts per token on the "
        "y-axis, one line per strategy.",
        ("cells/<strategy>/<dataset>.json",),
        "no strategy of this run has a varying number of experts",
        lambda config: bool(varying(config)),
    ),
    "fig-tokens": _comparison(
        "experts_per_token",
        "Cumulative distribution of the number of experts over routing decisions "
        "(one token in one layer): proportion of decisions with at most c experts.",
        "One panel per family and data set: number of experts on the x-axis, cumulative proportion "
        "of decisions on the y-axis, one step line per strategy.",
        ("cells/<strategy>/<dataset>.json",),
        "no strategy of this run has a varying number of experts",
        lambda config: bool(varying(config)),
    ),
    "fig-max-k": _comparison(
        "quality_by_max_k",
        "Quality against the maximum number of experts per token: BH at fixed "
        "alpha, and static top-k. Numbers beside the points are the mean experts that BH used.",
        "One panel per data set: maximum experts per token on the x-axis, quality on the y-axis, "
        "one line for static top-k and one for each alpha, null and weighting of BH, with the mean "
        "experts that it used beside its points.",
        (CELLS_FILE,),
        "this run has no BH settings that differ in max_k alone",
        _has_sweep,
    ),
    "fig-usage": _analysis(
        "baseline",
        "expert_usage",
        "How often the stock router uses each expert, relative to uniform use, on text and on the "
        "prompts.",
        "Two heat maps with one row per layer and one column per expert; the colour is an expert's "
        "load relative to the mean load of its layer.",
        "expert_usage.csv",
    ),
    "fig-entropy": _analysis(
        "baseline",
        "entropy_by_layer",
        "Entropy of the stock router's softmax by layer, on text and on prompts.",
        "Layer on the x-axis, entropy on the y-axis: a line with a band for the interval on text, "
        "one thin line per prompt and a dotted line for a uniform router.",
        "baseline_routing_stats.csv",
        "baseline_prompts.csv",
    ),
    "fig-bh-quality": _analysis(
        "bh",
        "quality_vs_experts",
        "Loss relative to the baseline by mean experts: BH at every max_k and alpha, and the "
        "static curve.",
        "Mean experts on the x-axis, loss relative to the baseline on the y-axis (perplexity on "
        "the right); static top-k as a line, BH as points with one colour per alpha and one shape "
        "per null; bars for intervals.",
        "bh_routing_results.csv",
        "bh_static_curve.csv",
    ),
    "fig-bh-saturation": _analysis(
        "bh",
        "saturation_curve",
        "Mean experts of BH as max_k grows, and the max_k at which they reach 95 % of the mean "
        "without a cap (dotted; in the titles, by ascending alpha).",
        "One panel per null, one line per alpha: max_k on the x-axis, mean experts on the y-axis, "
        "markers for runs, a dotted vertical line at saturation.",
        "bh_saturation.csv",
    ),
    "fig-rates": _analysis(
        "validity",
        "false_discoveries",
        "Held-out false discovery rate of BH under `needed` by layer, for three alphas (dotted), "
        "with intervals that resample documents: of the rule, and with floor and cap included. "
        "Grey: smallest to largest rate of the rule over calibrations with resampled documents. "
        "Bars of rare events are cut at the top of a panel.",
        "One row of panels per text, one column per alpha: layer on the x-axis, false discovery "
        "rate on the y-axis, filled and hollow markers with bars for intervals, a grey band on "
        "calibration text and a dotted line at alpha.",
        "false_discoveries.csv",
        "resampled.csv",
    ),
    "fig-rates-level": _analysis(
        "validity",
        "false_discoveries_by_level",
        "Held-out false discovery rate against alpha, mean over layers: BH, BY, and BH with "
        "block-exact p-values. Filled: the rule; hollow: floor and cap included. Rates of 0 and "
        "levels below the resolution of a procedure's p-values are left out.",
        "One panel per text: alpha on the x-axis, false discovery rate on the y-axis, both "
        "logarithmic, one line per procedure and part with bars for intervals, and alpha as a "
        "dotted line.",
        "false_discoveries.csv",
    ),
    "fig-dead": _analysis(
        "validity",
        "dead_experts",
        "Where experts are dead, for three alphas (dotted). Above: all experts of a layer are "
        "dead, and any selection is false; below: some experts of every layer are dead, proportion "
        "of the slots that BH keeps that are not needed, and that are dead; dashed: dead among all "
        "experts. Long bars are cut at the top of a panel.",
        "Two rows of panels, one column per alpha: layer on the x-axis, proportion of tokens with "
        "any selection above and proportion of kept slots below, with bars for intervals and alpha "
        "as a dotted line.",
        "dead_layers.csv",
        "dead_experts.csv",
    ),
    "fig-size": _analysis(
        "validity",
        "size_by_design",
        "Size of BH where a null holds: proportion of tokens for which it selects anything, in the "
        "worst layer, at the alpha of the verdicts. Bold: more than allowed; white: not tested. "
        "Right of the line: if all of the real logits were noise, which takes no part in the "
        "verdicts.",
        "A heat map with one row per null and one column per design; each cell has the largest "
        "size over layers.",
        "verdict_by_design.csv",
    ),
    "fig-bound": _analysis(
        "validity",
        "marginal_bound",
        "How often BH selects anything on real text, and the bound for marginal nulls.",
        "Two panels, calibration text and evaluation text: alpha on the x-axis, proportion of "
        "tokens on the y-axis, one line per null, the bound as a black line and alpha as a dotted "
        "one.",
        "binding.csv",
    ),
    "fig-binding": _analysis(
        "validity",
        "binding_by_layer",
        "What determines the number of experts per token, by layer, on evaluation text at the "
        "alpha of the verdicts: the floor if BH selects nothing, the cap if it selects more than "
        "max_k, otherwise BH.",
        "One panel per null: layer on the x-axis, proportion of tokens on the y-axis, one stacked "
        "bar of floor, BH and cap per layer.",
        "binding.csv",
        "verdict.csv",
    ),
    "fig-simulation": _analysis(
        "validity",
        "simulation",
        "False discovery rate and power of the procedures where the truth is simulated.",
        "One column per dependence, one line per procedure, alpha on the x-axis; for each number "
        "of signals one row for the false discovery rate, with alpha dotted, and one for power.",
        "simulation.csv",
    ),
    "fig-ablation": _analysis(
        "ablation",
        "false_discoveries",
        "What discoveries are worth on held-out text, by null. Left: the false discovery rate by "
        "KL, all discoveries. Middle and right: of the discoveries among the experts of the "
        "model's own choice, the proportions whose removal does not raise the loss of the next "
        "token, or lowers it (harmful); grey: of that whole choice. Above against alpha, with "
        "intervals; below by layer, with the interval of the first null. Dotted: alpha. "
        "Proportions of fewer than 30 discoveries are left out. Points at one alpha are shifted "
        "sideways.",
        "Two rows of three panels, one line per null: alpha on the x-axis above, layer below; the "
        "false discovery rate by KL with alpha dotted, the proportion of false discoveries by "
        "loss, and the proportion of harmful ones, both with a grey band for the model's own "
        "choice.",
        "ablation.csv",
        "states.csv",
    ),
    "fig-left-out": _analysis(
        "ablation",
        "left_out",
        "Beside the false discovery rate. Left: the proportion of needed experts that the study's "
        "BH arm, with floor and cap, leaves out, by layer, and the part of the sum of KLs that "
        "those of the model's own choice have. Middle: KL when all it leaves out of that choice is "
        "removed at once, in one layer or in all, against the sum of single removals. Right: KL at "
        "equal number kept in all layers at one token, by what ranks the experts. Bands and bars: "
        "intervals.",
        "Three panels. Layer on the x-axis: proportion left out of the model's own choice, of all "
        "experts, and of the effects. Layer and all layers on the x-axis: KL of joint removal and "
        "sum of single ones. Experts kept on the x-axis: KL, one line for each of four orders.",
        "left_out.csv",
        "joint_removals.csv",
        "headroom.csv",
    ),
    "fig-needed": _analysis(
        "ablation",
        "needed_experts",
        "N(epsilon): experts of the model's own choice whose removal changes the prediction by a "
        "KL of at least epsilon, per token and layer, on held-out calibration text. Classes are "
        "thirds of the tokens by frequency in calibration text, by position, and by the loss of "
        "the next token, and tokens at the start of a word or inside one. Bands and bars: "
        "intervals.",
        "Layer on the x-axis and needed experts on the y-axis, one line per epsilon; beside it "
        "one row per class of tokens with needed experts on the x-axis, one marker per epsilon.",
        "needed_experts.csv",
    ),
}
"""By cross-reference label."""

DRAWN_BY = {
    "fig-budgets": "comparison",
    "fig-pareto": "comparison",
    "fig-forest": "comparison",
    "fig-layers": "comparison",
    "fig-tokens": "comparison",
    "fig-max-k": "comparison",
    "fig-usage": "baseline",
    "fig-entropy": "baseline",
    "fig-bh-quality": "bh_routing",
    "fig-bh-saturation": "bh_routing",
}
"""The notebook that draws a figure too, by the figure's label."""

CAPTIONS = {
    Path(figure.path).stem: figure.caption for figure in ARTICLE_FIGURES.values() if figure.planned
}
"""The captions of the comparison's figures, by file name without suffix."""


def captions_in(folder: str) -> dict[str, str]:
    """Return the captions of the figures in a folder as reStructuredText, by file name.

    >>> captions_in("validity/validity_plots")["marginal_bound"]
    'How often BH selects anything on real text, and the bound for marginal nulls.'
    """
    figures = (
        figure for figure in ARTICLE_FIGURES.values() if figure.path.startswith(f"{folder}/")
    )
    return {Path(figure.path).stem: _as_rst(figure.caption) for figure in figures}


def _as_rst(caption: str) -> str:
    caption = re.sub(r"`([^`]+)`", r"``\1``", caption)
    caption = re.sub(r"\$([^$]+)\$", r":math:`\1`", caption)
    return re.sub(
        r"@(fig-[\w-]+)", lambda at: f"in *{Path(ARTICLE_FIGURES[at[1]].path).stem}*", caption
    )


def planned(config: StudyConfig) -> list[str]:
    """Return the figures of the comparison that a complete run of a config has."""
    return [
        Path(figure.path).stem
        for figure in ARTICLE_FIGURES.values()
        if figure.planned and figure.planned(config)
    ]
