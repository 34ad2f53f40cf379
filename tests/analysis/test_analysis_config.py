"""The analysis section refuses what cannot work, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_routing.analysis.text import text_dataset
from moe_routing.config.analyses import AnalysisConfig
from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.schema import parse

CONFIG = Path(__file__).resolve().parents[2] / "config"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"bh": {"nulls": ["poled"]}}, "bh: nulls has 'poled'; allowed: within_token"),
        (
            {"validity": {"nulls": ["needed"]}},
            "validity: nulls has 'needed'; allowed: within_token",
        ),
        ({"bh": {"alpha": [1.5]}}, "bh.alpha.0 is 1.5"),
        ({"bh": {"max_k": [0]}}, "bh.max_k.0 is 0"),
        ({"validity": {"level": 0.2}}, "validity: level is 0.2; allowed: one of alpha"),
        ({"validity": {"nulls": ["x"]}}, "validity: nulls has 'x'"),
        (
            {"ablation": {"tokens": 200}},
            "ablation.tokens: unknown key; it is now analysis.held_out.tokens",
        ),
        (
            {"ablation": {"layers": 4}},
            "ablation.layers: unknown key; the ablation reads the toggled experts of "
            "analysis.held_out, in every layer",
        ),
        (
            {"ablation": {"horizon": 4}},
            "ablation.horizon: unknown key; the ablation reads the toggled experts of "
            "analysis.held_out, and the loss of the next token only",
        ),
        ({"ablation": {"contxt": 4}}, "ablation.contxt: unknown key"),
        ({"validity": {"layers": 4}}, "validity.layers: unknown key"),
        ({"ablation": {"epsilon": []}}, "ablation.epsilon is []"),
        (
            {"ablation": {"epsilon": [0.1, 0.5]}},
            "ablation: primary_epsilon is 0.01; allowed: one of epsilon, [0.1, 0.5]",
        ),
        ({"baseline": {"token": 5}}, "baseline.token: unknown key; did you mean 'tokens'?"),
    ],
)
def test_one_line_that_says_what_is_allowed(section, message):
    with pytest.raises(InputError) as caught:
        parse(AnalysisConfig, section, "config.yaml")
    assert str(caught.value).startswith(f"config.yaml: {message}")
    assert "\n" not in str(caught.value)


def test_defaults_are_those_of_the_study():
    bh = AnalysisConfig().of_model(experts=64, top_k=8).bh
    assert bh.max_k == [8, 16, 32, 64]
    assert bh.alpha == [0.01, 0.05, 0.1]
    assert bh.prompt == "The theory of relativity fundamentally changed our understanding of"


@pytest.mark.parametrize("name", ["config.yaml", "olmoe-1b-7b.yaml"])
def test_studies_judge_discoveries_on_at_least_200_tokens(name):
    assert load_config(CONFIG / name).analysis.held_out.tokens >= 200


def test_the_default_study_runs_bh_under_seven_nulls_on_enough_text():
    study = load_config(CONFIG / "config.yaml")
    assert study.analysis.bh.tokens >= 1024
    nulls = study.analysis.bh.nulls or study.calibration.nulls
    assert nulls == [
        "needed", "needed_e1e4", "needed_e1e3", "within_token", "pooled", "random_direction",
        "unselected",
    ]  # fmt: skip


def test_the_first_perplexity_set_is_the_text():
    assert text_dataset(["hellaswag", "wikitext", "wikipedia"]) == "wikitext"
    assert text_dataset(["hellaswag", "lambada"]) == "lambada"
