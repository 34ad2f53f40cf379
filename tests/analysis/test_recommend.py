"""A recommendation is made where it is planted, and refused where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from moe_routing.analysis.recommend import Arm, convex_bound, recommend, simultaneous
from moe_routing.statistics.matched import bracket, interpolate

ITEMS = 60


@pytest.fixture
def advise(rng):
    """Return a function: per-token effects of arms to the recommendation."""

    def run(effects, experts, static=None, noise_floor=0.01, margin=0.02):
        tokens_N = rng.integers(50, 200, ITEMS)
        base_N = rng.normal(4, 0.5, ITEMS)
        per_token = [base_N + effect + rng.normal(0, noise_floor, ITEMS) for effect in effects]
        nats_NS = np.stack([base_N, *per_token], axis=1) * tokens_N[:, None]
        static = {8: "base", **(static or {})}
        by_name = {name: k for k, name in static.items()}
        arms = [Arm("base", 8.0, 8)]
        arms += [Arm(name, mean, by_name.get(name)) for name, mean in experts.items()]
        return recommend(
            nats_NS, tokens_N, np.arange(ITEMS), arms, "base",
            margin=margin, confidence=0.95, resamples=500, rng=rng,
        )  # fmt: skip

    return run


def test_of_the_harmless_arms_the_one_with_fewest_experts(advise):
    found = advise([0.0, 0.001, 0.5], {"six": 6.0, "four": 4.0, "one": 1.0})
    assert found["efficiency"]["strategy"] == "four"
    assert found["efficiency"]["difference_nats"]["high"] < 0.02
    assert found["quality"] is None
    assert "For efficiency: `four`" in found["statement"]
    assert "No setting was shown to beat" in found["statement"]


def test_an_arm_with_a_loss_that_cannot_be_excluded_is_refused(advise):
    found = advise([0.0], {"four": 4.0}, noise_floor=0.3)
    assert found["efficiency"] is None
    assert "was shown to lose less than" in found["statement"]


def test_an_arm_with_more_experts_saves_nothing(advise):
    assert advise([0.0], {"twelve": 12.0})["efficiency"] is None


def test_a_better_arm_is_recommended_for_quality(advise):
    found = advise([-0.05, -0.1], {"ten": 10.0, "twelve": 12.0})
    assert found["quality"]["strategy"] == "twelve"
    assert found["quality"]["difference_nats"]["high"] < 0
    assert "For quality: `twelve`" in found["statement"]


def test_a_static_arm_can_win(advise):
    found = advise([0.001, 0.001], {"adaptive": 5.0, "static": 4.0}, static={4: "static"})
    assert found["efficiency"]["strategy"] == "static"


LISTS = ("beats_static_curve", "beats_line_only", "loses_to_static_curve")


@pytest.mark.parametrize(
    ("effect", "expected"),
    [(0.02, LISTS[0]), (0.1, LISTS[1]), (0.15, LISTS[1]), (0.25, None), (0.4, LISTS[2])],
)
def test_adaptivity_is_held_against_the_static_curve_at_its_own_experts(advise, effect, expected):
    # The curve falls from +0.5 at k = 4 to 0 at k = 8 and to -0.1 at k = 12. At 6 experts the line
    # is at +0.25, and a convex curve is at +0.05 or above: the line of 8 and 12, extended.
    found = advise(
        [0.5, -0.1, effect], {"four": 4.0, "twelve": 12.0, "adaptive": 6.0},
        static={4: "four", 12: "twelve"},
    )  # fmt: skip
    gap, bound = (found[f"against_{name}"]["adaptive"] for name in ("static_curve", "convex_bound"))
    assert gap["value"] == pytest.approx(effect - 0.25, abs=0.02)
    assert bound["value"] == pytest.approx(effect - 0.05, abs=0.02)
    for name in LISTS:
        assert found[name] == (["adaptive"] if name == expected else [])


def test_on_a_measured_k_the_curve_is_known(advise):
    found = advise([0.5, 0.4], {"static": 4.0, "adaptive": 4.0}, static={4: "static"})
    assert found["beats_static_curve"] == ["adaptive"]
    assert found["against_convex_bound"] == found["against_static_curve"]


def test_between_two_lone_points_nothing_beats_the_curve(advise):
    found = advise([0.5, -0.2], {"static": 4.0, "adaptive": 6.0}, static={4: "static"})
    assert found["against_convex_bound"] == {}
    assert (found["beats_static_curve"], found["beats_line_only"]) == ([], ["adaptive"])


def test_every_convex_curve_is_above_the_bound_and_below_the_line(rng):
    ks = [1, 2, 3, 4, 6, 8]
    for _ in range(200):
        bends = rng.gamma(0.3, 1, 40)
        at_k = np.cumsum(np.cumsum(bends) - 0.7 * bends.sum())  # convex on a grid of 1/4
        value_1K = at_k[[4 * (k - 1) for k in ks]][None]
        mean = rng.integers(0, 28) / 4 + 1
        at = bracket(mean, ks)
        truth = at_k[round(4 * (mean - 1))]
        assert convex_bound(value_1K, ks, at)[0] <= truth + 1e-9
        assert truth <= interpolate(value_1K, at)[0] + 1e-9


def test_where_the_points_are_not_convex_the_bound_is_the_line():
    value_1K = np.array([[1.0, 0.0, 3.0, 0.0]])
    at = bracket(2.5, [1, 2, 3, 4])
    assert convex_bound(value_1K, [1, 2, 3, 4], at) == interpolate(value_1K, at)


def test_outside_the_static_curve_nothing_is_compared(advise):
    assert advise([0.1], {"adaptive": 9.5})["against_static_curve"] == {}


def test_an_identical_arm_has_no_difference(rng):
    nats = rng.normal(size=(30, 1))
    difference = np.hstack([np.zeros((30, 1)), nats])
    same, other = simultaneous(
        difference, np.ones(30), np.arange(30), confidence=0.95, resamples=300, rng=rng
    )
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert other.low < other.value < other.high


def test_intervals_hold_for_all_arms_at_once(rng):
    joint = single = 0
    for _ in range(120):
        difference = rng.normal(size=(60, 12))
        settings = {"confidence": 0.9, "resamples": 300, "rng": rng}
        ones, clusters = np.ones(60), np.arange(60)
        found = simultaneous(difference, ones, clusters, **settings)
        joint += all(row.low <= 0 <= row.high for row in found)
        row = simultaneous(difference[:, :1], ones, clusters, **settings)[0]
        single += row.low <= 0 <= row.high
    assert joint / 120 >= 0.9 - 3 * np.sqrt(0.09 / 120)
    assert single / 120 >= 0.9 - 3 * np.sqrt(0.09 / 120)
    assert joint / 120 < 1.0


def test_the_resampling_unit_is_the_document(rng):
    difference = np.repeat(rng.normal(size=(20, 1)), 5, axis=0)
    settings = {"confidence": 0.95, "resamples": 400, "rng": rng}
    wide = simultaneous(difference, np.ones(100), np.repeat(np.arange(20), 5), **settings)[0]
    narrow = simultaneous(difference, np.ones(100), np.arange(100), **settings)[0]
    assert wide.high - wide.low > 1.8 * (narrow.high - narrow.low)
