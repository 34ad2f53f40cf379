"""The analyses of a model of 8 experts under the settings that a study leaves to its model."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from held_out_toggles import write_held_out_toggles

from moe_routing.analysis.baseline import write_baseline
from moe_routing.analysis.bh import write_bh
from moe_routing.analysis.validity import write_validity
from moe_routing.config.study import StudyConfig
from moe_routing.data.items import document_item, write_items
from moe_routing.evaluation.study_model import write_model
from moe_routing.routing.calibration import OUTPUTS_FILE, SAMPLE_FILE, TOGGLES_FILE, null_path
from moe_routing.routing.nulls import save_null


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny, nano, tiny_calibration, texts):
    """A study folder of the tiny model, whose weights a baseline would renormalise."""
    root = tmp_path_factory.mktemp("study")
    tiny.save_pretrained(root / "model")
    nano.tokenizer.save_pretrained(root / "model")
    passages = [document_item("wikipedia", row, text, text) for row, text in enumerate(texts * 4)]
    write_items(passages, root / "data" / "wikipedia.parquet")
    sample, toggles = tiny_calibration.sample, tiny_calibration.toggles
    sample.save(root / "calibration" / SAMPLE_FILE)
    toggles.save(root / "calibration" / TOGGLES_FILE)
    tiny_calibration.outputs.save(root / "calibration" / OUTPUTS_FILE)
    write_held_out_toggles(root, toggles, ["calibration"])
    for name, null in tiny_calibration.nulls.items():
        path = null_path(root / "calibration", name)
        save_null(null, sample, path, toggles)
    config = study_config(root)
    write_model(config, root, "study.yaml")
    return config, root


def study_config(root):
    source = {"kind": "local", "path": "unused"}
    values = {
        "study": "tiny",
        "model": {"path": str(root / "model")},
        "calibration": {"source": source, "tokens": 512},
        "datasets": {"wikipedia": {"source": source}},
        "strategies": ["normalized_k3"],
        "statistics": {
            "baseline": "normalized_k3",
            "primary": {"strategy": "normalized_k3", "dataset": "wikipedia"},
        },
        "analysis": {
            "resamples": 100,
            "baseline": {"tokens": 100, "domain_tokens": 50},
            "bh": {"tokens": 100, "alpha": [0.1], "new_tokens": 2},
            "validity": {"tokens": 256, "nulls": ["pooled"], "repeats": 100},
        },
    }  # fmt: skip
    return StudyConfig.model_validate(values)


@pytest.fixture(scope="module")
def bh(study):
    return write_bh(*study)


def test_bh_runs_up_to_the_experts_that_there_are(study, bh):
    root = study[1]
    assert set(bh["max_k"]) == {3, 6, 8}
    static = pd.read_csv(root / "bh" / "bh_static_curve.csv")
    assert static["k"].tolist() == [1, 2, 3, 4, 6, 8]


def test_the_static_curve_has_the_weights_of_the_baseline(study, bh):
    """Two kinds of weights would give the curve two points at the baseline's own k."""
    root = study[1]
    static = pd.read_csv(root / "bh" / "bh_static_curve.csv")
    assert static["strategy"].tolist() == [f"normalized_k{k}" for k in static["k"]]
    top = bh[bh["kind"] == "topk"]
    assert top["strategy"].tolist() == [f"normalized_k{k}" for k in top["max_k"]]
    advice = json.loads((root / "bh" / "recommendation.json").read_text())
    assert advice["against_static_curve"]


def test_validity_simulates_no_more_signals_than_experts(study):
    config, root = study
    write_baseline(config, root)
    write_validity(config, root)
    simulation = pd.read_csv(root / "validity" / "simulation.csv")
    assert sorted(simulation["signals"].unique()) == [0, 1, 2]
    assert (simulation["bh_theory"] > 0).all()
    assert set(pd.read_csv(root / "validity" / "binding.csv")["max_k"]) == {3}
