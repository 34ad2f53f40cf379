"""Conformal risk control keeps its promise, and its search finds what a full search finds."""

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
def test_it_finds_the_level_of_a_full_search(seed):
    loss_ln = planted(np.random.default_rng(seed), 150)
    found = least_controlled(loss_ln.__getitem__, LEVELS, MARGIN, BOUND)
    assert found.level == full_search(loss_ln)
    assert len(found.mean_losses) <= 1 + np.ceil(np.log2(LEVELS))
    assert found.mean_losses[found.level] == pytest.approx(loss_ln[found.level].mean())


def test_few_levels_are_tried_where_the_logarithm_of_the_risk_is_nearly_linear():
    """The mean divergences of the embedded model by budget, in steps of 1/40 expert."""
    budget, damage = np.array([0, 2, 2.5, 3, 4, 8]), [0.2, 0.0221, 0.0131, 0.0083, 0.0034, 1e-7]
    log_l = np.interp(np.arange(1, 321) / 40, budget, np.log(damage))
    found = least_controlled(lambda level: np.full(128, np.exp(log_l[level])), 320, 0.01, 0.1)
    risk_l = np.array([risk(np.full(128, np.exp(log)), 0.1) for log in log_l])
    assert found.level == np.flatnonzero(risk_l <= 0.01)[0]
    assert len(found.mean_losses) <= 5  # by bisection: 9


@pytest.mark.parametrize("jump", [0, 1, 100, 318])
def test_a_risk_that_falls_all_at_once_is_found_in_logarithmic_time(jump):
    found = least_controlled(
        lambda level: np.full(99, 1.0 if level <= jump else 1e-9), 320, MARGIN, BOUND
    )
    assert found.level == jump + 1
    assert len(found.mean_losses) <= 3 * np.ceil(np.log2(320))


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
