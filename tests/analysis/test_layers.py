"""Statistics by layer equal slow loops, torch and known values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from moe_routing.analysis.layers import (
    expert_load,
    gini,
    layer_table,
    max_mean_load,
    token_statistics,
    top_experts,
)


@pytest.fixture
def logits(rng):
    return rng.normal(-1, 1.5, (3, 60, 8)).astype(np.float32)


@pytest.fixture
def table(logits, rng):
    document_T = np.repeat(np.arange(12), 5)
    return layer_table(logits, document_T, 3, confidence=0.95, resamples=300, rng=rng)


def test_token_statistics_equal_a_loop_over_tokens(logits):
    found = token_statistics(logits, 3)
    for layer, logits_TE in enumerate(logits):
        for token, logits_E in enumerate(logits_TE):
            weight_E = torch.from_numpy(logits_E).double().softmax(0)
            assert found["avg_max_weight"][layer, token] == pytest.approx(float(weight_E.max()))
            entropy = float(stats.entropy(weight_E.numpy()))
            assert found["entropy"][layer, token] == pytest.approx(entropy)
            mass = float(weight_E.topk(3).values.sum())
            assert found["top3_mass"][layer, token] == pytest.approx(mass)


def test_top_experts_are_those_of_torch(logits):
    expected = torch.from_numpy(logits).topk(3).indices.numpy()
    assert np.array_equal(top_experts(logits, 3), expected)


def test_equal_logits_go_by_the_lower_index():
    assert top_experts(np.array([[1.0, 2.0, 2.0, 0.0]]), 3).tolist() == [[1, 2, 0]]


def test_loads_count_every_selection_once(logits):
    index_LTK = top_experts(logits, 3)
    load_LE = expert_load(index_LTK, 8)
    assert load_LE.sum(1).tolist() == [180] * 3
    assert load_LE[1, 5] == sum(5 in row for row in index_LTK[1].tolist())


def test_gini_is_the_mean_absolute_difference(rng):
    load = rng.integers(0, 50, 17)
    expected = np.abs(load[:, None] - load[None]).mean() / (2 * load.mean())
    assert gini(load) == pytest.approx(expected)
    assert gini(rng.permutation(load)) == pytest.approx(expected)


def test_nothing_selected_has_no_balance():
    assert np.isnan(gini([0, 0]))
    assert np.isnan(max_mean_load([0, 0]))


def test_a_uniform_router_has_the_largest_entropy(rng):
    flat = np.zeros((2, 20, 16), dtype=np.float32)
    document_T = np.repeat(np.arange(4), 5)
    row = layer_table(flat, document_T, 4, confidence=0.95, resamples=100, rng=rng).iloc[0]
    assert row["entropy"] == pytest.approx(np.log(16))
    assert row["relative_entropy"] == pytest.approx(1.0)
    assert row["top4_mass"] == pytest.approx(0.25)


def test_table_has_moments_as_scipy_does(table, logits):
    for layer, row in table.iterrows():
        values = logits[layer].ravel().astype(float)
        assert row["logit_skew"] == pytest.approx(stats.skew(values))
        assert row["logit_kurtosis"] == pytest.approx(stats.kurtosis(values, fisher=False))
        assert row["logit_sd"] == pytest.approx(values.std())


def test_intervals_surround_the_mean_and_name_the_sample(table):
    for name in ("avg_max_weight", "entropy", "top3_mass"):
        assert (table[f"{name}_low"] < table[name]).all()
        assert (table[name] < table[f"{name}_high"]).all()
    assert set(table["n_tokens"]) == {60}
    assert set(table["n_documents"]) == {12}


def test_a_single_document_has_no_interval(logits, rng):
    table = layer_table(logits, np.zeros(60, int), 3, confidence=0.9, resamples=100, rng=rng)
    assert table["entropy_low"].isna().all()
    assert table["entropy"].notna().all()
