"""Comparison at equal compute: a strategy against the static curve at its own mean experts.

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
    static: Mapping[str, float],
    mean_experts: Mapping[str, float],
) -> list[dict[str, object]]:
    """Compare the strategies of a panel with the static curve at their own mean experts.

    Args:
        panel: the cells of one data set.
        settings: levels.
        seed: seed of the study.
        static: number of experts of each strategy that makes up the static curve.
        mean_experts: mean experts a token on this data set; strategies may be absent.
    """
    arms = [name for name in panel.strategies if name not in static]
    curve = sorted((name for name in panel.strategies if name in static), key=static.__getitem__)
    ks = [static[name] for name in curve]
    places = {name: bracket(mean_experts.get(name, np.nan), ks) for name in arms}
    rows = []
    for measure in MEASURES[panel.task]:
        gaps = _gaps(panel, measure, settings, seed, curve, places)
        for name in arms:
            row = {
                "strategy": name,
                "dataset": panel.dataset,
                "metric": measure.name,
                "main": is_main(measure, panel.task),
                "higher_is_better": measure.higher_is_better,
                "mean_experts": mean_experts.get(name, np.nan),
                "value": panel.value(measure, name),
                "status": OUTSIDE if name in mean_experts else UNKNOWN,
            }
            place = places[name]
            if place is not None:
                row |= gaps[name]
                row["status"] = MATCHED
                row["static_value"] = row["value"] - row["difference"]
                row["k_low"], row["k_high"] = ks[place.low], ks[place.high]
                row["weight_high"] = place.weight
            rows.append(row)
    return rows


def _gaps(
    panel: Panel,
    measure: Measure,
    settings: StatisticsConfig,
    seed: int,
    curve: list[str],
    places: Mapping[str, Bracket | None],
) -> dict[str, dict[str, object]]:
    """Return difference, interval and test of every strategy inside the curve."""
    names = [name for name, place in places.items() if place is not None]
    if not names:
        return {}
    value_NS = panel.values(measure)
    static_NK = value_NS[:, [panel.strategies.index(name) for name in curve]]
    difference_NS = np.stack(
        [
            value_NS[:, panel.strategies.index(name)] - interpolate(static_NK, places[name])
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
