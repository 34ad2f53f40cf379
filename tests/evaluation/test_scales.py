"""One scale of the experts' output, fitted on text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.evaluation.scales import TOLERANCE, fit_scale
from moe_routing.routing.strategies import parse_strategy

STRATEGY = parse_strategy("regular_k2_scaled")


@pytest.fixture(scope="module")
def texts(rows):
    return [row["passage"] for row in rows("wikipedia")[:4]]


def loss_at(nano, calibration, texts, scale):
    scaled = replace(calibration, scales={STRATEGY.id: scale})
    with routed(nano.model, STRATEGY, calibration=scaled):
        scores = Scorer(nano.model, nano.tokenizer).score_rolling(texts)
    return -sum(score.log_likelihood for score in scores)


def test_the_scale_has_the_smallest_loss(nano, calibration, texts):
    scale = fit_scale(nano.model, nano.tokenizer, texts, STRATEGY, calibration)
    best = loss_at(nano, calibration, texts, scale)
    assert scale > 1.1  # two experts of eight leave the output too small
    for other in (1.0, scale - 5 * TOLERANCE, scale + 5 * TOLERANCE):
        assert loss_at(nano, calibration, texts, other) > best


def test_a_scale_of_one_changes_nothing(nano, calibration, texts):
    with routed(nano.model, "regular_k2"):
        scores = Scorer(nano.model, nano.tokenizer).score_rolling(texts)
    plain = -sum(score.log_likelihood for score in scores)
    assert loss_at(nano, calibration, texts, 1.0) == pytest.approx(plain, rel=1e-9)
