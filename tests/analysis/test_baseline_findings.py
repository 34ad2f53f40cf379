"""Key findings find what is planted, and nothing in noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moe_routing.analysis.findings import (
    _spearman_rows,
    depth_trend,
    ease_and_weight,
    imbalance,
    loads_by_document,
    spearman,
    spearman_limits,
    within_document_p,
)

SETTINGS = {"confidence": 0.95, "resamples": 400}


@pytest.fixture
def documents():
    return np.repeat(np.arange(40), 10)


def test_spearman_is_scipys(rng):
    a, b = rng.integers(0, 9, 80), rng.normal(size=80)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(np.ones(5), np.arange(5)) == 0.0


def test_correlation_limits_are_centred_on_scipys_and_widen_with_clusters(rng):
    a = rng.normal(size=400)
    b = a + rng.normal(size=400) * 2
    alone = spearman_limits(a, b[None], np.arange(400), **SETTINGS, rng=rng)
    assert alone[0][0] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert alone[1][0] < alone[0][0] < alone[2][0]
    # Ten copies of 40 tokens are 40 tokens, whatever the rows say.
    copies = np.tile(np.arange(40), 10)
    many = spearman_limits(a[:40][copies], b[:40][copies][None], copies, **SETTINGS, rng=rng)
    assert many[2][0] - many[1][0] > 2.5 * (alone[2][0] - alone[1][0])


def test_correlation_limits_cover(rng):
    truth = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman of a normal pair with correlation 0.5
    covered = 0
    for _ in range(150):
        a = rng.normal(size=200)
        b = 0.5 * a + np.sqrt(0.75) * rng.normal(size=200)
        _, low, high = spearman_limits(
            a, b[None], np.arange(200), confidence=0.9, resamples=200, rng=rng
        )
        covered += low[0] <= truth <= high[0]
    assert 0.82 <= covered / 150 <= 0.97


def test_loads_by_document_sum_to_the_loads(rng):
    index_LTK = np.argsort(rng.random((2, 30, 5)), axis=-1)[..., :2]
    document_T = np.repeat([9, 3, 5], 10)
    load_DLE = loads_by_document(index_LTK, document_T, 5)
    assert load_DLE.shape == (3, 2, 5)
    first = index_LTK[1][document_T == 3]
    assert load_DLE[0, 1].tolist() == np.bincount(first.ravel(), minlength=5).tolist()


def test_imbalance_names_the_planted_expert_layer(rng):
    load_DLE = rng.multinomial(200, np.full(8, 1 / 8), size=(30, 3))
    load_DLE[:, 2] = rng.multinomial(200, [0.3] + [0.1] * 7, size=30)
    found = imbalance(load_DLE, **SETTINGS, rng=rng)
    assert found["layer"] == 2
    assert found["low"] < 2.4 < found["high"]
    assert found["balanced_reference"] < 1.2
    assert "layer 2" in found["statement"]


@pytest.mark.parametrize(("slope", "word"), [(-0.1, "falls"), (0.1, "rises")])
def test_a_planted_trend_is_shown_with_its_direction(rng, documents, slope, word):
    entropy_LT = 3 + slope * np.arange(12)[:, None] + rng.normal(0, 0.1, (12, 400))
    found = depth_trend(entropy_LT, documents, **SETTINGS, rng=rng)
    assert found["shown"]
    assert found["low"] <= found["rho"] <= found["high"]
    assert word in found["statement"]


def test_no_trend_is_claimed_without_one(rng, documents):
    """Up and down again: the order of the two slopes is noise."""
    level_L = np.array([1.0, 2, 3, 4, 4, 3, 2, 1])
    entropy_LT = level_L[:, None] + rng.normal(0, 5, (8, 400))
    found = depth_trend(entropy_LT, documents, **SETTINGS, rng=rng)
    assert found["low"] < 0 < found["high"]
    assert found["p_value"] > 0.05
    assert not found["shown"]
    assert "neither" in found["statement"]


def test_layers_that_go_with_their_neighbours_are_no_sample(rng, documents):
    """A random walk over layers: the text says what it is, not how likely such a walk is."""
    walk_L = np.cumsum(rng.normal(0, 0.3, 16))
    entropy_LT = walk_L[:, None] + rng.normal(0, 0.05, (16, 400))
    found = depth_trend(entropy_LT, documents, **SETTINGS, rng=rng)
    assert found["low"] <= stats.spearmanr(np.arange(16), walk_L).statistic <= found["high"]
    assert found["p_value"] >= 2 / (SETTINGS["resamples"] + 1)
    assert "says nothing about other models" in found["statement"]


def test_correlations_with_rows_are_those_of_each_row(rng):
    rows_BL = rng.integers(0, 4, (50, 6)).astype(float)  # with ties
    rows_BL[0] = 1  # which has no order
    expected = [spearman(np.arange(6), row_L) for row_L in rows_BL]
    assert _spearman_rows(np.arange(6), rows_BL).tolist() == expected
    assert expected[0] == 0


def test_the_test_of_a_trend_keeps_its_level_where_documents_share_their_noise(rng):
    """Equal layers, whose sample means differ by what documents have in common alone."""
    documents = np.repeat(np.arange(30), 4)
    shown = 0
    for _ in range(200):
        own_LD = rng.normal(size=(6, 30))
        smooth_LD = (own_LD + np.roll(own_LD, 1, axis=0)) / 2  # neighbours go together
        entropy_LT = smooth_LD[:, documents] + rng.normal(0, 0.2, (6, 120))
        found = depth_trend(entropy_LT, documents, confidence=0.9, resamples=200, rng=rng)
        shown += found["shown"]
    assert shown / 200 <= 0.1 + 3 * np.sqrt(0.09 / 200)


@pytest.mark.parametrize(("sign", "word"), [(-1, "more"), (1, "less")])
def test_a_planted_relation_of_ease_and_weight_is_shown(rng, documents, sign, word):
    loss_T = rng.gamma(2, 1, 400)
    weight_LT = sign * loss_T + rng.normal(0, 1, (3, 400))
    found = ease_and_weight(loss_T, weight_LT, documents, **SETTINGS, rng=rng)
    assert found["shown"]
    assert np.sign(found["rho"]) == sign
    assert f"is {word} confident on easy tokens" in found["statement"]
    assert [row["layer"] for row in found["by_layer"]] == [0, 1, 2]


@pytest.mark.parametrize(("sign", "word"), [(-1, "more"), (1, "less")])
def test_the_relation_within_documents_is_reported_whatever_that_between_them(
    rng, documents, sign, word
):
    """Simpson's paradox: between documents the sign is the opposite one."""
    token_T = rng.normal(size=400)
    loss_T = token_T - sign * 4 * documents
    weight_LT = sign * token_T + 4 * documents + rng.normal(0, 0.3, (3, 400))
    assert sign * spearman(loss_T, weight_LT.mean(0)) < -0.9
    found = ease_and_weight(loss_T, weight_LT, documents, **SETTINGS, rng=rng)
    assert found["shown"]
    assert sign * found["rho"] > 0.5
    assert sign * found["low"] > 0
    assert sign * found["high"] > 0
    assert f"is {word} confident on easy tokens" in found["statement"]
    assert "position in the document is not controlled" in found["statement"]
    # The slow way: rank all tokens, take each document's mean away, correlate.
    ranks = [stats.rankdata(loss_T), stats.rankdata(weight_LT.mean(0))]
    for document in range(40):
        for rank_T in ranks:
            rank_T[documents == document] -= rank_T[documents == document].mean()
    assert found["rho"] == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-9)


