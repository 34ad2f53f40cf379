"""Cells and controls become two tables of the same columns, and one of all metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from moe_routing.config.cells import SCHEMA_VERSION
from moe_routing.config.study import Contrast, load_config
from moe_routing.errors import InputError
from moe_routing.evaluation.collect import write_tables
from moe_routing.evaluation.record import (
    CellRecord,
    Provenance,
    RoutingSummary,
    Timings,
    specification,
)
from moe_routing.files import atomic_path
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy

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
    code="0" * 16, threads=1,
)  # fmt: skip

ITEMS = pd.DataFrame(
    {
        "cluster": range(7), "log_likelihood": [-3.0, -5, -4, -6, -2, -3, -4], "tokens": 3,
        "words": 2, "bytes": 12, "correct": [True, False] * 3 + [True], "correct_norm": True,
        "gold_bits_per_byte": [1.0, 2, 1, 3, 1, 1, 2], "gold_margin": [0.1, -1, 2, -3, 1, 0.5, 1],
        "kl": [0.1, 0.2, 0.3, *[None] * 4],
    }
)  # fmt: skip


def record_of(strategy_id, dataset, **changes):
    task, _ = METRIC[dataset]
    values = {
        "schema_version": SCHEMA_VERSION,
        "study": "default",
        "strategy": specification(parse_strategy(strategy_id), ModelRule(8, "softmax")),
        "dataset": dataset,
        "task": task,
        "n_items": 7,
        "routing": RoutingSummary(9, *[1.0] * 7, {"mean_experts": [1.0]}),
        "timings": Timings(2.0, 4.5),
        "provenance": PROVENANCE,
    }
    return CellRecord(**(values | changes))


@pytest.fixture
def results(tmp_path):
    for strategy_id in (*load_config(CONFIG).parsed, "perlayer_k6"):
        for dataset in METRIC:
            path = cell_file(tmp_path, strategy_id, dataset)
            record_of(strategy_id, dataset).write(path)
            ITEMS.to_parquet(path.with_name(f"{dataset}.parquet"))
    return tmp_path


def cell_file(results, strategy_id, dataset):
    return results / "cells" / strategy_id / f"{dataset}.json"


def tables_of(results, **changes):
    config = load_config(CONFIG)
    # What follows knows nothing of the contrasts, which would score controls on one set.
    plain = config.statistics.model_copy(
        update={"primary": Contrast(strategy="bh_k8_a005", dataset="wikipedia"), "sequence": []}
    )
    config = config.model_copy(update={"statistics": plain, **changes})
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
    levers = len({*config.levers, *config.budgets} - {*config.strategies, *config.controls})
    levers *= len(config.datasets)
    pairs = metrics.groupby(["strategy", "dataset"])["metric"].agg(set)
    assert len(pairs) == len(cells) + len(controls) + levers
    for dataset, (_, main) in METRIC.items():
        found = pairs.xs(dataset, level="dataset")
        assert all({main, "kl_from_baseline"} <= names for names in found)
    shuffle = controls.set_index("strategy").loc["shuffle.bh_k8_b4"].iloc[0]
    assert (shuffle["family"], shuffle["k"], shuffle["null"]) == ("shuffle", 8, "needed")
    assert (cells != "").all(axis=None)
    assert (controls != "").all(axis=None)


def test_without_controls_their_table_has_a_header_only(results):
    _, with_controls, _, _ = tables_of(results)
    _, cells, controls, metrics = tables_of(results, controls=[], levers=[], budgets=[])
    pd.testing.assert_frame_equal(cells, with_controls)
    assert controls.empty
    assert list(controls.columns) == list(cells.columns)
    assert set(metrics["strategy"]) == set(cells["strategy"])


def test_a_rule_with_a_mean_number_of_experts_has_a_k(results):
    _, _, controls, _ = tables_of(results, controls=["perlayer_k6"])
    assert controls["k"].tolist() == [6] * 3


def test_what_a_contrast_is_against_is_among_the_controls_of_its_set(results):
    config = load_config(CONFIG)
    _, _, controls, _ = tables_of(results, statistics=config.statistics)
    found = controls[controls["strategy"] == "mixture.certified_k8_m001"]
    assert found["dataset"].tolist() == ["wikipedia"]
    scaled = pd.read_csv(results / "comparison/budgets.csv").query("strategy == 'bh_k8_b3_scaled'")
    assert len(scaled) == 3
    here = config.evaluation.model_copy(update={"scaled_on": ["wikipedia"]})
    tables_of(results, evaluation=here)
    scaled = pd.read_csv(results / "comparison/budgets.csv").query("strategy == 'bh_k8_b3_scaled'")
    assert scaled["dataset"].tolist() == ["wikipedia"]


def test_a_missing_control_is_one_line(results):
    (results / "cells" / "regular_k1" / "lambada.json").unlink()
    with pytest.raises(InputError, match=r"regular_k1/lambada\.json: no such file"):
        tables_of(results)


def test_a_cell_of_another_strategy_is_refused(results):
    path = cell_file(results, "regular_k1", "lambada")
    values = json.loads(path.read_text())
    rewrite(path, {**values, "strategy": {**values["strategy"], "id": "regular_k2"}})
    with pytest.raises(InputError, match="is the cell of regular_k2 on lambada; remove it"):
        tables_of(results)


def rewrite(path, values):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values))


def test_a_record_that_lacks_a_key_is_one_line(results):
    path = cell_file(results, "regular_k1", "lambada")
    values = json.loads(path.read_text())
    del values["provenance"]["data_sha256"]
    rewrite(path, values)
    with pytest.raises(InputError) as caught:
        tables_of(results)
    assert str(caught.value) == (
        f"{path}: key 'data_sha256' is missing; remove it and run the workflow again"
    )


@pytest.mark.parametrize(
    ("changes", "ending"),
    [({}, "provenance"), ({"numerics": {"arm": "half", "dtype": "bfloat16"}}, "numerics")],
)
def test_a_record_reads_back_as_it_was_written(tmp_path, changes, ending):
    record = record_of("bh_k8_a005", "lambada", **changes)
    path = tmp_path / "cell.json"
    record.write(path)
    values = json.loads(path.read_text())
    assert list(values)[:4] == ["schema_version", "study", "strategy", "dataset"]
    assert list(values)[-1] == ending
    assert CellRecord.read(path) == record


def test_metrics_follow_the_confidence_of_the_config(results):
    config, cells, *_ = tables_of(results)
    narrow = config.statistics.model_copy(update={"confidence": 0.5})
    _, other, *_ = tables_of(results, statistics=narrow)
    assert (other["value"] == cells["value"]).all()
    assert (other["ci_low"] > cells["ci_low"]).any()


def test_cells_of_other_code_are_named_in_a_warning_and_a_table(results, capsys):
    tables_of(results)
    assert capsys.readouterr().err == ""
    changed = replace(PROVENANCE, code="1" * 16, commit="a1")
    record_of("stock", "lambada", provenance=changed).write(cell_file(results, "stock", "lambada"))
    config, *_ = tables_of(results)
    n = len(config.scored) * len(config.datasets)
    assert capsys.readouterr().err == (
        f"warning: the cells mix 2 versions of the code: unknown ({n - 1} cells), a1 (1 cell)\n"
    )
    table = pd.read_csv(results / "comparison" / "provenance.csv", dtype=str)
    assert len(table) == n
    assert table.set_index(["strategy", "dataset"]).loc[("stock", "lambada"), "commit"] == "a1"


@pytest.mark.parametrize("metric", ["accuracy_norm", "gold_margin"])
def test_the_table_of_cells_shows_the_main_metric_of_the_config(results, metric):
    datasets = load_config(CONFIG).datasets
    hellaswag = datasets["hellaswag"].model_copy(update={"main_metric": metric})
    _, cells, _, metrics = tables_of(results, datasets={**datasets, "hellaswag": hellaswag})
    shown = cells[cells["dataset"] == "hellaswag"].iloc[0]
    assert shown["metric"] == metric
    of_cell = (metrics["strategy"] == shown["strategy"]) & (metrics["dataset"] == "hellaswag")
    assert shown["value"] == metrics[of_cell].set_index("metric").loc[metric, "value"]
