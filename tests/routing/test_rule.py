"""A model's own rule, and strategies that leave something to it."""

from __future__ import annotations

import pytest
import torch

from moe_routing.errors import InputError
from moe_routing.evaluation.record import specification
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy

RAW, RENORMALISED = ModelRule(8, "softmax"), ModelRule(8, "renormalised")


@pytest.mark.parametrize(
    ("strategy", "raw", "renormalised"),
    [
        ("stock", "regular_k8", "normalized_k8"),
        ("stock_k4", "regular_k4", "normalized_k4"),
        ("regular_k8", "regular_k8", "regular_k8"),
        ("bh_k8_a005", "bh_k8_a005_softmax", "bh_k8_a005_renormalised"),
        ("shuffle.bh_k8_a005", "shuffle.bh_k8_a005_softmax", "shuffle.bh_k8_a005_renormalised"),
        ("bh_k8_a005_uniform", "bh_k8_a005_uniform", "bh_k8_a005_uniform"),
        ("adaptive_k8", "adaptive_k8", "adaptive_k8"),
    ],
)
def test_what_is_left_to_the_model_is_filled_in(strategy, raw, renormalised):
    parsed = parse_strategy(strategy)
    assert parsed.resolved(RAW).id == raw
    assert parsed.resolved(RENORMALISED).id == renormalised


def test_a_record_has_the_weights_that_were_used():
    for rule, weighting in ((RAW, "softmax"), (RENORMALISED, "renormalised")):
        for strategy in ("stock", "minp_k8_t010", "randomid.bh_k8_a005"):
            assert specification(parse_strategy(strategy), rule)["weighting"] == weighting
    stock = specification(parse_strategy("stock"), RAW)
    assert (stock["id"], stock["family"], stock["k"]) == ("stock", "stock", 8)


def test_an_old_description_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^model.json: key 'weighting' is missing; remove"):
        ModelRule.of({"top_k": 8})


def test_the_scale_of_own_weights():
    probability_TE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert ModelRule(2, "softmax").scale(probability_TE) is None
    scale_T1 = ModelRule(2, "renormalised").scale(probability_TE)
    torch.testing.assert_close(scale_T1, torch.tensor([[1 / 0.8], [1 / 0.9]]))
