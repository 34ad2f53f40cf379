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
    studentised_interval,
    two_sided_p,
)
from moe_routing.statistics.cells import Panel
from moe_routing.vocabulary import Metric


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
        low_S: lower limits by the bootstrap-t over clusters.
        high_S: upper limits.
        p_S: two-sided p-values by the same, which never disagree with the limits.
    """

    difference_NS: Array
    sums_CS: Array
    boot: RatioBootstrap
    low_S: Array
    high_S: Array
    p_S: Array


def compare(
    panel: Panel,
    metric: Metric,
    difference_NS: Array,
    settings: StatisticsConfig,
    rng: np.random.Generator,
) -> Comparison:
    """Resample the differences of all arms of a panel together.

    Args:
        panel: gives units and clusters.
        metric: what the differences are of.
        difference_NS: arm minus reference for each item.
        settings: level of the intervals, and number of bootstrap resamples.
        rng: source of randomness.
    """
    sums_CS, unit_CS = panel.sums(difference_NS, metric)
    boot = bootstrap_ratios(sums_CS, unit_CS, resamples=settings.resamples, rng=rng)
    low_S, high_S = studentised_interval(boot, settings.confidence)
    return Comparison(difference_NS, sums_CS, boot, low_S, high_S, two_sided_p(boot))
