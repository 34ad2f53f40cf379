"""The benchmark of certificates: its splits, on planted damages."""

from __future__ import annotations

import numpy as np
import pytest

MARGIN = 0.01


@pytest.fixture
def certificates(script):
    return script("certificates")


def planted(documents=200, settings=80):
    """Damages that fall with the number of experts, and the mean experts of each setting."""
    rng = np.random.default_rng(0)
    experts_l = np.linspace(1, 8, settings)
    level_l = 0.2 * np.exp(-experts_l) * (experts_l < 8)
    return level_l[:, None] * rng.gamma(4, 0.25, documents), experts_l


def test_the_promise_is_kept_over_splits_and_most_of_it_is_used(certificates):
    loss_ln, experts_l = planted()
    found = certificates.over_splits(loss_ln, experts_l, MARGIN, 200)
    assert 0.8 * MARGIN < found["held-out KL"] <= MARGIN
    assert found["used"] == pytest.approx(found["held-out KL"] / MARGIN)
    assert 2.5 < found["experts"] < 4


def test_the_rules_go_from_few_experts_to_stock(certificates):
    rules = certificates.rules(8, [1.0, 2.5])
    assert [one.id for one in rules["static"]] == [f"stock_k{k}" for k in range(1, 9)]
    ids = [one.id for one in rules["threshold, consequence, compensated"]]
    assert ids == [
        "absolute_k8_b1_consequence_compensated", "absolute_k8_b25_consequence_compensated", "stock"
    ]  # fmt: skip


def test_a_setting_is_chosen_only_if_all_after_it_are_controlled(certificates):
    loss_ln = np.zeros((3, 50))
    loss_ln[1] = 0.05
    assert certificates.chosen(loss_ln, MARGIN) == 2
    loss_ln[1] = 0
    assert certificates.chosen(loss_ln, MARGIN) == 0
