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
    "family": "primary (the contrast declared in the config, on its data set's main metric: one "
    "test per table) or exploratory (all others, those of matched_compute.csv included)",
    "p_adjusted": "p_value adjusted within its family of this table: Holm (of a single test: "
    "p_value itself) or Benjamini-Hochberg",
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
    "bootstrap_low": "lower limit, cluster bootstrap (proportions: percentile; nats: bootstrap-t)",
    "bootstrap_high": "upper limit, cluster bootstrap",
    "standard_error": "clustered standard error of the difference",
    "design_effect": "proportions: variance of the difference over that of independent items, >= 1",
    "perplexity_ratio": "exp(difference) for nats: perplexity of the strategy over the baseline's",
    "lost": "items that only the baseline gets right",
    "gained": "items that only the strategy gets right",
    "flip_proportion": "proportion of items that are lost or gained",
    "p_mcnemar": "exact McNemar test, which takes items as independent",
    "p_sign_flip": "permutation of names within clusters",
    "p_signed_rank": "Wilcoxon signed-rank test, clusters counting equally",
    "test": "which of them is p_value: McNemar for proportions if each item is a cluster",
    "p_value": "two-sided p-value of no difference",
    **_FAMILY,
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
    "p_value": "two-sided p-value of no difference; for proportions exact McNemar on a point of "
    "the curve if items are their own clusters, and the inverse of the interval between two "
    "points; else permutation of names within clusters",
    **_FAMILY,
    "verdict": "better or worse than the static curve, identical to it, or inconclusive",
}

_FRIEDMAN = {
    "strategy": "strategy id",
    "average_rank": "mean rank over data sets on their main metrics; 1 is best",
    "p_nemenyi": "Nemenyi test against the baseline",
    "beyond_critical_difference": "whether the average rank differs from the baseline's by more "
    "than critical_difference",
    "n_datasets": "data sets ranked",
    "n_strategies": "strategies ranked: those with every data set",
    "chi2": "Friedman's statistic",
    "p_friedman": "its p-value, chi-squared with n_strategies - 1 degrees of freedom",
    "f": "Iman and Davenport's statistic",
    "p_iman_davenport": "its p-value",
    "critical_difference": "Nemenyi's critical difference of average ranks",
    "warning": "low power where data sets are few",
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
    "seconds_per_1000_tokens": "measured scoring time, the cost; differs between equal runs",
    **_ON_FRONT,
}

_POWER = {
    "dataset": "evaluation set",
    "metric": "metric that is compared",
    "basis": "assumed discordance, or the standard error observed for `strategy`",
    "strategy": "strategy id where the basis is observed",
    "discordance": "proportion of items on which baseline and strategy disagree",
    "n_items": _ABOUT["n_items"],
    "n_clusters": _ABOUT["n_clusters"],
    "standard_error": "clustered standard error, where observed",
    "minimum_detectable_difference": "true difference found with probability `power`",
    "margin": "non-inferiority margin, for comparison",
    "power": "probability of finding it",
    "alpha": "two-sided level: the one at which the primary contrast is tested; correction for "
    "multiplicity makes exploratory contrasts need more",
}

_PRIMARY = {
    **_PAIRED,
    "margin": _NONINFERIORITY["margin"],
    "loss": _NONINFERIORITY["loss"],
    "upper_bound": _NONINFERIORITY["upper_bound"],
    "p_noninferiority": "p_adjusted of noninferiority.csv",
    "noninferior": _NONINFERIORITY["noninferior"],
    "equivalent": _NONINFERIORITY["equivalent"],
    "mean_experts": "mean experts per token of the strategy on this data set",
    "baseline_mean_experts": "the same for the baseline",
    "matched_status": "status of matched_compute.csv; empty for a point of a static curve",
    "matched_static_family": "static_family of matched_compute.csv",
    "matched_k_low": "experts of the static strategy below",
    "matched_k_high": "experts of the static strategy above",
    "matched_difference": "difference from the static curve at mean_experts",
    "matched_low": "its lower limit",
    "matched_high": "its upper limit",
    "matched_p_adjusted": "p_adjusted of matched_compute.csv",
    "matched_chord_excess": "chord_excess of matched_compute.csv",
    "matched_verdict": "verdict of matched_compute.csv",
    "minimum_detectable_difference": "from the observed standard error, power.csv",
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
    "p_value": "two-sided p-value of no difference, by the test of paired.csv",
    "p_adjusted": "p_value adjusted over this table: Benjamini-Hochberg",
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

_LEVERS = {
    **_KEY,
    "reference": "strategy compared with: the baseline, scaled too where the strategy is; of the "
    "scaled baseline, the baseline",
    "score": "what ranks experts",
    "candidates": "which experts may be selected: all, or the model's own choice",
    "dropped": "what stands in for an expert of the model's own choice that is not selected",
    "scale": "whether the experts' output is multiplied by one number fitted on calibration text",
    "mean_experts": "mean experts per token and layer",
    "value": "loss of the strategy; of a multiple choice, that of the right one",
    "reference_value": "loss of the reference",
    "difference": "value minus reference_value",
    "low": "lower limit of the difference, bootstrap-t over clusters",
    "high": "upper limit of the difference",
    "p_value": "two-sided p-value of no difference, permutation of names within clusters; not "
    "adjusted",
    "n_items": _ABOUT["n_items"],
    "n_clusters": _ABOUT["n_clusters"],
}

_MISSING = {
    "dataset": "evaluation set",
    "strategy": "strategy id",
    "reason": "why it is not in the tables",
}

TABLES = {
    "paired": _PAIRED,
    "noninferiority": _NONINFERIORITY,
    "matched_compute": _MATCHED,
    "friedman": _FRIEDMAN,
    "pareto": _PARETO,
    "pareto_time": _PARETO_TIME,
    "power": _POWER,
    "primary": _PRIMARY,
    "controls": _CONTROLS,
    "numerics": _NUMERICS,
    "levers": _LEVERS,
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
