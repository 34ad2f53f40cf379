"""Free parameters fitted to budgets by running the embedded model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_routing.engine.recorder import Recorder
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.evaluation.budgets import ALLOWED, fit_budget
from moe_routing.routing.strategies import parse_strategy

NAMES = ["topp_k8_b3", "bh_k8_b4", "layered_k8_b3", "absolute_k8_b2_consequence_compensated"]


@pytest.fixture(scope="module")
def texts(rows):
    return [row["passage"] for row in rows("wikipedia")[:8]]


@pytest.fixture(scope="module")
def fit(nano, calibration, texts):
    def run(name):
        strategy = parse_strategy(name)
        return fit_budget(nano.model, nano.tokenizer, texts, strategy, calibration)

    return run


@torch.inference_mode()
def slow_means(nano, calibration, texts, strategy) -> np.ndarray:
    """Mean experts by layer, by whole forward passes over one document after another."""
    recorder = Recorder()
    with routed(nano.model, strategy, calibration=calibration, recorder=recorder):
        for text in texts:
            ids = nano.tokenizer(text, add_special_tokens=False)["input_ids"]
            nano.model(torch.tensor([[nano.tokenizer.eos_token_id, *ids][: len(ids)]]))
    return recorder.statistics().mean_experts_L()


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_realised_by_running(nano, calibration, texts, fit, name):
    found, strategy = fit(name), parse_strategy(name)
    assert found.status == "fitted"
    known = replace(calibration, budgets={name: found})
    slow_L = slow_means(nano, known, texts, strategy)
    np.testing.assert_allclose(slow_L, found.realised_by_layer, atol=2e-3)
    assert slow_L.mean() == pytest.approx(found.realised, abs=1e-3)
    assert abs(found.realised - strategy.budget) <= ALLOWED
    if strategy.by_layer:
        assert np.abs(slow_L - strategy.budget).max() <= ALLOWED


def test_the_value_is_that_of_a_grid_scanned_by_running(nano, calibration, texts, fit):
    """The slow twin: every mass of a grid is run, and the closest to the budget is taken."""
    found, strategy = fit("topp_k8_b3"), parse_strategy("topp_k8_b3")
    grid = np.arange(0.2, 0.42, 0.02)
    means = [slow_means(nano, calibration, texts, strategy.at(float(mass))).mean() for mass in grid]
    assert (np.diff(means) > 0).all()
    # Its neighbours keep fewer and more.
    assert found.value == pytest.approx(np.interp(3, means, grid), abs=0.01)


def test_running_moves_what_the_sample_promised(nano, calibration, texts, fit):
    """Later layers read other states: the quantile of the stock states misses the budget."""
    name = "absolute_k8_b2_consequence_compensated"
    strategy = parse_strategy(name)
    first = strategy.on_sample(calibration, 64)([2.0])
    promised = slow_means(nano, calibration, texts, strategy.at(first)).mean()
    assert abs(fit(name).realised - 2) <= abs(promised - 2)


def test_a_budget_beyond_the_limits_is_left_out_with_its_reason(fit):
    found = fit("bh_k8_b1")
    assert (found.status, found.value) == ("left out", None)
    assert found.reason.startswith("no alpha keeps 1 experts per token on calibration text: 0.01")
    assert "the limit, keeps" in found.reason
    assert found.realised > 1 + ALLOWED


def test_a_fit_is_the_same_to_the_byte(fit, tmp_path):
    for name in ("one", "other"):
        fit("layered_k8_b3").save(tmp_path / f"{name}.json")
    one, other = ((tmp_path / f"{name}.json").read_bytes() for name in ("one", "other"))
    assert one == other
    assert set(json.loads(one)) == {
        "strategy", "parameter", "value", "budget", "realised", "realised_by_layer", "tokens",
        "status", "reason",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mixture_b25", "mixture.topp_k8_p030", "counts.topp_k8_p030"])
def test_draws_do_not_depend_on_batches(nano, texts, name):
    """Small batches, one worker or several, shared contexts or not: the same experts."""
    strategy = parse_strategy(name)
    if strategy.needs_cell:
        recorder = Recorder()
        with routed(nano.model, "topp_k8_p030", recorder=recorder):
            Scorer(nano.model, nano.tokenizer, recorder=recorder).score_rolling(texts)
        strategy = strategy.like(recorder.statistics().count_histogram_LC)
        expected = recorder.statistics().mean_experts()
    else:
        expected = 2.5
    seen = []
    for settings in ({}, {"token_budget": 256}, {"workers": 3, "token_budget": 512}):
        recorder = Recorder()
        with routed(nano.model, strategy, recorder=recorder):
            scores = Scorer(
                nano.model, nano.tokenizer, recorder=recorder, **settings
            ).score_rolling(texts)
        statistics = recorder.statistics()
        seen.append([score.mean_experts for score in scores])
        # 16 layers of about 1,000 tokens.
        assert statistics.mean_experts() == pytest.approx(expected, abs=0.03)
    np.testing.assert_allclose(seen[1], seen[0], atol=1e-3)
    np.testing.assert_allclose(seen[2], seen[0], atol=1e-3)


def test_shared_contexts_draw_alike(nano, texts):
    from moe_routing.engine.requests import Request

    requests = [Request(texts[0], f" {word}") for word in ("one", "two things", "many more")]
    found = []
    for share in (True, False):
        scorer = Scorer(
            nano.model, nano.tokenizer, recorder=(recorder := Recorder()), share_prefixes=share
        )
        with routed(nano.model, "mixture_b25", recorder=recorder):
            found.append([score.log_likelihood for score in scorer.score(requests)])
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)
