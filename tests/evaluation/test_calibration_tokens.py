"""Too few tokens for a level are refused by the numbers alone, before anything is calibrated."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_routing.config.limits import Limits
from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.evaluation.calibration_tokens import DRAWS_PER_TOKEN, check_tokens
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.rule import ModelRule

CONFIG = Path(__file__).resolve().parents[2] / "config"
OLMOE = Limits(64, ModelRule(8, "softmax"), window=4096)


def test_every_fitted_null_has_the_draws_that_are_foreseen(calibration):
    sample = calibration.sample
    limits = Limits(sample.num_experts, sample.rule, 0)
    assert set(DRAWS_PER_TOKEN) == set(calibration.nulls) == {"needed", *NULLS}
    toggled = calibration.toggles.weight_LTE.shape[1]
    for name, null in calibration.nulls.items():
        tokens = toggled if name == "needed" else sample.num_tokens
        assert null.num_draws == tokens * DRAWS_PER_TOKEN[name](limits), name


@pytest.mark.parametrize(
    "name", ["config.yaml", "olmoe-1b-7b.yaml", "smoke.yaml", "replication.yaml"]
)
def test_shipped_studies_have_the_tokens(name):
    check_tokens(load_config(CONFIG / name).of_model(64, OLMOE.rule), OLMOE, name)


def changed(strategies=(), calibrated=2048, toggled=32, **validity):
    study = load_config(CONFIG / "smoke.yaml").of_model(64, OLMOE.rule)
    examined = study.analysis.validity.model_copy(update=validity)
    return study.model_copy(
        update={
            "calibration": study.calibration.model_copy(
                update={"tokens": calibrated, "toggled_tokens": toggled}
            ),
            "analysis": study.analysis.model_copy(update={"validity": examined}),
            "strategies": [*study.strategies, *strategies],
        }
    )


EXACT = {"nulls": ["permuted_context"], "tokens": 640}


@pytest.mark.parametrize(
    ("few", "enough", "said"),
    [
        ({"strategies": ["bh_k8_a001_per-expert"]},
         {"strategies": ["bh_k8_a001_per-expert"], "calibrated": 6400},
         "calibration.tokens is 2048; allowed: at least 6400, for strategy 'bh_k8_a001_per-expe"),
        ({"strategies": ["shuffle.bh_k8_a001_per-expert"]},
         {"strategies": ["shuffle.bh_k8_a001_per-expert"], "calibrated": 6400},
         "calibration.tokens is 2048; allowed: at least 6400, for strategy 'shuffle.bh_k8_a001_"),
        ({"calibrated": 19}, {"calibrated": 20},
         "calibration.tokens is 19; allowed: at least 20, for analysis.bh.alpha 0.05 of null 'wi"),
        ({"toggled": 19}, {"toggled": 20},
         "calibration.toggled_tokens is 19; allowed: at least 20, for strategy 'bh_k8_a005' with"),
        ({"nulls": ["per_expert"], "tokens": 639}, {"nulls": ["per_expert"], "tokens": 640},
         "analysis.validity.tokens is 639; allowed: at least 640, for analysis.validity.level 0."),
        ({"calibrated": 1919, **EXACT}, {"calibrated": 1920, **EXACT},
         "calibration.tokens is 1919; allowed: at least 1920, for analysis.validity.level 0.05 o"),
    ],
)  # fmt: skip
def test_too_few_tokens_are_one_line_with_the_least(few, enough, said):
    with pytest.raises(InputError) as caught:
        check_tokens(changed(**few), OLMOE, "mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml: {said}")
    check_tokens(changed(**enough), OLMOE, "mine.yaml")


def test_tokens_do_not_limit_a_null_that_is_fitted_on_toggled_experts():
    check_tokens(changed(strategies=["bh_k8_a005_needed-e1e4"]), OLMOE, "mine.yaml")
