"""Bits per byte and margin of the right continuation, from the log-likelihoods of an item."""

from __future__ import annotations

import math

import pytest
from documents import ROOT

from moe_routing.config.study import load_config
from moe_routing.data.tasks import load_items
from moe_routing.evaluation.cells import score_items
from moe_routing.routing.strategies import parse_strategy


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "wikipedia"])
def test_they_follow_from_the_stored_log_likelihoods(nano, name):
    config = load_config(ROOT / "config" / "smoke.yaml")
    items = load_items(name, ROOT / "tests" / "data_files" / f"{name}.jsonl")[:3]
    table = score_items(nano, parse_strategy("stock"), items, name, config, None).items
    for item, (_, row) in zip(items, table.iterrows(), strict=True):
        likelihoods = list(row["log_likelihoods"])
        assert len(likelihoods) == len(item.continuations)
        if name == "wikipedia":
            assert row[["gold_bytes", "gold_bits_per_byte", "gold_margin"]].isna().all()
            continue
        gold = likelihoods.pop(item.label)
        # Continuations begin with a space, which is not part of the ending.
        text = item.continuations[item.label][1:]
        assert gold == row["log_likelihood"]
        assert row["gold_bytes"] == len(text.encode("utf-8"))
        bits = -gold / math.log(2) / len(text.encode("utf-8"))
        assert row["gold_bits_per_byte"] == pytest.approx(bits, abs=1e-9)
        if name == "hellaswag":
            assert row["gold_margin"] == pytest.approx(gold - max(likelihoods), abs=1e-9)
        else:
            assert row["gold_margin"] is None
