"""Cells and controls become two tables of the same columns, and one of all metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.evaluation.collect import write_tables
from moe_routing.routing.strategies import parse_strategy

CONFIG = Path(__file__).parents[2] / "config" / "config.yaml"
METRIC = {
    "wikipedia": ("perplexity", "token_perplexity"),
    "hellaswag": ("multiple_choice", "accuracy_norm"),
    "lambada": ("last_word", "accuracy"),
}
ROUTING = (
    "mean_experts", "sd_experts", "floor_proportion", "cap_proportion", "empty_proportion",
    "router_entropy", "max_weight", "tokens",
)  # fmt: skip


@pytest.fixture
def results(tmp_path):
    for strategy_id in (*load_config(CONFIG).scored, "perlayer_k6"):
        strategy = parse_strategy(strategy_id)
        for dataset, (task, metric) in METRIC.items():
            record = {
                "strategy": {
                    "id": strategy.id,
                    "family": strategy.family.name,
                    **strategy.model_dump(),
                    "weighting": strategy.weighting_kind,
                },
                "dataset": dataset,
                "task": task,
                "n_items": 7,
                "metrics": [
                    {"metric": name, "value": 1.0, "low": 0.5, "high": 2.0, "n": n}
                    for name, n in ((metric, 7), ("kl_from_baseline", 3))
                ],
                "routing": dict.fromkeys(ROUTING, 1.0),
                "timings": {"tokens_per_second": 1.0, "wall_seconds": 1.0},
            }
            path = tmp_path / "cells" / strategy.id / f"{dataset}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
    return tmp_path


def tables_of(results, **changes):
    config = load_config(CONFIG).model_copy(update=changes)
    write_tables(config, results)
    names = ("full_routing_results", "controls", "all_metrics")
    tables = (results / "comparison" / f"{name}.csv" for name in names)
    return config, *(pd.read_csv(path, keep_default_na=False) for path in tables)


def test_the_69_cells_stay_and_controls_have_a_table_of_their_own(results):
    config, cells, controls, metrics = tables_of(results)
    assert len(cells) == 69
    assert cells["strategy"].drop_duplicates().tolist() == config.strategies
    assert controls["strategy"].tolist() == [name for name in config.controls for _ in range(3)]
    assert controls["dataset"].tolist() == list(config.datasets) * len(config.controls)
    assert list(controls.columns) == list(cells.columns)
    assert len(metrics) == 2 * (len(cells) + len(controls))
    shuffle = controls.set_index("strategy").loc["shuffle.bh_k8_a005"].iloc[0]
    assert (shuffle["family"], shuffle["k"], shuffle["null"]) == ("shuffle", 8, "within_token")
    assert (cells != "").all(axis=None)
    assert (controls != "").all(axis=None)


def test_without_controls_their_table_has_a_header_only(results):
    _, with_controls, _, _ = tables_of(results)
    _, cells, controls, metrics = tables_of(results, controls=[])
    pd.testing.assert_frame_equal(cells, with_controls)
    assert controls.empty
    assert list(controls.columns) == list(cells.columns)
    assert set(metrics["strategy"]) == set(cells["strategy"])


def test_a_rule_with_a_mean_number_of_experts_has_a_k(results):
    _, _, controls, _ = tables_of(results, controls=["perlayer_k6"])
    assert controls["k"].tolist() == [6] * 3


def test_a_missing_control_is_one_line(results):
    (results / "cells" / "regular_k1" / "lambada.json").unlink()
    with pytest.raises(InputError, match="no such cell; run the workflow again"):
        tables_of(results)
