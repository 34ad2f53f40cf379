"""Strategies that are the same routing on a model are scored once, in one job or in several."""

from __future__ import annotations

import json

import pytest
from documents import ROOT

from moe_routing.config.study import StudyConfig
from moe_routing.data.items import write_items
from moe_routing.data.tasks import load_items
from moe_routing.engine.loading import LoadedModel
from moe_routing.evaluation import cells

SOURCE = {"kind": "local", "path": "unused"}
DATASETS = ("hellaswag", "lambada")


@pytest.fixture(scope="module")
def tiny(nano, make_model):
    """A random OLMoE of 8 experts, top-2 with raw softmax weights: stock is regular_k2."""
    model = make_model("Olmoe", vocab_size=nano.model.config.vocab_size, norm_topk_prob=False)
    provenance = {
        "path": "tiny", "revision": "", "dtype": "float32", "device": "cpu",
        "router_fingerprint": "f" * 64, "weights_sha256": "0" * 64,
    }  # fmt: skip
    return LoadedModel(model, nano.tokenizer, provenance)


@pytest.fixture
def study():
    return StudyConfig.model_validate(
        {
            "study": "tiny",
            "model": {"path": "unused"},
            "calibration": {"source": SOURCE},
            "datasets": {name: {"source": SOURCE} for name in DATASETS},
            "strategies": ["regular_k2", "regular_k1", "stock", "normalized_k2"],
            "statistics": {
                "primary": {"strategy": "regular_k1", "dataset": "lambada"},
                "resamples": 100,
            },
            "evaluation": {"window": 96, "token_budget": 400, "kl_items": 2},
        }
    )


@pytest.fixture
def scored(tmp_path, monkeypatch, tiny):
    """Items in place of a prepared study; the (strategy, set) pairs that are really scored."""
    for name in DATASETS:
        items = load_items(name, ROOT / "tests" / "data_files" / f"{name}.jsonl")[:4]
        write_items(items, tmp_path / "data" / f"{name}.parquet")
    calls, score_items = [], cells.score_items

    def counted(loaded, strategy, items, dataset, *rest):
        calls.append((strategy.id, dataset))
        return score_items(loaded, strategy, items, dataset, *rest)

    monkeypatch.setattr(cells, "score_items", counted)
    monkeypatch.setattr(cells, "load_study_model", lambda *_: tiny)
    return calls


def cell(results, strategy, dataset):
    path = results / "cells" / strategy / dataset
    record = json.loads(path.with_suffix(".json").read_text())
    return path.with_suffix(".parquet").read_bytes(), record


def assert_same_cell_but_for_the_id(results):
    for dataset in DATASETS:
        items, record = cell(results, "stock", dataset)
        same_items, same_record = cell(results, "regular_k2", dataset)
        assert same_items == items
        differing = {key for key in record if record[key] != same_record[key]}
        assert differing == {"strategy"}  # the timings are those of the one pass
        specifications = record["strategy"], same_record["strategy"]
        assert [s["id"] for s in specifications] == ["stock", "regular_k2"]
        assert [s["family"] for s in specifications] == ["stock", "regular"]
        assert [(s["k"], s["weighting"]) for s in specifications] == [(2, "softmax")] * 2


def test_one_job_scores_them_once(tmp_path, study, scored):
    cells.evaluate_strategies(study, tmp_path, ["regular_k2", "regular_k1", "stock"])
    assert scored == [(name, dataset) for dataset in DATASETS for name in study.strategies[:2]]
    assert_same_cell_but_for_the_id(tmp_path)
    assert cell(tmp_path, "regular_k1", "lambada")[0] != cell(tmp_path, "stock", "lambada")[0]


def test_a_later_job_reads_the_cell_of_the_baseline(tmp_path, study, scored):
    cells.evaluate_strategies(study, tmp_path, ["stock"])
    del scored[:]
    cells.evaluate_strategies(study, tmp_path, ["regular_k2", "normalized_k2"])
    assert scored == [("normalized_k2", dataset) for dataset in DATASETS]
    assert_same_cell_but_for_the_id(tmp_path)


def test_what_is_read_is_what_would_have_been_scored(tmp_path, study, scored):
    cells.evaluate_strategies(study, tmp_path, ["regular_k2"])  # there is no cell to read
    alone = {dataset: cell(tmp_path, "regular_k2", dataset)[0] for dataset in DATASETS}
    cells.evaluate_strategies(study, tmp_path, ["stock"])
    assert scored == [(name, d) for name in ("regular_k2", "stock") for d in DATASETS]
    assert alone == {dataset: cell(tmp_path, "stock", dataset)[0] for dataset in DATASETS}


@pytest.mark.parametrize("key", ["weights_sha256", "data_sha256", "token_budget", "commit"])
def test_a_cell_of_another_provenance_is_not_reused(tmp_path, study, scored, key):
    cells.evaluate_strategies(study, tmp_path, ["stock"], ["lambada"])
    path = tmp_path / "cells" / "stock" / "lambada.json"
    record = json.loads(path.read_text())
    record["provenance"][key] = 1 if key == "token_budget" else "1" * 64
    path.write_text(json.dumps(record))
    del scored[:]
    cells.evaluate_strategies(study, tmp_path, ["regular_k2"], ["lambada"])
    assert scored == [("regular_k2", "lambada")]


def test_other_weights_of_the_same_experts_are_another_routing(tmp_path, study, scored):
    cells.evaluate_strategies(study, tmp_path, ["stock", "normalized_k2"], ["lambada"])
    assert scored == [("stock", "lambada"), ("normalized_k2", "lambada")]
    assert cell(tmp_path, "stock", "lambada")[0] != cell(tmp_path, "normalized_k2", "lambada")[0]
