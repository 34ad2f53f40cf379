"""Names of data sets, metrics and strategies as readers see them."""

from __future__ import annotations

DATASETS = {
    "wikitext": "WikiText-2",
    "wikipedia": "Wikipedia",
    "hellaswag": "HellaSwag",
    "lambada": "LAMBADA",
}
METRICS = {
    "token_perplexity": "perplexity a token",
    "word_perplexity": "perplexity a word",
    "byte_perplexity": "perplexity a byte",
    "bits_per_byte": "bits a byte",
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy, length-normalised",
    "last_word_perplexity": "perplexity of the last word",
}
HIGHER_IS_BETTER = {
    name: name.startswith("accuracy") for name in METRICS
}  # every other metric is a loss


def dataset_label(name: str) -> str:
    """Return the name of a data set in text: ``hellaswag`` is HellaSwag."""
    return DATASETS.get(name, name)


def metric_label(name: str) -> str:
    """Return the name of a metric in text."""
    return METRICS.get(name, name.replace("_", " "))


def axis_label(metric: str) -> str:
    """Return an axis label that says which way is better."""
    label = metric_label(metric)
    better = "higher" if HIGHER_IS_BETTER.get(metric, False) else "lower"
    return f"{label[0].upper()}{label[1:]}\n({better} is better)"
