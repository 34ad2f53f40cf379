"""The numerics arms: what is loaded, what is scored, and under which settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from moe_routing.config.study import NumericsArm, load_config
from moe_routing.data.items import document_item, write_items
from moe_routing.evaluation import numerics
from moe_routing.vocabulary import DATASETS

CONFIG = Path(__file__).parents[2] / "config" / "config.yaml"


def test_each_dtype_is_loaded_once_and_each_arm_has_its_setting(monkeypatch, tmp_path):
    loaded, settings, cells = [], [], {}

    def load_study_model(model, results, threads):
        loaded.append(model.dtype)
        return model.dtype

    def score_items(model, strategy, items, dataset, study, calibration):
        assert [item.cluster for item in items] == [f"{dataset}-00000"]
        changed = study.model.experts_implementation, study.evaluation.token_budget
        settings.append((model, strategy.id, *changed))
        return SimpleNamespace(items=dataset)

    def cell_record(model, strategy, dataset, scored, study, *, numerics):
        return numerics

    def write_cell(path, frame, record):
        cells[path.relative_to(tmp_path).as_posix()] = frame, record

    for name in DATASETS:
        write_items([document_item(name, 0, "a", "a")], tmp_path / "data" / f"{name}.parquet")
    for function in (load_study_model, score_items, cell_record, write_cell):
        monkeypatch.setattr(numerics, function.__name__, function)
    study = load_config(CONFIG)
    arms = [study.numerics[0], NumericsArm(name="bfloat16", dtype="bfloat16"), study.numerics[1]]
    config = study.model_copy(update={"numerics": arms})
    numerics.evaluate_numerics(config, tmp_path)
    assert loaded == ["float32", "bfloat16"]
    assert settings[::3] == [
        ("float32", "stock", "eager", 8192),
        ("float32", "stock", "dropless", 1024),
        ("bfloat16", "stock", "dropless", 8192),
    ]
    assert set(cells) == {
        f"numerics/{arm.name}/{dataset}" for arm in config.numerics for dataset in config.datasets
    }
    assert cells["numerics/eager/lambada"] == (
        "lambada",
        {"arm": "eager", "experts_implementation": "eager"},
    )


def test_without_arms_nothing_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(numerics, "load_study_model", None)
    numerics.evaluate_numerics(load_config(CONFIG).model_copy(update={"numerics": []}), tmp_path)
