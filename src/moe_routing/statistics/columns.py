"""The data dictionary: one source for the columns of every table and for ``columns.csv``."""

from __future__ import annotations

from moe_routing.vocabulary import TASKS

_KEY = {
    "strategy": "strategy id",
    "dataset": "evaluation set",
    "metric": "metric that is compared; nats are negative log-likelihoods",
}
_ABOUT = {
    "task": f"{', '.join([*TASKS][:-1])} or {[*TASKS][-1]}",
    "main": "whether the metric stands for its data set where only one is shown",
    "higher_is_better": "orientation of the metric",
    "n_items": "items, the same for baseline and strategy",
    "n_clusters": "clusters of items, the resampling unit",
}
_FAMILY = {
    "family": "tests that are corrected together: the data set, for its main metric (Holm), or "
    "exploratory, all other metrics (Benjamini-Hochberg)",
    "p_adjusted": "p_value adjusted within its family of this table",
}
_VERDICT = {"verdict": "conclusion from p_adjusted and the non-inferiority test"}

_PAIRED = {
    **_KEY,
    **_ABOUT,
    "baseline": "strategy compared with",
    "baseline_value": "value of the baseline",
    "value": "value of the strategy",
    "difference": "value minus baseline_value",
    "low": "lower limit of the difference, by the method in `interval`",
    "high": "upper limit of the difference",
    "interval": "score (Tango 1998, at the effective sample size) or bootstrap-t over clusters",
    "standard_error": "clustered standard error of the difference",
    "design_effect": "proportions: variance of the difference over that of independent items, >= 1",
    "perplexity_ratio": "exp(difference) for nats: perplexity of the strategy over the baseline's",
    "lost": "items that only the baseline gets right",
    "gained": "items that only the strategy gets right",
    "flip_proportion": "proportion of items that are lost or gained",
    "p_mcnemar": "exact McNemar test, which takes items as independent, as a check",
    "p_signed_rank": "Wilcoxon signed-rank test, clusters counting equally, as a check",
    "p_value": "two-sided p-value of no difference, by the procedure in `interval`: at most 1 - "
    "confidence exactly where the interval leaves 0 out",
    **_FAMILY,
    "same_as": "earlier strategy with the same result and the same experts on every item: the same "
    "routing, counted once",
    **_VERDICT,
}

_NONINFERIORITY = {
    **_KEY,
    "main": _ABOUT["main"],
    "margin": "loss that would matter, fixed in the config before the run",
    "loss": "how much worse the strategy is; negative if better",
    "upper_bound": "one-sided upper limit of the loss at level 1 - alpha",
    "alpha": "one-sided level: half of 1 - confidence",
    "test": "score (Tango 1998, at the effective sample size) or bootstrap-t over clusters",
    "p_value": "one-sided p-value of a loss of at least the margin",
    "p_clustered_t": "the same from the clustered standard error and Student's t",
    "p_gain": "one-sided p-value of a gain of at least the margin",
    "p_tost": "two one-sided tests: the larger of p_value and p_gain",
    **_FAMILY,
    "p_tost_adjusted": "p_tost adjusted in the same way",
    "noninferior": "whether p_adjusted <= alpha: no loss as large as the margin",
    "equivalent": "whether p_tost_adjusted <= alpha: neither a loss nor a gain as large as the "
    "margin",
}

_MATCHED = {
    **_KEY,
    "main": _ABOUT["main"],
    "higher_is_better": _ABOUT["higher_is_better"],
    "mean_experts": "mean experts per token of the strategy on this data set",
    "static_family": "family of the static curve, the one with the strategy's own weights: regular "
    "(softmax), normalized (renormalised) or uniform",
    "status": "matched; outside the curve (no static strategies on both sides); no curve (no "
    "static family has its weights); unknown experts",
    "k_low": "experts of the static strategy below",
    "k_high": "experts of the static strategy above",
    "weight_high": "weight of the upper one in the interpolation",
    "value": "value of the strategy",
    "static_value": "static curve, interpolated at mean_experts",
    "difference": "value minus static_value",
    "low": "lower limit of the difference, by the method in `interval`",
    "high": "upper limit of the difference",
    "interval": "score (Tango 1998; on a point of the curve), score, interpolated (both points' "
    "score intervals joined by MOVER, Zou & Donner 2008) or bootstrap-t over clusters",
    "discordant": "for proportions: items whose result differs from the static one",
    "chord_excess": "how much worse the interpolated curve may be than the static curve itself, if "
    "loss is convex in k: down to its neighbouring chords; 0 on a point of the curve; empty where "
    "no chord is beside it",
    "standard_error": "clustered standard error of the difference",
    "p_value": "two-sided p-value of no difference, the inverse of the interval",
    **_FAMILY,
    "verdict": "better or worse than the static curve, identical to it, or inconclusive",
}

