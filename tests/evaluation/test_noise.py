"""The noise arms: what is loaded, what is scored, and under which settings."""

from __future__ import annotations

from pathlib import Path

from moe_routing.config.study import NoiseArm, load_config
from moe_routing.evaluation import numerics

CONFIG = Path(__file__).parents[2] / "config" / "config.yaml"


def test_each_dtype_is_loaded_once_and_each_arm_has_its_setting(monkeypatch, tmp_path):
    loaded, settings, cells = [], [], {}

    def load_study_model(model, results, threads):
        loaded.append(model.dtype)
        return model.dtype

    def score_dataset(model, strategy, dataset, study, results, calibration):
        changed = study.model.experts_implementation, study.evaluation.token_budget
        settings.append((model, strategy.id, *changed))
        return dataset, {}

    def write_cell(path, frame, record):
        cells[path.relative_to(tmp_path).as_posix()] = frame, record["noise"]

    for function in (load_study_model, score_dataset, write_cell):
        monkeypatch.setattr(noise, function.__name__, function)
    study = load_config(CONFIG)
    arms = [study.noise[0], NoiseArm(name="bfloat16", dtype="bfloat16"), study.noise[1]]
    config = study.model_copy(update={"noise": arms})
    noise.evaluate_noise(config, tmp_path)
    assert loaded == ["float32", "bfloat16"]
    assert settings[::3] == [
        ("float32", "regular_k8", "eager", 8192),
        ("float32", "regular_k8", "ragged", 1024),
        ("bfloat16", "regular_k8", "ragged", 8192),
    ]
    assert set(cells) == {
        f"noise/{arm.name}/{dataset}" for arm in config.noise for dataset in config.datasets
    }
    assert cells["noise/eager/lambada"] == (
        "lambada",
        {"arm": "eager", "experts_implementation": "eager"},
    )


def test_without_arms_nothing_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(noise, "load_study_model", None)
    noise.evaluate_noise(load_config(CONFIG).model_copy(update={"noise": []}), tmp_path)
