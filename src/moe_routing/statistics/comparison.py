"""Differences of many arms on one data set, from the same resamples.

Shape letters: N items, C clusters, S arms.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from moe_routing.config.study import StatisticsConfig
from moe_routing.statistics.bootstrap import (
    Array,
    RatioBootstrap,
    bootstrap_ratios,
    percentile_interval,
    studentised_interval,
)
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.paired import sign_flip_p
from moe_routing.vocabulary import Metric

PERMUTATIONS = 9_999


def named_rng(seed: int, *labels: str) -> np.random.Generator:
    """Return the random generator of a named computation.

    Its numbers depend only on the seed and the labels: the results of a data set do not change when
    another data set is added.

    >>> a, b = named_rng(0, "paired", "lambada"), named_rng(0, "paired", "hellaswag")
    >>> bool(a.random() == b.random()), named_rng(0, "x").random() == named_rng(0, "x").random()
    (False, True)
    """
    return np.random.default_rng([seed, *(zlib.crc32(label.encode()) for label in labels)])


@dataclass(frozen=True)
class Comparison:
    """Differences of arms, each against its own reference.

    Attributes:
        difference_NS: numerators, item by item.
        sums_CS: the same, summed within clusters.
        boot: bootstrap of the differences (a ratio of sums each).
        low_S: lower limits by the cluster bootstrap.
        high_S: upper limits.
        p_sign_flip_S: two-sided p-values.
    """

    difference_NS: Array
    sums_CS: Array
    boot: RatioBootstrap
    low_S: Array
    high_S: Array
    p_sign_flip_S: Array


def compare(
    panel: Panel,
    metric: Metric,
    difference_NS: Array,
    settings: StatisticsConfig,
    rng: np.random.Generator,
) -> Comparison:
    """Resample and permute the differences of all arms of a panel together.

    Limits are those of the cluster bootstrap that cover best for a kind of metric: bootstrap-t for
    nats, percentiles for proportions.

    Args:
        panel: gives units and clusters.
        metric: what the differences are of.
        difference_NS: arm minus reference for each item.
        settings: level of the intervals, and number of bootstrap resamples.
        rng: source of randomness.
    """
    sums_CS, unit_CS = panel.sums(difference_NS, metric)
    boot = bootstrap_ratios(sums_CS, unit_CS, resamples=settings.resamples, rng=rng)
    # With few discordant items, resamples without any have no t.
    interval = percentile_interval if metric.is_proportion else studentised_interval
    low_S, high_S = interval(boot, settings.confidence)
    p_S = sign_flip_p(sums_CS, permutations=PERMUTATIONS, rng=rng)
    return Comparison(difference_NS, sums_CS, boot, low_S, high_S, p_S)
