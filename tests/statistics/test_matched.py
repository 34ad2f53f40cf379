"""Comparison at matched compute: intervals with few discordant items, and bent static curves."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest

from moe_routing.statistics.matched import Bracket, bracket, chord_excess, proportion_columns
from moe_routing.statistics.proportions import mixed_interval, paired_score_interval

LEVEL = 0.95
AT, BETWEEN = Bracket(0, 0, 0.0), Bracket(0, 1, 0.4)


def study(rng, n, lost, gained, spread):
    """Return an arm and two static settings, (n,) and (n, 2).

    The arm loses and gains items against both; on a share ``spread`` of the items it agrees with
    one of them only.
    """
    proportions = [lost, gained, spread, spread, (1 - lost - gained) / 2 - spread]
    kind_N = rng.choice(6, size=n, p=[*proportions, 1 - sum(proportions)])
    # Arm, fewer experts, more experts: lost, gained, agrees with more, with fewer, right, wrong.
    table = np.array([[0, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]], float)
    return table[kind_N, 0], table[kind_N, 1:]


@pytest.mark.parametrize("place", [AT, BETWEEN])
@pytest.mark.parametrize(
    ("n", "lost", "gained", "spread", "studies"),
    [(80, 0.02, 0.01, 0.0, 300), (120, 0.02, 0.01, 0.005, 300), (400, 0.03, 0.01, 0.01, 300)],
)
def test_intervals_of_few_discordant_items_cover_their_level(
    monkeypatch, place, n, lost, gained, spread, studies
):
    cached = lru_cache(None)(paired_score_interval)
    monkeypatch.setattr("moe_routing.statistics.paired.paired_score_interval", cached)
    rng, clusters = np.random.default_rng(17), np.arange(n)
    true = gained - lost + spread * (1 - 2 * place.weight)
    if place is AT:
        true = gained - lost + spread  # right where fewer experts are wrong
    covered = []
    for _ in range(studies):
        arm_N, static_N2 = study(rng, n, lost, gained, spread)
        found = proportion_columns(arm_N, static_N2, place, clusters, LEVEL)
        covered.append(found["low"] <= true <= found["high"])
    assert np.mean(covered) >= 0.925  # three standard errors below the level, at most


@pytest.mark.parametrize("n", [80, 120, 400])
def test_no_difference_is_rarely_called_one_between_two_points(monkeypatch, n):
    """Rare items gained whole, many lost by the weight."""
    cached = lru_cache(None)(paired_score_interval)
    monkeypatch.setattr("moe_routing.statistics.paired.paired_score_interval", cached)
    rng, place, studies = np.random.default_rng(18), Bracket(0, 1, 0.1), 150
    table = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]], float)
    kind = rng.choice(4, size=(studies, n), p=[0.01, 0.09, 0.4, 0.5])
    p = np.array(
        [
            proportion_columns(table[row, 0], table[row, 1:], place, np.arange(n), LEVEL)["p_value"]
            for row in kind
        ]
    )
    assert np.mean(p <= 0.05) <= 0.08


def test_p_is_the_inverse_of_the_interval_and_finds_a_difference(rng):
    arm_N, static_N2 = study(rng, 1500, 0.05, 0.01, 0.01)
    found = proportion_columns(arm_N, static_N2, BETWEEN, np.arange(1500), LEVEL)
    assert found["high"] < 0
    assert found["p_value"] < 0.001
    at_p = proportion_columns(arm_N, static_N2, BETWEEN, np.arange(1500), 1 - found["p_value"])
    assert at_p["high"] == pytest.approx(0, abs=1e-5)
    same = proportion_columns(arm_N, np.stack([arm_N, arm_N], 1), BETWEEN, np.arange(1500), LEVEL)
    assert same["p_value"] == 1
    for weight in np.linspace(0.01, 0.99, 99):  # some of which do not add up to 1 exactly
        place = Bracket(0, 1, float(weight))
        static_N2 = np.stack([arm_N[:50], arm_N[:50]], 1)
        assert (
            proportion_columns(arm_N[:50], static_N2, place, np.arange(50), LEVEL)["discordant"]
            == 0
        )


def test_clusters_widen_the_interval_between_two_points(rng):
    arm_N, static_N2 = study(rng, 200, 0.05, 0.03, 0.03)
    arm_N, static_N2 = np.repeat(arm_N, 4), np.repeat(static_N2, 4, axis=0)
    alone = proportion_columns(arm_N, static_N2, BETWEEN, np.arange(800), LEVEL)
    together = proportion_columns(arm_N, static_N2, BETWEEN, np.repeat(np.arange(200), 4), LEVEL)
    assert together["high"] - together["low"] > 1.8 * (alone["high"] - alone["low"])
    assert alone["discordant"] == np.count_nonzero(
        arm_N != 0.6 * static_N2[:, 0] + 0.4 * static_N2[:, 1]
    )


def test_a_mixture_reaches_from_one_interval_to_the_other():
    first, second = (0.1, 0.0, 0.3), (-0.2, -0.4, -0.1)
    assert mixed_interval(first, second, 0.0, 0.3) == pytest.approx(first[1:])
    assert mixed_interval(first, second, 1.0, 0.3) == pytest.approx(second[1:])
    # Wholly correlated, limits mix as estimates do; less correlated, the interval is narrower.
    assert mixed_interval(first, second, 0.5, 1.0) == pytest.approx((-0.2, 0.1))
    low, high = mixed_interval(first, second, 0.5, 0.2)
    assert -0.2 < low < -0.05 < high < 0.1
    assert mixed_interval(first, second, 0.5, -0.9) == mixed_interval(first, second, 0.5, 0.0)


def test_the_excess_of_a_chord_bounds_that_over_any_convex_curve():
    """Against curves that are known: a hyperbola, and the worst case, a kink."""
    ks = [1.0, 2.0, 4.0, 8.0]
    place = bracket(3.0, ks)
    for curve in (lambda k: 1 / k, lambda k: max(2.5 - k, 0.0), lambda k: (k - 5) ** 2):
        loss_K = [curve(k) for k in ks]
        over = (loss_K[1] + loss_K[2]) / 2 - curve(3.0)
        assert over <= chord_excess(loss_K, ks, place) + 1e-12
    assert chord_excess([3.0, 2.0, 1.0, 0.0], [1, 2, 3, 4], Bracket(1, 2, 0.5)) == 0  # a line
    assert chord_excess([0.0, 2.0, 3.0, 3.5], [1, 2, 3, 4], Bracket(1, 2, 0.5)) == 0  # concave
    assert chord_excess([3.0, 1.0], [2, 4], Bracket(1, 1, 0.0)) == 0
    assert math.isnan(chord_excess([3.0, 1.0], [2, 4], Bracket(0, 1, 0.5)))
    assert chord_excess([3.0, 1.0, 1.0], [2, 4, 6], Bracket(0, 1, 0.5)) == pytest.approx(1.0)
