"""Levers start from the points of the model's own static curve that the study scores anyway."""

from __future__ import annotations

from pathlib import Path

from moe_routing.config.study import load_config
from moe_routing.routing.rule import ModelRule
from moe_routing.statistics.study_tables import static_points

CONFIG = Path(__file__).resolve().parents[2] / "config" / "config.yaml"


def test_points_below_the_models_top_k_in_its_own_weights():
    config = load_config(CONFIG)
    found = static_points(config, ModelRule(8, "softmax"))
    assert found == [f"regular_k{k}" for k in (2, 4, 6, 1, 3)]


def test_a_model_that_renormalises_starts_from_renormalised_weights():
    config = load_config(CONFIG)
    found = static_points(config, ModelRule(5, "renormalised"))
    assert found == [f"normalized_k{k}" for k in (2, 4, 1)]
    stock = config.model_copy(update={"strategies": ["stock", "stock_k2", "normalized_k2"]})
    assert static_points(stock, ModelRule(5, "renormalised")) == ["stock_k2", "normalized_k1"]
