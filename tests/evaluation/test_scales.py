"""One scale of the experts' output, fitted on text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.evaluation.scales import fit_scale
from moe_routing.routing.strategies import parse_strategy

STRATEGY = parse_strategy("regular_k2_scaled")


@pytest.fixture(scope="module")
def texts(rows):
    return [row["passage"] for row in rows("wikipedia")[:8]]


def loss_at(nano, calibration, texts, scale):
    scaled = replace(calibration, scales={STRATEGY.id: scale})
    with routed(nano.model, STRATEGY, calibration=scaled):
        scores = Scorer(nano.model, nano.tokenizer).score_rolling(texts)
    return -sum(score.log_likelihood for score in scores)


def test_the_scale_has_the_smallest_loss(nano, calibration, texts):
    scale = fit_scale(nano.model, nano.tokenizer, texts, STRATEGY, calibration)
    grid = [loss_at(nano, calibration, texts, other) for other in np.arange(0.85, 1.61, 0.15)]
    assert scale > 1.1  # two experts of eight leave the output too small
    plain = loss_at(nano, calibration, texts, 1.0)
    # What it misses is little beside what it gains.
    assert loss_at(nano, calibration, texts, scale) - min(grid) < 0.1 * (plain - min(grid))


def test_a_scale_of_one_changes_nothing(nano, calibration, texts):
    with routed(nano.model, "regular_k2"):
        scores = Scorer(nano.model, nano.tokenizer).score_rolling(texts)
    plain = -sum(score.log_likelihood for score in scores)
    assert loss_at(nano, calibration, texts, 1.0) == pytest.approx(plain, rel=1e-9)