_FRONT = {
    "dataset": "evaluation set",
    "strategy": "strategy id; static controls and rivals are among them",
    "metric": "main metric of the data set",
    "higher_is_better": _ABOUT["higher_is_better"],
    "value": "value of the strategy",
    "low": "lower limit: Wilson at the effective sample size, or bootstrap-t over clusters",
    "high": "upper limit",
}
_ON_FRONT = {
    "on_front": "whether no other strategy is as good at lower cost or better at the same cost",
    "front_proportion": "proportion of bootstrap resamples in which it is on the front",
}
_PARETO = {**_FRONT, "mean_experts": "mean experts per token, the cost", **_ON_FRONT}
_PARETO_TIME = {
    **_FRONT,
    "seconds_per_1000_tokens": "median time of timing.csv, the cost; differs between equal runs",
    **_ON_FRONT,
}

_DETECTABLE = {
    "minimum_detectable_difference": "true difference found with a probability of 80 %",
}
_POWER = {
    "dataset": "evaluation set",
    "metric": "metric that is compared, a proportion",
    "discordance": "assumed proportion of items on which baseline and strategy disagree",
    "n_items": _ABOUT["n_items"],
    "n_clusters": _ABOUT["n_clusters"],
    **_DETECTABLE,
    "margin": "non-inferiority margin, for comparison",
    "power": "probability of finding it",
    "alpha": "two-sided level of a single test; correction for multiplicity needs more",
}

_PRIMARY = {
    "order": "place in the declared sequence, 1 for the primary contrast",
    "confirmatory": "whether every earlier contrast showed a difference; else exploratory",
    **_KEY,
    "against": "strategy compared with",
    "n_items": _ABOUT["n_items"],
    "n_clusters": _ABOUT["n_clusters"],
    "higher_is_better": _ABOUT["higher_is_better"],
    "mean_experts": "mean experts per token of the strategy, every token that was processed",
    "against_mean_experts": "the same for the strategy compared with",
    "against_value": "value of the strategy compared with",
    "value": "value of the strategy",
    "difference": "value minus against_value",
    "low": "lower limit of the difference, by the method in `interval`",
    "high": "upper limit of the difference",
    "interval": _PAIRED["interval"],
    "standard_error": _PAIRED["standard_error"],
    "lost": "items that only the strategy compared with gets right",
    "gained": _PAIRED["gained"],
    "p_value": _PAIRED["p_value"],
    "margin": _NONINFERIORITY["margin"],
    "p_noninferior": "one-sided p-value of a loss of at least the margin",
    "p_tost": _NONINFERIORITY["p_tost"],
    "equivalent": "whether p_tost is at most half of 1 - confidence: a difference of the margin is "
    "ruled out in both directions",
    "identical": "whether every item has the same result",
    "verdict": "conclusion from p_value and p_noninferior",
    "pilot": "two controls at the same mean experts, whose differences give the spread under small "
    "effects",
    "pilot_standard_error": "clustered standard error of their difference",
    **_DETECTABLE,
}

_CONTROLS = {
    "strategy": "the control: strategy id",
    "kind": "static (a point of a static curve); what of the base is replaced (shuffle: which "
    "token gets how many experts; layermean: every token its layer's mean number; randomid: which "
    "experts; weighting: how they are weighted); or rival (another rule, with the number of "
    "experts that it chooses), which is compared in matched_compute.csv too",
    "base": "strategy compared with: the one that the control changes, or the study's baseline",
    "dataset": _KEY["dataset"],
    "metric": _KEY["metric"],
    "n_items": "items, the same for base and control",
    "n_clusters": _ABOUT["n_clusters"],
    "base_value": "value of the base",
    "control_value": "value of the control",
    "difference": "control_value minus base_value",
    "low": "lower limit of the difference, by the method of paired.csv",
    "high": "upper limit of the difference",
    "standard_error": "clustered standard error of the difference",
    "p_value": "two-sided p-value of no difference, as in paired.csv",
    **_FAMILY,
    "higher_is_better": _ABOUT["higher_is_better"],
    "identical": "whether every item has the same result",
    "verdict": "conclusion about the control against its base, as in paired.csv",
    "base_mean_experts": "mean experts per token of the base on this data set",
    "control_mean_experts": "the same for the control",
}

_NUMERICS = {
    "arm": "name of the numerics arm: the baseline with one setting changed",
    "changed": "the setting",
    "dataset": _KEY["dataset"],
    "metric": _KEY["metric"],
    "n_items": "items, the same in both",
    "baseline_value": "value of the baseline as the study runs it",
    "arm_value": "value of the baseline under the changed setting",
    "difference": "arm_value minus baseline_value",
    "low": "lower limit of the difference, by the method of paired.csv",
    "high": "upper limit of the difference",
    "flips": "items that are right in one and wrong in the other; empty for nats",
    "largest_item_difference": "largest change of an item's log-likelihood, nats",
}

