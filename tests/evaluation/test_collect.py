"""Cells and controls become two tables of the same columns, and one of all metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.evaluation.collect import write_tables
from moe_routing.evaluation.record import (
    SCHEMA_VERSION,
    CellRecord,
    Provenance,
    RoutingSummary,
    Timings,
    specification,
)
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.estimate import Estimate

CONFIG = Path(__file__).parents[2] / "config" / "config.yaml"
METRIC = {
    "wikipedia": ("perplexity", "token_perplexity"),
    "hellaswag": ("multiple_choice", "gold_bits_per_byte"),
    "lambada": ("last_word", "gold_bits_per_byte"),
}
PROVENANCE = Provenance(
    path="model", revision="", dtype="float32", device="cpu", experts_implementation="dropless",
    router_fingerprint="f" * 64, weights_sha256="0" * 64, token_budget=128, data_sha256="1" * 64,
    seed=0, python="3.11.0", packages={"torch": "2.13.0"}, commit="unknown",
)  # fmt: skip


def record_of(strategy_id, dataset, **changes):
    task, metric = METRIC[dataset]
    values = {
        "schema_version": SCHEMA_VERSION,
        "study": "default",
        "strategy": specification(parse_strategy(strategy_id), ModelRule(8, "softmax")),
        "dataset": dataset,
        "task": task,
        "n_items": 7,
        "metrics": tuple(
            Estimate(name, 1.0, 0.5, 2.0, n) for name, n in ((metric, 7), ("kl_from_baseline", 3))
        ),
        "routing": RoutingSummary(9, *[1.0] * 7, {"mean_experts": [1.0]}),
        "timings": Timings(2.0, 4.5, 1.0),
        "provenance": PROVENANCE,
    }
    return CellRecord(**(values | changes))


@pytest.fixture
def results(tmp_path):
    for strategy_id in (*load_config(CONFIG).scored, "perlayer_k6"):
        for dataset in METRIC:
            record_of(strategy_id, dataset).write(cell_file(tmp_path, strategy_id, dataset))
    return tmp_path


def cell_file(results, strategy_id, dataset):
    return results / "cells" / strategy_id / f"{dataset}.json"


def tables_of(results, **changes):
    config = load_config(CONFIG).model_copy(update=changes)
    write_tables(config, results)
    names = ("full_routing_results", "controls", "all_metrics")
    tables = (results / "comparison" / f"{name}.csv" for name in names)
    return config, *(pd.read_csv(path, keep_default_na=False) for path in tables)


def test_the_69_cells_beside_the_baseline_stay_and_controls_have_a_table_of_their_own(results):
    config, cells, controls, metrics = tables_of(results)
    assert (cells["strategy"] != config.statistics.baseline).sum() == 69
    assert len(cells) == 69 + 3
    assert cells["strategy"].drop_duplicates().tolist() == config.strategies
    assert controls["strategy"].tolist() == [name for name in config.controls for _ in range(3)]
    assert controls["dataset"].tolist() == list(config.datasets) * len(config.controls)
    assert list(controls.columns) == list(cells.columns)
    levers = len(config.levers) * len(config.datasets)
    assert len(metrics) == 2 * (len(cells) + len(controls) + levers)
    shuffle = controls.set_index("strategy").loc["shuffle.bh_k8_a005"].iloc[0]
    assert (shuffle["family"], shuffle["k"], shuffle["null"]) == ("shuffle", 8, "needed")
    assert (cells != "").all(axis=None)
    assert (controls != "").all(axis=None)


def test_without_controls_their_table_has_a_header_only(results):
    _, with_controls, _, _ = tables_of(results)
    _, cells, controls, metrics = tables_of(results, controls=[], levers=[])
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


def test_a_record_that_lacks_a_key_is_one_line(results):
    path = cell_file(results, "regular_k1", "lambada")
    values = json.loads(path.read_text())
    del values["provenance"]["data_sha256"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        tables_of(results)
    assert str(caught.value) == (
        f"{path}: key 'data_sha256' is missing; remove the file and run again"
    )


@pytest.mark.parametrize(
    ("changes", "ending", "timings"),
    [
        ({}, "provenance", ["wall_seconds", "tokens_per_second", "divergence_seconds"]),
        (
            {"timings": Timings(2.0, 4.5), "numerics": {"arm": "half", "dtype": "bfloat16"}},
            "numerics",
            ["wall_seconds", "tokens_per_second"],
        ),
    ],
)
def test_a_record_reads_back_as_it_was_written(tmp_path, changes, ending, timings):
    record = record_of("bh_k8_a005", "lambada", **changes)
    path = tmp_path / "cell.json"
    record.write(path)
    values = json.loads(path.read_text())
    assert list(values)[:4] == ["schema_version", "study", "strategy", "dataset"]
    assert list(values)[-1] == ending
    assert list(values["timings"]) == timings
    assert CellRecord.read(path) == record


def test_the_table_of_cells_shows_the_main_metric_of_the_config(tmp_path):
    for name, metric in (("accuracy_norm", "accuracy_norm"), ("gold_margin", "gold_margin")):
        config = load_config(CONFIG)
        hellaswag = config.datasets["hellaswag"].model_copy(update={"main_metric": name})
        config = config.model_copy(
            update={
                "strategies": ["stock"], "controls": [], "levers": [],
                "datasets": {"hellaswag": hellaswag},
            }
        )  # fmt: skip
        estimates = (Estimate("accuracy", 9.0, 8.0, 10.0, 7), Estimate(metric, 1.0, 0.5, 2.0, 7))
        record = record_of("stock", "hellaswag", metrics=estimates)
        record.write(cell_file(tmp_path, "stock", "hellaswag"))
        write_tables(config, tmp_path)
        table = pd.read_csv(tmp_path / "comparison" / "full_routing_results.csv")
        assert table[["metric", "value"]].to_numpy().tolist() == [[metric, 1.0]]
