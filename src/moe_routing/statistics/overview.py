"""All strategies at once: fronts of quality against cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_routing.config.study import StatisticsConfig
from moe_routing.statistics.bootstrap import Array, bootstrap_ratios, studentised_interval
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.comparison import named_rng
from moe_routing.statistics.contrasts import ResultRow
from moe_routing.statistics.pareto import front_proportion, pareto_front
from moe_routing.statistics.proportions import clustered_wilson

TIE_DIGITS = 12
"""Losses that agree to this many decimals are equal: the rest is rounding."""


def pareto_rows(
    panel: Panel, settings: StatisticsConfig, seed: int, cost: Mapping[str, float], name: str
) -> list[ResultRow]:
    """Return one row per strategy: its main metric, its cost, and whether it is on the front.

    Args:
        panel: the cells of one data set.
        settings: levels.
        seed: seed of the study.
        cost: cost of each strategy; strategies without one are off the front.
        name: column that holds the cost.
    """
    metric = panel.main_measure
    value_NS = panel.values(metric)
    rng = named_rng(seed, "pareto", panel.dataset)
    boot = bootstrap_ratios(*panel.sums(value_NS, metric), resamples=settings.resamples, rng=rng)
    if metric.is_proportion:
        low_S, high_S = _wilson(panel, value_NS, settings.confidence)
    else:
        low_S, high_S = studentised_interval(boot, settings.confidence)
    cost_S = np.array([cost.get(strategy, np.nan) for strategy in panel.strategies])
    sign = metric.loss(1.0)
    front_S = pareto_front(cost_S, np.round(sign * boot.ratio_S, TIE_DIGITS))
    proportion_S = front_proportion(cost_S, np.round(sign * boot.ratio_BS, TIE_DIGITS))
    return [
        {
            "dataset": panel.dataset,
            "strategy": strategy,
            "metric": metric.name,
            "higher_is_better": metric.higher_is_better,
            "value": boot.ratio_S[s],
            "low": low_S[s],
            "high": high_S[s],
            name: cost_S[s],
            "on_front": bool(front_S[s]),
            "front_proportion": proportion_S[s],
        }
        for s, strategy in enumerate(panel.strategies)
    ]


def _wilson(panel: Panel, value_NS: Array, confidence: float) -> tuple[list[float], list[float]]:
    limits = [clustered_wilson(value_N, panel.clusters, confidence) for value_N in value_NS.T]
    return [low for low, _ in limits], [high for _, high in limits]
