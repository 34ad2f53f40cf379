"""What a study asks for must be there in its model, and its defaults follow the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from moe_routing.config.analyses import AnalysisConfig
from moe_routing.config.limits import Limits, check_limits
from moe_routing.config.study import StudyConfig, load_config
from moe_routing.errors import InputError
from moe_routing.routing.rule import ModelRule

CONFIG = Path(__file__).resolve().parents[1] / "config"
OLMOE = Limits(64, ModelRule(8, "softmax"), 4096)
MIXTRAL = Limits(8, ModelRule(2, "renormalised"), 256)
STUDY = {
    "study": "small",
    "model": {"path": "unused"},
    "calibration": {"source": {"kind": "local", "path": "unused"}},
    "datasets": {"lambada": {"source": {"kind": "local", "path": "unused"}}},
    "strategies": ["normalized_k2", "bh_k8_a005"],
    "statistics": {
        "baseline": "normalized_k2",
        "primary": {"strategy": "bh_k8_a005", "dataset": "lambada"},
    },
}


@pytest.mark.parametrize("name", ["config.yaml", "olmoe-1b-7b.yaml", "smoke.yaml", "card.yaml"])
def test_shipped_studies_fit_their_model(name):
    check_limits(load_config(CONFIG / name), OLMOE, name)


def test_a_study_of_defaults_fits_any_model():
    for limits in (
        OLMOE,
        MIXTRAL,
        Limits(2, ModelRule(1, "softmax"), 16),
        Limits(60, ModelRule(4, "softmax"), 8192),
    ):
        study = StudyConfig.model_validate(
            STUDY | {"strategies": ["normalized_k2"], "statistics": {
                "baseline": "normalized_k2",
                "primary": {"strategy": "normalized_k2", "dataset": "lambada"},
            }}
        )  # fmt: skip
        check_limits(study, limits, "study.yaml")


@pytest.mark.parametrize(
    ("experts", "top_k", "max_k", "fewer_k", "signals"),
    [
        (64, 8, [8, 16, 32, 64], [1, 2, 3, 4, 6], [0, 4, 16]),
        (8, 2, [2, 4, 8], [1, 2, 3, 4, 6], [0, 1, 2]),
        (60, 4, [4, 8, 16, 32, 60], [1, 2, 3, 4, 6], [0, 3, 15]),
        (128, 8, [8, 16, 32, 64, 128], [1, 2, 3, 4, 6], [0, 8, 32]),
        (4, 4, [4], [1, 2, 3, 4], [0, 1]),
    ],
)
def test_defaults_follow_the_model(experts, top_k, max_k, fewer_k, signals):
    settings = AnalysisConfig().of_model(experts, top_k)
    assert (settings.bh.max_k, settings.bh.fewer_k) == (max_k, fewer_k)
    assert (settings.validity.max_k, settings.validity.signals) == (top_k, signals)
    assert ("unselected" in settings.validity.nulls) == (top_k < experts)


def test_what_is_set_is_kept():
    given = {"bh": {"max_k": [3], "fewer_k": []}, "validity": {"max_k": 5, "signals": [2]}}
    settings = AnalysisConfig.model_validate(given).of_model(8, 2)
    assert (settings.bh.max_k, settings.bh.fewer_k) == ([3], [])
    assert (settings.validity.max_k, settings.validity.signals) == (5, [2])


def changed(key, value):
    values = copy.deepcopy(STUDY)
    *parents, last = key.split(".")
    inner = values
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return StudyConfig.model_validate(values)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("strategies", ["normalized_k2", "bh_k8_a005", "bh_k9_a005"],
         "strategies has 'bh_k9_a005', which may select 9; allowed: at most the model's 8 experts"),
        ("controls", ["perlayer_k5"], "controls has 'perlayer_k5', which may select 10; allowed: "),
        ("analysis.bh.max_k", [8, 16],
         "analysis.bh.max_k has 16; allowed: at most the model's 8 experts"),
        ("analysis.bh.fewer_k", [9], "analysis.bh.fewer_k has 9; allowed: at most the model's 8 e"),
        ("analysis.validity.max_k", 12, "analysis.validity.max_k is 12; allowed: at most the mod"),
        ("analysis.validity.signals", [0, 16], "analysis.validity.signals has 16; allowed: at mos"),
        ("evaluation.window", 512, "evaluation.window is 512; allowed: at most the model's 256"),
    ],
)  # fmt: skip
def test_more_than_the_model_has_is_one_line(key, value, said):
    study = changed(key, value)
    with pytest.raises(InputError) as caught:
        check_limits(study, MIXTRAL, "config/mine.yaml")
    assert str(caught.value).startswith(f"config/mine.yaml: {said}")
    check_limits(study, OLMOE, "config/mine.yaml")


@pytest.mark.parametrize("key", ["calibration.nulls", "analysis.validity.nulls"])
def test_no_draws_of_rejected_experts_where_none_is_rejected(key):
    nulls = ["within_token", "unselected"]
    study = changed(key, ["needed", *nulls] if key.startswith("calibration") else nulls)
    check_limits(study, MIXTRAL, "mine")
    with pytest.raises(InputError, match=rf"mine: {key} has 'unselected'; .* selects all its 8"):
        check_limits(study, Limits(8, ModelRule(8, "renormalised"), 256), "mine")


@pytest.mark.parametrize(
    ("baseline", "primary", "limits"),
    [
        ("stock", "regular_k8", OLMOE),
        ("regular_k8", "stock", OLMOE),
        ("stock", "stock_k8", OLMOE),
        ("stock", "normalized_k2", MIXTRAL),
    ],
)
def test_a_primary_contrast_of_the_baseline_with_itself_is_one_line(baseline, primary, limits):
    contrast = {"strategy": primary, "dataset": "lambada"}
    statistics = {"baseline": baseline, "primary": contrast}
    study = STUDY | {"strategies": [baseline, primary], "statistics": statistics}
    with pytest.raises(InputError) as caught:
        check_limits(StudyConfig.model_validate(study), limits, "mine")
    assert str(caught.value) == (
        f"mine: statistics.primary.strategy is '{primary}', which is the same routing as the "
        f"baseline '{baseline}' on this model; allowed: another routing"
    )


@pytest.mark.parametrize(("primary", "limits"), [("normalized_k2", OLMOE), ("regular_k2", MIXTRAL)])
def test_other_weights_of_the_baseline_s_experts_are_another_routing(primary, limits):
    statistics = {"baseline": "stock", "primary": {"strategy": primary, "dataset": "lambada"}}
    study = STUDY | {"strategies": ["stock", primary], "statistics": statistics}
    check_limits(StudyConfig.model_validate(study), limits, "mine")


def test_a_negative_number_of_signals_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        AnalysisConfig.model_validate({"validity": {"signals": [-1]}})