_BUDGETS = {
    "strategy": "strategy id",
    "dataset": "evaluation set",
    "rule": "how the number of experts is chosen",
    "score": "what ranks experts",
    "candidates": "which experts may be selected: all, or the model's own choice",
    "dropped": "what stands in for an expert of the model's own choice that is not selected",
    "scale": "as is, or fitted: the experts' output multiplied by one number fitted on calibration "
    "text, the reference's too",
    "budget": "experts per token and layer in the id; empty where it names none",
    "parameter": "parameter of the rule that was fitted to the budget on calibration text",
    "fitted_value": "its value",
    "realised_calibration": "mean experts per token and layer there",
    "mean_experts": "mean experts per token and layer on this data set, every processed token",
    "metric": "main metric of the data set",
    "reference": "what the loss is over: the baseline, at its own fitted scale for fitted rows; "
    "for the scaled baseline, the baseline",
    "value": "value of the strategy",
    "loss_over_stock": "how much worse than the reference; negative if better",
    "low": "lower limit of that loss: bootstrap-t over clusters, for proportions score",
    "high": "upper limit of that loss",
    "p_stock": "two-sided p-value of no difference from the reference, the inverse of the interval",
    "p_stock_adjusted": "p_stock adjusted by Holm within the data set",
    "versus_static": "how much worse than a fixed number of experts at the same mean experts, on "
    "the straight line between its settings; negative if better; empty for fixed numbers",
    "static_low": "lower limit of versus_static",
    "static_high": "upper limit of versus_static",
    "chord_excess": _MATCHED["chord_excess"],
    "p_value": "two-sided p-value of no difference from the fixed number",
    "p_adjusted": "p_value adjusted by Holm within the data set",
    "verdict": "better or worse than the fixed number, identical to it, or inconclusive",
    "same_as": _PAIRED["same_as"],
    "n_items": _ABOUT["n_items"],
    "n_clusters": _ABOUT["n_clusters"],
}

_LEVERS = {
    "lever": "what is changed: score (which experts), tokens (for which tokens), substitute (what "
    "stands in for a dropped one), weights",
    "strategy": "strategy id, with the lever",
    "without": "the rule without the lever, in words",
    "dataset": "evaluation set",
    "metric": "main metric of the data set",
    "scale": _BUDGETS["scale"],
    "budget": _BUDGETS["budget"],
    "mean_experts": _BUDGETS["mean_experts"],
    "difference": "how much worse with the lever than without it at the same mean experts, on the "
    "straight line between settings; negative if better",
    "low": "lower limit of the difference, as in matched_budgets.csv",
    "high": "upper limit of the difference",
    "chord_excess": _MATCHED["chord_excess"],
    "p_value": "two-sided p-value of no difference",
    "p_adjusted": "p_value adjusted by Holm within the data set",
    "verdict": "better or worse with the lever, identical, or inconclusive",
}

_TIMING = {
    "strategy": "strategy id",
    "repeats": "interleaved repeats",
    "median_seconds": "median seconds for the fixed text",
    "low": "lower limit, percentile bootstrap over repeats",
    "high": "upper limit",
    "seconds_per_1000_tokens": "median seconds per 1,000 tokens",
    "ratio": "median over repeats of the ratio to the baseline in the same repeat",
    "ratio_low": "lower limit of the ratio",
    "ratio_high": "upper limit of the ratio",
}

_MISSING = {
    "dataset": "evaluation set; empty if it lacks on all of them",
    "strategy": "strategy id",
    "reason": "why it is not in the tables",
}

TABLES = {
    "paired": _PAIRED,
    "noninferiority": _NONINFERIORITY,
    "matched_compute": _MATCHED,
    "pareto": _PARETO,
    "pareto_time": _PARETO_TIME,
    "power": _POWER,
    "primary": _PRIMARY,
    "controls": _CONTROLS,
    "numerics": _NUMERICS,
    "matched_budgets": _BUDGETS,
    "levers": _LEVERS,
    "timing": _TIMING,
    "missing": _MISSING,
}
"""Every table under ``statistics/``: its columns in order, and what each means."""

ITEMS = {
    "id": "item",
    "cluster": "items of one cluster are not independent",
    "log_likelihood": "of the document, the last word or the right choice, nats",
    "tokens": "number of scored tokens",
    "words": "words of the document, for word perplexity",
    "bytes": "bytes of the document, for byte perplexity",
    "correct": "whether the item is answered right; empty for documents",
    "correct_norm": "the same by log-likelihood per character; empty except for multiple choice",
    "greedy": "whether every scored token is the model's most likely one; empty for documents",
    "gold_bytes": "UTF-8 bytes of the right continuation, without the space before it; empty for "
    "documents",
    "gold_bits_per_byte": "-log2 of its likelihood, per byte; empty for documents",
    "gold_margin": "its log-likelihood minus that of the best wrong continuation, nats; empty "
    "except for multiple choice",
    "log_likelihoods": "log-likelihoods of all continuations, nats, in the order of the item",
    "mean_experts": "experts per token and layer over the tokens read for the item",
    "kl": "KL(baseline || strategy) of the next token's distribution, nats, summed over the scored "
    "tokens; empty where not measured; the mean per token is sum(kl) / sum(tokens) over the others",
}
"""Columns of ``cells/<strategy>/<dataset>.parquet``; those of ``numerics/`` lack ``kl``."""
