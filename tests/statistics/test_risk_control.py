"""Conformal risk control keeps its promise, and bisection finds what a full search finds."""

from __future__ import annotations

import numpy as np
import pytest

from moe_routing.errors import InputError
from moe_routing.statistics.risk_control import least_controlled, risk

MARGIN, BOUND, LEVELS = 0.1, 1.0, 60


def planted(rng: np.random.Generator, n: int) -> np.ndarray:
    """Losses of examples at each level, (levels, n): falling, clipped at the bound, 0 at last."""
    scale_n = rng.gamma(0.5, 1.0, n)
    fall_l = np.linspace(1, 0, LEVELS)[:, None] ** 2
    return np.minimum(fall_l * scale_n, BOUND)


def full_search(loss_ln: np.ndarray) -> int:
    """The first level from which on every level is controlled."""
    monotone_ln = np.maximum.accumulate(loss_ln[::-1])[::-1]
    return next(level for level in range(LEVELS) if risk(monotone_ln[level], BOUND) <= MARGIN)


@pytest.mark.parametrize("seed", range(5))
def test_bisection_finds_the_level_of_a_full_search(seed):
    loss_ln = planted(np.random.default_rng(seed), 150)
    found = least_controlled(loss_ln.__getitem__, LEVELS, MARGIN, BOUND)
    assert found.level == full_search(loss_ln)
    assert len(found.mean_losses) <= 1 + np.ceil(np.log2(LEVELS))
    assert found.mean_losses[found.level] == pytest.approx(loss_ln[found.level].mean())


def test_losses_that_rise_with_the_level_count_as_if_they_did_not():
    low_n, high_n = np.repeat([0.0, 0.15], 20), np.repeat([0.15, 0.0], 20)
    assert risk(low_n, BOUND) <= MARGIN < risk(np.maximum(low_n, high_n), BOUND)
    losses = [low_n, high_n, np.zeros(40), np.zeros(40)]
    assert least_controlled(losses.__getitem__, 4, MARGIN, BOUND).level == 1


def test_expected_loss_is_at_most_the_margin_and_the_margin_is_used():
    """Mean loss of a new example over many calibrations, by the theorem's own randomness."""
    rng = np.random.default_rng(0)
    fresh = []
    for _ in range(400):
        loss_ln = planted(rng, 101)
        found = least_controlled(loss_ln[:, :100].__getitem__, LEVELS, MARGIN, BOUND)
        fresh.append(loss_ln[found.level, 100])
    error = np.std(fresh) / np.sqrt(len(fresh))
    assert np.mean(fresh) <= MARGIN + 2 * error
    assert np.mean(fresh) >= 0.6 * MARGIN


def test_the_last_level_is_taken_if_nothing_else_is_controlled():
    loss_ln = np.ones((4, 60))
    loss_ln[-1] = 0
    assert least_controlled(loss_ln.__getitem__, 4, MARGIN, BOUND).level == 3


def test_too_few_documents_for_the_margin():
    with pytest.raises(InputError, match="8 calibration documents; allowed: at least 10"):
        least_controlled(lambda _: np.zeros(8), 3, MARGIN, BOUND)
    assert least_controlled(lambda _: np.zeros(10), 3, MARGIN, BOUND).level == 0


def test_no_level_within_the_margin():
    with pytest.raises(InputError, match=r"a risk of 0.3\d*; allowed: at most the margin, 0.1"):
        least_controlled(lambda _: np.full(99, 0.3), 3, MARGIN, BOUND)
