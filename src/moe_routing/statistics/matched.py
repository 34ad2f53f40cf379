"""Comparison at equal compute: a strategy against a static curve at its own mean experts.

The curve is that of the strategy's own weighting, so that a difference is one of selection.

Shape letters: N items, S strategies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_routing.statistics.bootstrap import Array
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.comparison import compare, stream
from moe_routing.statistics.measures import MEASURES, Measure, is_main

if TYPE_CHECKING:
    from moe_routing.config import StatisticsConfig

MATCHED, OUTSIDE, UNKNOWN = "matched", "outside the curve", "unknown experts"
NO_CURVE = "no curve"


@dataclass(frozen=True)
class Bracket:
    """The two points of a static curve around a mean number of experts.

    Attributes:
        low: index of the lower one in the ascending sequence of k.
        high: index of the upper one; equal to ``low`` on a point of the curve.
        weight: share of the upper one.
    """

    low: int
    high: int
    weight: float


def bracket(mean_experts: float, ks: Sequence[float]) -> Bracket | None:
    """Find where a mean number of experts lies on a static curve.

    Args:
        mean_experts: mean experts a token.
        ks: numbers of experts of the static curve, ascending.

    Returns:
        None if ``mean_experts`` lies outside the curve.

    >>> bracket(5.0, [2, 4, 8]), bracket(4.0, [2, 4, 8]), bracket(1.5, [2, 4, 8])
    (Bracket(low=1, high=2, weight=0.25), Bracket(low=1, high=1, weight=0.0), None)
    """
    ks = np.asarray(ks, dtype=float)
    exact = np.flatnonzero(np.isclose(ks, mean_experts, rtol=0, atol=1e-6))
    if exact.size:
        return Bracket(int(exact[0]), int(exact[0]), 0.0)
    high = int(np.searchsorted(ks, mean_experts))
    if high in (0, len(ks)) or not np.isfinite(mean_experts):
        return None
    low = high - 1
    return Bracket(low, high, float((mean_experts - ks[low]) / (ks[high] - ks[low])))


def interpolate(value_NK: Array, at: Bracket) -> Array:
    """Return the static curve between two of its points, item by item, (N,).

    (1 - w) y_low + w y_high, so that the comparison stays paired: what giving k_low experts to a
    random share 1 - w of the items and k_high to the others would score on average. Where loss is
    convex in k the chord lies above the curve, which favours the strategy compared with it. The
    mean number of experts is taken as known.

    >>> interpolate(np.array([[0.0, 1.0], [2.0, 4.0]]), Bracket(0, 1, 0.25))
    array([0.25, 2.5 ])
    """
    return (1 - at.weight) * value_NK[:, at.low] + at.weight * value_NK[:, at.high]


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
        mean_experts: mean experts a token on this data set; strategies may be absent.
    """
    points = {name for curve in static.values() for name in curve}
    arms = [name for name in panel.strategies if name not in points]
    curves = {name: _ascending(static.get(curve_of.get(name), {}), panel) for name in arms}
    places = {
        name: bracket(mean_experts.get(name, np.nan), list(curves[name].values())) for name in arms
    }
    rows = []
    for measure in MEASURES[panel.task]:
        gaps = _gaps(panel, measure, settings, seed, curves, places)
        for name in arms:
            row = {
                "strategy": name,
                "dataset": panel.dataset,
                "metric": measure.name,
                "main": is_main(measure, panel.task),
                "higher_is_better": measure.higher_is_better,
                "mean_experts": mean_experts.get(name, np.nan),
                "value": panel.value(measure, name),
                "static_family": curve_of.get(name),
                "status": _unmatched(name, curve_of, mean_experts),
            }
            place = places[name]
            if place is not None:
                row |= gaps[name]
                row["status"] = MATCHED
                row["static_value"] = row["value"] - row["difference"]
                ks = list(curves[name].values())
                row["k_low"], row["k_high"] = ks[place.low], ks[place.high]
                row["weight_high"] = place.weight
            rows.append(row)
    return rows


def _ascending(curve: Mapping[str, float], panel: Panel) -> dict[str, float]:
    """Return the points of a curve that a panel has, fewest experts first."""
    there = (name for name in curve if name in panel.strategies)
    return {name: curve[name] for name in sorted(there, key=curve.__getitem__)}


def _unmatched(name: str, curve_of: Mapping[str, str], mean_experts: Mapping[str, float]) -> str:
    """Return why a strategy has no place on a curve."""
    if name not in mean_experts:
        return UNKNOWN
    return OUTSIDE if name in curve_of else NO_CURVE


def _gaps(
    panel: Panel,
    measure: Measure,
    settings: StatisticsConfig,
    seed: int,
    curves: Mapping[str, Mapping[str, float]],
    places: Mapping[str, Bracket | None],
) -> dict[str, dict[str, object]]:
    """Return difference, interval and test of every strategy inside the curve."""
    names = [name for name, place in places.items() if place is not None]
    if not names:
        return {}
    value_NS = panel.values(measure)
    column = panel.strategies.index
    difference_NS = np.stack(
        [
            value_NS[:, column(name)]
            - interpolate(value_NS[:, list(map(column, curves[name]))], places[name])
            for name in names
        ],
        axis=1,
    )
    comparison = compare(
        panel,
        measure,
        difference_NS,
        confidence=settings.confidence,
        resamples=settings.resamples,
        rng=stream(seed, "matched", panel.dataset, measure.name),
    )
    return {
        name: {
            "difference": comparison.boot.ratio_S[s],
            "low": comparison.low_S[s],
            "high": comparison.high_S[s],
            "standard_error": comparison.boot.error_S[s],
            "p_value": comparison.p_sign_flip_S[s],
            "identical": not difference_NS[:, s].any(),
        }
        for s, name in enumerate(names)
    }
