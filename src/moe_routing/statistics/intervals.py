"""The metrics of one cell, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from moe_routing.errors import InputError
from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval
from moe_routing.statistics.estimate import Estimate
from moe_routing.statistics.proportions import clustered_wilson
from moe_routing.vocabulary import DIVERGENCE, METRICS, TASKS, Metric

SCALES: dict[str | None, Callable[[float], float]] = {
    None: lambda nats: nats,
    "exp": np.exp,
    "bits": lambda nats: nats / np.log(2),
}
"""Maps from nats per unit to a metric, by the name that the vocabulary gives them."""


def metric_intervals(
    items: pd.DataFrame, task: str, *, confidence: float, resamples: int, rng: np.random.Generator
) -> list[Estimate]:
    """Return every metric of a cell with its interval.

    Proportions of correct items get Wilson's interval at the effective number of items; functions
    of nats get the studentised bootstrap over clusters, taken on the scale of nats.

    Args:
        items: one row per item; columns cluster, log_likelihood, tokens, words, bytes, correct,
            correct_norm, gold_bits_per_byte, gold_margin, as far as the task needs them.
        task: perplexity, multiple_choice or last_word.
        confidence: level of the intervals.
        resamples: number of bootstrap resamples.
        rng: source of randomness.

    Raises:
        InputError: unknown task, no item, a single document, a missing column or value.

    >>> items = pd.DataFrame({"cluster": range(40), "correct": [1, 1, 1, 0] * 10,
    ...                       "log_likelihood": [-1.0, -2.0, -3.0, -2.0] * 10,
    ...                       "gold_bits_per_byte": [0.5, 1.0, 1.5, 1.0] * 10})
    >>> rng = np.random.default_rng(0)
    >>> for e in metric_intervals(items, "last_word", confidence=0.95, resamples=999, rng=rng):
    ...     print(e.metric, round(e.value, 2), e.low < e.value < e.high, e.n)
    accuracy 0.75 True 40
    last_word_perplexity 7.39 True 40
    gold_bits_per_byte 1.0 True 40
    """
    if task not in TASKS:
        raise InputError(f"unknown task '{task}'; allowed: {', '.join(TASKS)}")
    if items.empty:
        raise InputError("a cell has no items; at least 2 are needed")
    metrics = [METRICS[name] for name in TASKS[task].metrics]
    proportions = [_proportion(items, one, confidence) for one in metrics if one.is_proportion]
    others = [metric for metric in metrics if not metric.is_proportion]
    return proportions + _ratios(items, others, confidence, resamples, rng)


def divergence_interval(
    items: pd.DataFrame, *, confidence: float, resamples: int, rng: np.random.Generator
) -> list[Estimate]:
    """Return the mean divergence from the baseline, nats per token, over the items that have one.

    It is a ratio of sums, so long items count more. Limits are those of the studentised bootstrap
    over clusters, cut off at 0: divergences are not negative.

    Args:
        items: one row per item; columns cluster, tokens and kl (nats, summed over the item's scored
            positions; missing where not measured).
        confidence: level of the interval.
        resamples: number of bootstrap resamples.
        rng: source of randomness.

    Returns:
        One estimate, or none where fewer than two clusters were measured.
    """
    measured = items[items["kl"].notna()]
    if measured["cluster"].nunique() < 2:
        return []
    kl_N, tokens_N = (measured[name].to_numpy(dtype=float) for name in ("kl", "tokens"))
    boot = bootstrap_items(kl_N, tokens_N, measured["cluster"], resamples=resamples, rng=rng)
    (low,), (high,) = studentised_interval(boot, confidence)
    value = float(boot.ratio_S[0])
    return [Estimate(DIVERGENCE.name, value, max(float(low), 0.0), float(high), len(measured))]


def column(items: pd.DataFrame, name: str, origin: str = "a cell") -> np.ndarray:
    """Return a column as floats; ``origin`` names the cell in errors.

    Raises:
        InputError: the column is missing or holds a missing or infinite value.
    """
    if name not in items:
        raise InputError(f"{origin} lacks the column '{name}'; it has: {', '.join(items.columns)}")
    values = items[name].to_numpy(dtype=float, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        row = items.iloc[bad[0]]
        label = row["id"] if "id" in items else items.index[bad[0]]
        raise InputError(
            f"{origin}: column '{name}' of item '{label}' is {values[bad[0]]}; allowed: finite"
        )
    return values


def denominator(items: pd.DataFrame, unit: str | None, origin: str = "a cell") -> np.ndarray:
    """Return the units of each item: a column of counts, or ones."""
    return np.ones(len(items)) if unit is None else column(items, unit, origin)


def _proportion(items: pd.DataFrame, metric: Metric, confidence: float) -> Estimate:
    values = column(items, metric.column)
    low, high = clustered_wilson(values, items["cluster"].to_numpy(), confidence)
    return Estimate(metric.name, float(values.mean()), low, high, len(values))


def _ratios(
    items: pd.DataFrame,
    metrics: Sequence[Metric],
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> list[Estimate]:
    if not metrics:
        return []
    values = np.stack([metric.sign * column(items, metric.column) for metric in metrics], axis=1)
    units = np.stack([denominator(items, metric.per) for metric in metrics], axis=1)
    clusters = items["cluster"].to_numpy()
    if np.unique(clusters).size < 2:
        raise InputError("a cell has a single cluster; an interval needs at least 2")
    boot = bootstrap_items(values, units, clusters, resamples=resamples, rng=rng)
    low_S, high_S = studentised_interval(boot, confidence)
    estimates = []
    for metric, *limits in zip(metrics, boot.ratio_S, low_S, high_S, strict=True):
        value, low, high = (float(SCALES[metric.scale](x)) for x in limits)
        estimates.append(Estimate(metric.name, value, low, high, len(items)))
    return estimates
