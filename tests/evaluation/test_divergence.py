"""KL from the baseline, against plain model calls and torch's own divergence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_routing.config.study import load_config
from moe_routing.data.tasks import load_items
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.requests import Encoder, Request
from moe_routing.engine.routed import routed
from moe_routing.evaluation import divergence
from moe_routing.evaluation.cells import score_items
from moe_routing.evaluation.divergence import (
    BaselineDivergence,
    divergence_subset,
    next_token_divergences,
)
from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.intervals import divergence_interval

ROOT = Path(__file__).parents[2]
TASKS = {"wikipedia": "perplexity", "hellaswag": "multiple_choice", "lambada": "last_word"}
WINDOW = 96


@pytest.fixture(scope="module")
def config():
    study = load_config(ROOT / "config" / "smoke.yaml")
    evaluation = study.evaluation.model_copy(update={"window": WINDOW, "token_budget": 400})
    return study.model_copy(update={"evaluation": evaluation})


def items_of(dataset, count):
    return load_items(dataset, ROOT / "tests" / "data_files" / f"{dataset}.jsonl")[:count]


def slow_divergence(model, tokenizer, strategy, item, task, calibration):
    """Return the divergence of an item: a plain call a window and strategy, then kl_div."""
    encoder = Encoder(tokenizer, WINDOW)
    if task == "perplexity":
        windows = encoder.rolling([item.continuations[0]])[0]
    else:
        windows = encoder.requests([Request(item.context, item.continuations[item.label or 0])])
    total = 0.0
    for window in windows:
        logits = []
        for arm in ("regular_k8", strategy):
            with routed(model, arm, calibration=calibration), torch.no_grad():
                row = model(torch.tensor([window.input_ids]), use_cache=False).logits[0]
            logits.append(row[-len(window.target_ids) :])
        reference, other = logits
        total += F.kl_div(other.log_softmax(-1), reference.softmax(-1), reduction="sum").item()
    return total


def divergences(loaded, items, dataset, config, calibration, *strategies):
    """Return the divergences of strategies, by the baseline's one pass."""
    baseline = BaselineDivergence(loaded, items, TASKS[dataset], config, calibration)
    found = []
    for strategy in map(parse_strategy, strategies):
        scored = score_items(loaded, strategy, items, dataset, config, calibration, baseline)
        found.append(dict(zip(scored.items["id"], scored.items["kl"], strict=True)))
    return found


@pytest.mark.parametrize("dataset", TASKS)
@pytest.mark.parametrize("strategy", ["regular_k2", "bh_k8_a005_within-token"])
def test_divergence_is_that_of_plain_calls(
    double, tokenizer, calibration, config, dataset, strategy
):
    items = items_of(dataset, 2)
    loaded = LoadedModel(double, tokenizer, {})
    (found,) = divergences(loaded, items, dataset, config, calibration, strategy)
    assert list(found) == [item.id for item in items]
    for item in items:
        slow = slow_divergence(double, tokenizer, strategy, item, TASKS[dataset], calibration)
        # Routers weigh in single precision, also those of a model in double.
        assert found[item.id] == pytest.approx(slow, rel=2e-5)
        assert slow > 1e-3


def test_it_does_not_depend_on_the_strategies_before(nano, config):
    items = items_of("lambada", 3)
    first, second = divergences(nano, items, "lambada", config, None, "uniform_k2", "regular_k4")
    assert first != second
    assert [second] == divergences(nano, items, "lambada", config, None, "regular_k4")


def test_of_the_baseline_it_is_exactly_zero(nano, config):
    items = items_of("hellaswag", 3)
    (found,) = divergences(nano, items, "hellaswag", config, None, "regular_k8")
    assert found == {item.id: 0.0 for item in items}


def test_of_the_same_routing_by_another_name_it_is_rounding(nano, config):
    statistics = config.statistics.model_copy(update={"baseline": "topp_k8_p09999999"})
    study = config.model_copy(update={"statistics": statistics})
    items = items_of("lambada", 3)
    (found,) = divergences(nano, items, "lambada", study, None, "regular_k8")
    assert all(0 <= value < 1e-6 for value in found.values())


def test_items_that_are_not_measured_on_have_none(nano, config):
    items = items_of("hellaswag", 3)
    baseline = BaselineDivergence(nano, items[1:2], "multiple_choice", config, None)
    strategy = parse_strategy("regular_k2")
    table = score_items(nano, strategy, items, "hellaswag", config, None, baseline).items
    assert table["kl"].notna().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_are_the_whole(dtype, monkeypatch):
    monkeypatch.setattr(divergence, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 300, bias=False).to(dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(300, 16, generator=generator))
    p_NH, q_NH = torch.randn(2, 50, 16, generator=generator).to(dtype)
    found = next_token_divergences(layer, p_NH, q_NH)
    p_NV, q_NV = (layer(rows).double().log_softmax(-1) for rows in (p_NH, q_NH))
    slow = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
    assert found.dtype == torch.float64
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, slow, rtol=rtol, atol=rtol)
    assert (next_token_divergences(layer, p_NH, p_NH) == 0).all()
    nearly = p_NH + torch.full_like(p_NH, 1e-7)
    assert (next_token_divergences(layer, p_NH, nearly) >= 0).all()


def test_the_subset_depends_on_seed_and_set_only(config):
    items = items_of("hellaswag", 30)
    chosen = divergence_subset(items, "hellaswag", config)
    assert len(chosen) == config.evaluation.kl_items == 4
    assert divergence_subset(items[::-1], "hellaswag", config) == chosen[::-1]
    assert divergence_subset(items, "lambada", config) != chosen
    other = config.model_copy(update={"seed": 1})
    assert divergence_subset(items, "hellaswag", other) != chosen
    assert divergence_subset(items[:3], "hellaswag", config) == items[:3]
    off = config.evaluation.model_copy(update={"kl_items": 0})
    assert divergence_subset(items, "x", config.model_copy(update={"evaluation": off})) == []


def interval(frame):
    rng = np.random.default_rng(0)
    return divergence_interval(frame, confidence=0.95, resamples=500, rng=rng)


def test_the_mean_is_weighted_by_tokens_over_the_items_measured():
    rng = np.random.default_rng(1)
    kl = rng.exponential(2.0, 30)
    kl[::3] = np.nan
    tokens = rng.integers(5, 300, 30)
    frame = pd.DataFrame({"cluster": np.arange(30) // 2, "tokens": tokens, "kl": kl})
    (found,) = interval(frame)
    there = ~np.isnan(kl)
    assert found.metric == "kl_from_baseline"
    assert found.value == pytest.approx(kl[there].sum() / tokens[there].sum())
    assert 0 <= found.low < found.value < found.high
    assert found.n == 20
    (zero,) = interval(frame.assign(kl=0.0))
    assert (zero.value, zero.low, zero.high, zero.n) == (0, 0, 0, 30)


def test_nothing_measured_is_no_metric():
    frame = pd.DataFrame({"cluster": [0, 0, 1], "tokens": [3, 4, 5], "kl": [0.1, 0.2, np.nan]})
    assert interval(frame) == []
    assert interval(frame.assign(kl=np.nan)) == []
