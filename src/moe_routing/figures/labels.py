"""Names of data sets, metrics and strategies as readers see them."""

from __future__ import annotations

DATASETS = {
    "wikitext": "WikiText-2",
    "wikipedia": "Wikipedia",
    "hellaswag": "HellaSwag",
    "lambada": "LAMBADA",
}
FAMILIES = {
    "regular": "Top-k, softmax",
    "normalized": "Top-k, renormalised",
    "uniform": "Top-k, uniform",
    "adaptive": "Adaptive",
    "bh": "Benjamini-Hochberg",
    "by": "Benjamini-Yekutieli",
    "ebh": "e-BH",
    "storey": "Storey",
    "hc": "Higher Criticism",
    "threshold": "Per-expert threshold",
    "minp": "Ratio (min-p)",
    "topp": "Top-p",
    "entropy": "Entropy bands",
    "perlayer": "Per-layer k",
    "dynskip": "Dynamic skipping",
    "shuffle": "Control: counts shuffled",
    "layermean": "Control: layer means",
    "randomid": "Control: random experts",
    "weighting": "Control: mass-matched weights",
}
METRICS = {
    "token_perplexity": "perplexity a token",
    "word_perplexity": "perplexity a word",
    "byte_perplexity": "perplexity a byte",
    "bits_per_byte": "bits a byte",
    "accuracy": "accuracy",
    "accuracy_norm": "length-normalised accuracy",
    "last_word_perplexity": "perplexity of the last word",
    "nats_per_token": "nats a token",
    "nats_per_target": "nats a last word",
    "kl_from_baseline": "KL from the baseline, nats a token",
}
HIGHER_IS_BETTER = {
    name: name.startswith("accuracy") for name in METRICS
}  # every other metric is a loss


def family_label(name: str) -> str:
    """Return the name of a family of strategies."""
    return FAMILIES.get(name, name)


def dataset_label(name: str) -> str:
    """Return the name of a data set in text: ``hellaswag`` is HellaSwag."""
    return DATASETS.get(name, name)


def metric_label(name: str) -> str:
    """Return the name of a metric in text."""
    return METRICS.get(name, name.replace("_", " "))


def metric_direction(metric: str) -> str:
    """Return the name of a metric and which way is better, for axes and column heads."""
    better = "higher" if HIGHER_IS_BETTER.get(metric, False) else "lower"
    return f"{metric_label(metric)} ({better} is better)"