def test_a_relation_between_documents_alone_is_not_claimed(rng, documents):
    loss_T = documents + rng.normal(size=400)
    weight_LT = documents + rng.normal(size=(3, 400))
    found = ease_and_weight(loss_T, weight_LT, documents, **SETTINGS, rng=rng)
    assert not found["shown"]
    assert abs(found["rho"]) < 0.2
    assert found["low"] < 0 < found["high"]


def test_no_relation_is_claimed_without_one(rng, documents):
    found = ease_and_weight(
        rng.gamma(2, 1, 400), rng.random((3, 400)), documents, **SETTINGS, rng=rng
    )
    assert not found["shown"]
    assert "was not shown to be more or less confident" in found["statement"]


def test_differences_between_documents_are_no_relation_within_them(rng, documents):
    loss_T = documents + rng.normal(size=400)
    weight_T = documents + rng.normal(size=400)
    assert spearman(loss_T, weight_T) > 0.9
    assert within_document_p(loss_T, weight_T, documents, permutations=199, rng=rng) > 0.01
    weight_T = documents + 0.05 * loss_T
    assert within_document_p(loss_T, weight_T, documents, permutations=199, rng=rng) < 0.01


def test_the_permutation_test_keeps_its_level(rng):
    documents = np.repeat(np.arange(8), 6)
    rejected = sum(
        within_document_p(
            rng.normal(size=48), rng.normal(size=48), documents, permutations=39, rng=rng
        )
        <= 0.1
        for _ in range(400)
    )
    assert rejected / 400 <= 0.1 + 3 * np.sqrt(0.09 / 400)
    assert rejected / 400 >= 0.1 - 3 * np.sqrt(0.09 / 400)


def test_the_seed_decides(documents):
    data = np.random.default_rng(1).random((3, 400))

    def run(seed):
        return ease_and_weight(
            data[0], data, documents, **SETTINGS, rng=np.random.default_rng(seed)
        )

    assert run(1) == run(1)
    assert run(1)["low"] != run(2)["low"]
