"""Every strategy of a data set against the baseline: differences, tests, margins, power.

Functions return rows of tables for one data set; adjusted p-values and verdicts need all data
sets and are added by :mod:`moe_routing.statistics.study_tables`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from moe_routing.config.study import StatisticsConfig
from moe_routing.statistics.bootstrap import one_sided_p, studentised_interval
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.comparison import Comparison, compare, named_rng
from moe_routing.statistics.paired import PairedTable, signed_rank_p
from moe_routing.statistics.power import (
    DISCORDANCES,
    POWER,
    detectable_accuracy,
)
from moe_routing.statistics.proportions import exact_mcnemar, paired_noninferiority_p
from moe_routing.vocabulary import Metric

ResultRow = dict[str, Any]
"""One row of a table; columns differ in type."""

SCORE, BOOTSTRAP_T = "score", "bootstrap-t"


@dataclass(frozen=True)
class Contrasts:
    """Every arm of a panel against the baseline, on one metric.

    Attributes:
        panel: the cells.
        metric: what is compared.
        settings: levels and margins.
        arms: positions of the arms in the panel.
        baseline: position of the baseline.
        comparison: differences, in the order of ``arms``.
    """

    panel: Panel
    metric: Metric
    settings: StatisticsConfig
    arms: tuple[int, ...]
    baseline: int
    comparison: Comparison

    @property
    def margin(self) -> float:
        """The non-inferiority margin; NaN where none applies."""
        return margin_of(self.metric, self.settings)


def margin_of(metric: Metric, settings: StatisticsConfig) -> float:
    """Return the non-inferiority margin of a metric; NaN where none applies."""
    margins: dict[str | None, float] = {
        "accuracy": settings.margin_accuracy,
        "nats": settings.margin_nats,
    }
    return margins.get(metric.margin, np.nan)


def contrasts(
    panel: Panel, settings: StatisticsConfig, seed: int, table: str = "paired"
) -> list[Contrasts]:
    """Compare every strategy of a panel with the baseline on every metric of its task.

    Args:
        panel: the cells of one data set.
        settings: baseline, levels and margins.
        seed: seed of the study.
        table: the table that the comparisons are for; each table has its own resamples.
    """
    baseline = panel.strategies.index(settings.baseline)
    arms = tuple(s for s in range(len(panel.strategies)) if s != baseline)
    if not arms:
        return []
    found = []
    for metric in panel.measures:
        value_NS = panel.values(metric)
        difference_NS = value_NS[:, list(arms)] - value_NS[:, [baseline]]
        rng = named_rng(seed, table, panel.dataset, metric.name)
        comparison = compare(panel, metric, difference_NS, settings, rng)
        found.append(Contrasts(panel, metric, settings, arms, baseline, comparison))
    return found


def paired_rows(contrast: Contrasts) -> list[ResultRow]:
    """Return one row per arm: difference, interval, tests, flips."""
    panel, metric, comparison = contrast.panel, contrast.metric, contrast.comparison
    value_NS = panel.values(metric)
    value_S = value_NS.sum(0) / panel.units(metric).sum()
    same = panel.same_as
    rows = []
    for s, arm in enumerate(contrast.arms):
        difference = float(comparison.boot.ratio_S[s])
        row = {
            "strategy": panel.strategies[arm],
            "dataset": panel.dataset,
            "metric": metric.name,
            "task": panel.task,
            "main": panel.is_main(metric),
            "higher_is_better": metric.higher_is_better,
            "n_items": panel.n_items,
            "n_clusters": panel.n_clusters,
            "baseline": panel.strategies[contrast.baseline],
            "baseline_value": value_S[contrast.baseline],
            "value": value_S[arm],
            "difference": difference,
            "low": comparison.low_S[s],
            "high": comparison.high_S[s],
            "interval": BOOTSTRAP_T,
            "standard_error": comparison.boot.error_S[s],
            "p_value": comparison.p_S[s],
            "identical": not comparison.difference_NS[:, s].any(),
            "same_as": same.get(panel.strategies[arm]),
        }
        if metric.is_proportion:
            row |= _proportion_columns(contrast, value_NS[:, contrast.baseline], value_NS[:, arm])
        else:
            if metric.column == "log_likelihood":
                row["perplexity_ratio"] = np.exp(difference)
            row["p_signed_rank"] = signed_rank_p(comparison.sums_CS[:, s])
        rows.append(row)
    return rows


def _proportion_columns(contrast: Contrasts, baseline: np.ndarray, arm: np.ndarray) -> ResultRow:
    table = PairedTable.of(baseline, arm, contrast.panel.clusters)
    low, high = table.interval(contrast.settings.confidence)
    flips = table.flips
    return {
        "low": low,
        "high": high,
        "interval": SCORE,
        "design_effect": table.effect,
        "lost": flips.lost,
        "gained": flips.gained,
        "flip_proportion": flips.proportion,
        "p_mcnemar": exact_mcnemar(flips.lost, flips.gained),
        "p_value": table.p_value,
    }


def noninferiority_rows(contrast: Contrasts) -> list[ResultRow]:
    """Return one row per arm: the loss against the margin; none where no margin applies."""
    if not np.isfinite(contrast.margin):
        return []
    panel, metric = contrast.panel, contrast.metric
    tests = _score_tests(contrast) if metric.is_proportion else _bootstrap_tests(contrast)
    rows = []
    for s, (arm, (upper_bound, p_loss, p_gain)) in enumerate(
        zip(contrast.arms, tests, strict=True)
    ):
        loss = metric.loss(float(contrast.comparison.boot.ratio_S[s]))
        error = float(contrast.comparison.boot.error_S[s])
        rows.append(
            {
                "strategy": panel.strategies[arm],
                "dataset": panel.dataset,
                "metric": metric.name,
                "main": panel.is_main(metric),
                "margin": contrast.margin,
                "loss": loss,
                "upper_bound": upper_bound,
                "alpha": (1 - contrast.settings.confidence) / 2,
                "test": SCORE if metric.is_proportion else BOOTSTRAP_T,
                "p_value": p_loss,
                "p_clustered_t": _clustered_t(loss - contrast.margin, error, panel.n_clusters),
                "p_gain": p_gain,
                "p_tost": max(p_loss, p_gain),
            }
        )
    return rows


def _clustered_t(excess: float, error: float, clusters: int) -> float:
    if error == 0:
        return float(excess >= 0)
    return float(stats.t.cdf(excess / error, clusters - 1))


def _score_tests(contrast: Contrasts) -> list[tuple[float, float, float]]:
    """Return upper bound of the loss, p of a loss, p of a gain for each arm of a proportion."""
    value_NS = contrast.panel.values(contrast.metric)
    tests = []
    for arm in contrast.arms:
        pair = value_NS[:, contrast.baseline], value_NS[:, arm]
        # Where more is worse, an item that the arm has and the baseline has not is a loss.
        pair = pair if contrast.metric.higher_is_better else pair[::-1]
        table = PairedTable.of(*pair, contrast.panel.clusters)
        lost, gained, n, effect = table.flips.lost, table.flips.gained, table.flips.n, table.effect
        low, _ = table.interval(contrast.settings.confidence)
        p_loss = paired_noninferiority_p(lost, gained, n, contrast.margin, design_effect=effect)
        # A gain of the arm is a loss of the baseline.
        p_gain = paired_noninferiority_p(gained, lost, n, contrast.margin, design_effect=effect)
        tests.append((-low, p_loss, p_gain))
    return tests


def _bootstrap_tests(contrast: Contrasts) -> list[tuple[float, float, float]]:
    """Return the same for each arm of a metric that is not a proportion."""
    boot, margin = contrast.comparison.boot, contrast.margin
    boot = boot.negated() if contrast.metric.higher_is_better else boot  # a difference is a loss
    _, high_S = studentised_interval(boot, contrast.settings.confidence)
    p_loss_S = one_sided_p(boot, margin)
    p_gain_S = one_sided_p(boot.negated(), margin)
    columns = zip(high_S, p_loss_S, p_gain_S, strict=True)
    return [(float(high), float(loss), float(gain)) for high, loss, gain in columns]


def power_rows(panel: Panel, settings: StatisticsConfig) -> list[ResultRow]:
    """Return the minimum detectable differences of a data set at assumed discordances.

    Only proportions have them; what a difference of nats needs is planned from a pilot, for the
    declared contrasts (:func:`moe_routing.statistics.primary.primary_rows`).
    """
    return [
        {
            "dataset": panel.dataset,
            "metric": metric.name,
            "n_items": panel.n_items,
            "n_clusters": panel.n_clusters,
            "margin": margin_of(metric, settings),
            "power": POWER,
            "alpha": 1 - settings.confidence,
            "discordance": proportion,
            "minimum_detectable_difference": detectable_accuracy(
                panel.n_items, proportion, confidence=settings.confidence
            ),
        }
        for metric in panel.measures
        if metric.is_proportion
        for proportion in DISCORDANCES
    ]
