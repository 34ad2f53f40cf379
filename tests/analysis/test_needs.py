"""Needed experts and their classes equal counts by hand; differences are found where they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted_pairs import EXPERTS, LAYERS, TOP_K, planted_pairs

from moe_routing.analysis.needs import (
    class_contrasts,
    counts,
    needed_experts,
    presence,
    token_classes,
)

TOKENS = 120
EPSILONS = [0.01, 0.1]
SETTINGS = {"confidence": 0.95, "resamples": 400}


@pytest.fixture
def tokens(rng):
    return pd.DataFrame(
        {
            "frequency": rng.permutation(TOKENS),
            "position": np.arange(TOKENS) % 30,
            "loss": rng.permutation(TOKENS) / 10,
            "word_start": np.arange(TOKENS) % 4 > 0,
        }
    )


@pytest.fixture
def effects(rng):
    return 0.02 * np.exp(rng.normal(0, 1.5, (LAYERS, TOKENS, EXPERTS)))


def test_thirds_are_ordered_and_hold_every_token(tokens):
    classes = token_classes(tokens)
    assert {group: len(parts) for group, parts in classes.items()} == {
        "frequency": 3, "position": 3, "loss": 3, "word_start": 2,
    }  # fmt: skip
    for parts in classes.values():
        assert (sum(chosen_T.astype(int) for chosen_T in parts.values()) == 1).all()
    frequency = {name: tokens["frequency"][c] for name, c in classes["frequency"].items()}
    assert {len(values) for values in frequency.values()} == {40}
    assert frequency["rare"].max() < frequency["middle"].min()
    assert frequency["middle"].max() < frequency["frequent"].min()
    assert classes["word_start"]["word start"].tolist() == tokens["word_start"].tolist()


def test_equal_values_are_in_one_class(tokens):
    tokens["frequency"] = [7] * 100 + [9] * 20
    sizes = {name: chosen.sum() for name, chosen in token_classes(tokens)["frequency"].items()}
    assert sizes == {"rare": 100, "middle": 0, "frequent": 20}


def test_needed_experts_by_hand(tokens, effects, rng):
    pairs = planted_pairs(effects, per_document=3)
    table = needed_experts(pairs, tokens, EPSILONS, **SETTINGS, rng=rng)
    assert len(table) == 12 * (LAYERS + 1) * 2
    assert (table["low"] <= table["mean"]).all()
    assert (table["mean"] <= table["high"]).all()
    table = table.set_index(["class", "layer", "epsilon"])
    rare = token_classes(tokens)["frequency"]["rare"]
    for epsilon in EPSILONS:
        # Experts beyond the own choice do not count, whatever they change.
        count_LT = (effects[..., :TOP_K] >= epsilon).sum(-1)
        row = table.loc[("all tokens", "1", epsilon)]
        assert row["mean"] == pytest.approx(count_LT[1].mean())
        assert row["none"] == pytest.approx((count_LT[1] == 0).mean())
        assert row["every"] == pytest.approx((count_LT[1] == TOP_K).mean())
        assert (row["n_tokens"], row["n_documents"]) == (TOKENS, TOKENS / 3)
        row = table.loc[("rare", "all", epsilon)]
        assert row["mean"] == pytest.approx(count_LT[:, rare].mean())
        assert row["n_tokens"] == rare.sum()
    assert np.array_equal(counts(pairs, EPSILONS)[..., 1].T, (effects[..., :TOP_K] >= 0.1).sum(-1))


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_difference_between_classes_is_found_where_it_is(tokens, effects, rng, factor):
    """Tokens before a badly predicted one have larger effects, or have not."""
    high = token_classes(tokens)["loss"]["high"]
    effects[:, high] *= factor
    pairs = planted_pairs(effects, per_document=3)
    table = class_contrasts(pairs, tokens, EPSILONS, **SETTINGS, rng=rng)
    assert len(table) == 4 * len(EPSILONS)
    row = table.set_index(["group", "epsilon"]).loc[("loss", 0.1)]
    assert (row["first"], row["second"]) == ("low", "high")
    low = token_classes(tokens)["loss"]["low"]
    count_LT = (effects[..., :TOP_K] >= 0.1).sum(-1)
    expected = count_LT[:, high].mean() - count_LT[:, low].mean()
    assert row["difference"] == pytest.approx(expected)
    assert (row["low"] > 0) == (factor > 1)
    assert row["low"] < row["difference"] < row["high"]


def test_the_interval_of_a_difference_covers_it():
    """Documents hold tokens of both classes, of one, or of none, and share their level."""
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        level_T = np.repeat(rng.normal(0, 1.0, TOKENS // 3), 3)
        effects = 0.02 * np.exp(rng.normal(0, 1, (1, TOKENS, EXPERTS)) + level_T[:, None])
        frame = pd.DataFrame(
            {name: rng.random(TOKENS) for name in ("frequency", "position", "loss")}
        ).assign(word_start=rng.random(TOKENS) < 0.5)
        pairs = planted_pairs(effects, per_document=3)
        row = class_contrasts(pairs, frame, [0.02], **SETTINGS, rng=rng).iloc[0]
        inside += row["low"] <= 0 <= row["high"]
    assert 88 <= inside <= 100


def test_presence_by_hand(effects, rng):
    gain = effects * rng.choice([-1, 1], effects.shape, p=[0.3, 0.7])
    pairs = planted_pairs(effects, gain, toggle_all=True)
    table = presence(pairs, EPSILONS, confidence=0.95).set_index(["epsilon", "part", "layer"])
    some, positive = effects >= 0.1, gain > 0
    for part, here in {"removed": slice(TOP_K), "added": slice(TOP_K, None)}.items():
        row = table.loc[(0.1, part, "all")]
        assert row["mean_experts"] == pytest.approx(some[..., here].sum(-1).mean())
        assert row["lowers_loss"] == pytest.approx(positive[..., here][some[..., here]].mean())
        assert row["low"] < row["lowers_loss"] < row["high"]
        assert row["n_toggled"] == some[..., here].sum()
        assert table.loc[(0.1, part, "0"), "mean_experts"] == pytest.approx(
            some[0, :, here].sum(-1).mean()
        )


def test_added_experts_count_by_weight(rng):
    effects = np.full((LAYERS, TOKENS, EXPERTS), 0.2)
    table = presence(planted_pairs(effects), [0.1], confidence=0.95)
    table = table.set_index(["part", "layer"])
    assert table.loc[("added", "all"), "mean_experts"] == pytest.approx(EXPERTS - TOP_K)
    assert table.loc[("added", "all"), "lowers_loss"] == 1
    none = presence(planted_pairs(effects), [0.5], confidence=0.95).set_index(["part", "layer"])
    assert none.loc[("added", "all"), "n_toggled"] == 0
    assert np.isnan(none.loc[("added", "all"), "lowers_loss"])
