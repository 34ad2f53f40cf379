"""Comparison at equal compute: a strategy against a static curve at its own mean experts.

The curve is that of the strategy's own weighting, so a difference comes from selection.

Shape letters: N items, S strategies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_routing.config.study import StatisticsConfig
from moe_routing.statistics.bootstrap import Array, cluster_sums
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.comparison import compare, named_rng
from moe_routing.statistics.contrasts import BOOTSTRAP_T, SCORE
from moe_routing.statistics.paired import PairedTable
from moe_routing.statistics.proportions import mixed_interval, p_of_interval
from moe_routing.vocabulary import Metric

MATCHED, OUTSIDE, UNKNOWN = "matched", "outside the curve", "unknown experts"
NO_CURVE = "no curve"
MIXED_SCORE = "score, interpolated"

ROUNDING = 1e-12
"""Results this close to the line are equal to it: 0.9 x 1 + 0.1 x 1 may not be exactly 1."""


@dataclass(frozen=True)
class Bracket:
    """The two points of a static curve around a mean number of experts.

    Attributes:
        low: index of the lower one in the ascending sequence of k.
        high: index of the upper one; equal to ``low`` on a point of the curve.
        weight: proportion of the upper one.
    """

    low: int
    high: int
    weight: float


def bracket(mean_experts: float, ks: Sequence[float], beyond: float = 0.0) -> Bracket | None:
    """Find where a mean number of experts lies on a static curve.

    Args:
        mean_experts: mean experts per token.
        ks: numbers of experts of the static curve, ascending.
        beyond: part of the experts at an end by which a mean may lie beyond it and still be
            compared with that end.

    Returns:
        None if ``mean_experts`` lies outside the curve.

    >>> bracket(5.0, [2, 4, 8]), bracket(4.0, [2, 4, 8]), bracket(1.5, [2, 4, 8])
    (Bracket(low=1, high=2, weight=0.25), Bracket(low=1, high=1, weight=0.0), None)
    """
    ks_K = np.asarray(ks, dtype=float)
    exact = np.flatnonzero(np.isclose(ks_K, mean_experts, rtol=0, atol=1e-6))
    if exact.size:
        return Bracket(int(exact[0]), int(exact[0]), 0.0)
    high = int(np.searchsorted(ks_K, mean_experts))
    if high in (0, len(ks_K)) or not np.isfinite(mean_experts):
        near = np.abs(ks_K - mean_experts) <= beyond * ks_K
        end = int(np.argmax(near)) if near.any() else None
        return None if end is None else Bracket(end, end, 0.0)
    low = high - 1
    return Bracket(low, high, float((mean_experts - ks_K[low]) / (ks_K[high] - ks_K[low])))


def interpolate(value_NK: Array, at: Bracket) -> Array:
    """Return the static curve between two of its points, item by item, (N,).

    (1 - w) y_low + w y_high for each item, so that the comparison stays paired. It is the expected
    score if k_high experts went to a random proportion w of the items and k_low to the others.
    Where loss is convex in k the chord lies above the curve, which favours the strategy that is
    compared with it: see :func:`chord_excess`. The mean number of experts is taken as known.

    >>> interpolate(np.array([[0.0, 1.0], [2.0, 4.0]]), Bracket(0, 1, 0.25))
    array([0.25, 2.5 ])
    """
    return (1 - at.weight) * value_NK[:, at.low] + at.weight * value_NK[:, at.high]


def chords_beside(value_NK: Array, ks: Sequence[float], at: Bracket) -> list[Array]:
    """Return the values of the two neighbouring chords, prolonged to a bracket, (N,) each.

    They are the lines through the two points before and the two points after the bracket; a curve
    that is convex in k is nowhere below either. One whose second point is missing is left out.

    Args:
        value_NK: value of each item at each point of the curve, (items, points).
        ks: numbers of experts, ascending.
        at: where between two of them.

    >>> chords_beside(np.array([[8.0, 4.0, 2.0, 1.0]]), [1, 2, 3, 4], Bracket(1, 2, 0.5))
    [array([2.]), array([2.5])]
    """
    mean_experts = (1 - at.weight) * ks[at.low] + at.weight * ks[at.high]
    pairs = [(at.low - 1, at.low), (at.high, at.high + 1)]
    weights = {
        (a, b): (mean_experts - ks[a]) / (ks[b] - ks[a]) for a, b in pairs if a >= 0 and b < len(ks)
    }
    return [
        (1 - weight) * value_NK[:, a] + weight * value_NK[:, b]
        for (a, b), weight in weights.items()
    ]


def chord_excess(loss_K: Sequence[float], ks: Sequence[float], at: Bracket) -> float:
    """Return how far a chord may lie above a convex curve through the measured points.

    A convex curve lies above the prolongations of its other chords, so between two points it is no
    lower than the higher of the two neighbouring chords. The excess is the value of the chord minus
    that. It is 0 on a point and where the points themselves are not convex, and NaN without a
    neighbouring chord.

    Args:
        loss_K: losses of the static strategies, smaller is better.
        ks: their numbers of experts, ascending.
        at: where between two of them.

    >>> chord_excess([4.0, 1.0, 0.0, 0.0], [0, 1, 2, 3], Bracket(1, 2, 0.5))
    0.5
    """
    if at.low == at.high:
        return 0.0
    loss_1K = np.asarray(loss_K, dtype=float)[None]
    beside = [float(chord_1[0]) for chord_1 in chords_beside(loss_1K, ks, at)]
    if not beside:
        return math.nan
    return max(float(interpolate(loss_1K, at)[0]) - max(beside), 0.0)


def matched_rows(
    panel: Panel,
    settings: StatisticsConfig,
    seed: int,
    static: Mapping[str, Mapping[str, float]],
    curve_of: Mapping[str, str],
    mean_experts: Mapping[str, float],
) -> list[dict[str, object]]:
    """Compare the strategies of a panel with a static curve at their own mean experts.

    Args:
        panel: the cells of one data set.
        settings: levels.
        seed: seed of the study.
        static: number of experts of each strategy of a static curve, by the curve's family; these
            strategies are not compared.
        curve_of: family of the curve that a strategy is compared with; a strategy whose weights no
            static family has is absent.
        mean_experts: mean experts per token on this data set; strategies may be absent.
    """
    points = {name for curve in static.values() for name in curve}
    arms = [name for name in panel.strategies if name not in points]
    curves = {name: _ascending(static.get(curve_of.get(name, ""), {}), panel) for name in arms}
    brackets = {
        name: bracket(mean_experts.get(name, np.nan), list(curves[name].values())) for name in arms
    }
    rows = []
    for metric in panel.measures:
        rng = named_rng(seed, "matched", panel.dataset, metric.name)
        found = gaps(panel, metric, settings, rng, curves, brackets)
        for name in arms:
            row = {
                "strategy": name,
                "dataset": panel.dataset,
                "metric": metric.name,
                "main": panel.is_main(metric),
                "higher_is_better": metric.higher_is_better,
                "mean_experts": mean_experts.get(name, np.nan),
                "value": panel.value(metric, name),
                "static_family": curve_of.get(name),
                "status": _unmatched(name, curve_of, mean_experts),
            }
            at = brackets[name]
            if at is not None:
                row |= found[name] | bracket_columns(panel, metric, curves[name], at)
                row["status"] = MATCHED
                row["static_value"] = row["value"] - row["difference"]
            rows.append(row)
    return rows


def bracket_columns(
    panel: Panel, metric: Metric, curve: Mapping[str, float], at: Bracket
) -> dict[str, float]:
    """Return where a strategy lies on its curve, and the chord excess there."""
    ks = list(curve.values())
    loss_K = [metric.loss(panel.value(metric, name)) for name in curve]
    return {
        "k_low": ks[at.low],
        "k_high": ks[at.high],
        "weight_high": at.weight,
        "chord_excess": chord_excess(loss_K, ks, at),
    }


def _ascending(curve: Mapping[str, float], panel: Panel) -> dict[str, float]:
    """Return the points of a curve that a panel has, fewest experts first."""
    there = (name for name in curve if name in panel.strategies)
    return {name: curve[name] for name in sorted(there, key=curve.__getitem__)}


def _unmatched(name: str, curve_of: Mapping[str, str], mean_experts: Mapping[str, float]) -> str:
    """Return why a strategy cannot be matched with a curve."""
    if name not in mean_experts:
        return UNKNOWN
    return OUTSIDE if name in curve_of else NO_CURVE


def gaps(
    panel: Panel,
    metric: Metric,
    settings: StatisticsConfig,
    rng: np.random.Generator,
    curves: Mapping[str, Mapping[str, float]],
    brackets: Mapping[str, Bracket | None],
) -> dict[str, dict[str, Any]]:
    """Return difference, interval and test of every strategy that lies on its curve.

    Args:
        panel: the cells of one data set.
        metric: what is compared.
        settings: level and resamples.
        rng: source of randomness.
        curves: for each strategy, the points of its curve and their experts, ascending.
        brackets: where each strategy lies on its curve; None: outside, and left out.
    """
    inside = {name: at for name, at in brackets.items() if at is not None}
    if not inside:
        return {}
    value_NS = panel.values(metric)
    column = panel.strategies.index
    arm_NS = value_NS[:, list(map(column, inside))]
    static_NK = {name: value_NS[:, list(map(column, curves[name]))] for name in inside}
    line_NS = np.stack([interpolate(static_NK[name], at) for name, at in inside.items()], axis=1)
    difference_NS = arm_NS - line_NS
    comparison = compare(panel, metric, difference_NS, settings, rng)
    found: dict[str, dict[str, Any]] = {}
    for s, (name, at) in enumerate(inside.items()):
        found[name] = {
            "difference": comparison.boot.ratio_S[s],
            "low": comparison.low_S[s],
            "high": comparison.high_S[s],
            "interval": BOOTSTRAP_T,
            "standard_error": comparison.boot.error_S[s],
            "p_value": comparison.p_S[s],
            "identical": bool((np.abs(difference_NS[:, s]) <= ROUNDING).all()),
        }
        if metric.is_proportion:
            found[name] |= proportion_columns(
                arm_NS[:, s], static_NK[name], at, panel.clusters, settings.confidence
            )
    return found


def proportion_columns(
    arm_N: Array, static_NK: Array, at: Bracket, clusters: np.ndarray, confidence: float
) -> dict[str, object]:
    """Return interval and p-value of a proportion.

    With few discordant items bootstrap intervals undercover, because many resamples contain none.
    On a point the interval is Tango's and the test its inverse. Between two points the interval
    combines those of both points (:func:`moe_routing.statistics.proportions.mixed_interval`) with
    the correlation of the two differences over clusters, and the test is its inverse too.

    Args:
        arm_N: zeros and ones of the strategy.
        static_NK: zeros and ones of the points of the curve, (items, points).
        at: where the strategy lies.
        clusters: number of the cluster of each item, (N,).
        confidence: level.

    Returns:
        low, high, interval, discordant and p_value.
    """
    found: dict[str, object] = {
        "discordant": int((np.abs(arm_N - interpolate(static_NK, at)) > ROUNDING).sum())
    }
    low_N, high_N = static_NK[:, at.low], static_NK[:, at.high]
    first = PairedTable.of(low_N, arm_N, clusters)
    if at.low == at.high:
        found["low"], found["high"] = first.interval(confidence)
        found["interval"], found["p_value"] = SCORE, first.p_value
        return found
    second = PairedTable.of(high_N, arm_N, clusters)
    r = _correlation(cluster_sums(np.stack([arm_N - low_N, arm_N - high_N], axis=1), clusters))

    def limits(level: float) -> tuple[float, float]:
        return mixed_interval(first.estimate(level), second.estimate(level), at.weight, r)

    found["low"], found["high"] = limits(confidence)
    found["interval"], found["p_value"] = MIXED_SCORE, p_of_interval(limits)
    return found


def _correlation(sums_C2: Array) -> float:
    """Return the correlation of two columns; 1, the conservative value, if one does not vary."""
    if (np.ptp(sums_C2, axis=0) == 0).any():
        return 1.0
    # numpy's stub has a scalar for the matrix.
    return float(np.corrcoef(sums_C2.T)[0, 1])  # pyright: ignore[reportIndexIssue]
