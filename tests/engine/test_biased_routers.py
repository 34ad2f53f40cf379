"""Calibration of models whose bias or groups have a part in the selection of experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import make

from moe_routing import routed
from moe_routing.engine.adapters import find_routers
from moe_routing.evaluation.calibrate import calibrate
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.sample import sample_inputs

TEXT = Path(__file__).resolve().parents[1] / "data_files" / "calibration.txt"
STRATEGIES = ["bh_k4_a020", "absolute_k2_b1", "regular_k1_consequence", "stock_k1_compensated"]


@pytest.fixture(scope="module", params=["glm4_moe", "deepseek_v3", "ernie4_5_moe", "lfm2_moe"])
def model(request):
    settings = {"max_position_embeddings": 256}
    if request.param == "lfm2_moe":
        settings["layer_types"] = ["full_attention"] * 3
    return make(request.param, vocab_size=8192, **settings)


@pytest.fixture(scope="module")
def calibrated(model, nano, tmp_path_factory):
    texts = TEXT.read_text(encoding="utf-8").split("\n\n")
    found = calibrate(
        model,
        nano.tokenizer,
        texts,
        strategies=STRATEGIES,
        tokens=512,
        toggled_tokens=24,
        epsilon=1e-4,
    )
    folder = tmp_path_factory.mktemp("calibration")
    found.save(folder)
    return Calibration.load(folder)


def test_the_sample_knows_the_model_s_own_choice(model, calibrated):
    """The weights of the own choice sum to 1, and some of its experts are not the most probable."""
    layers = find_routers(model)
    assert calibrated.sample.choice_LTE.shape == calibrated.sample.logits_LTE.shape
    moved = 0
    for router in layers:
        inputs = sample_inputs(calibrated.sample, router.layer)
        own = inputs.own_weight_TE.gather(1, inputs.own_TK)
        torch.testing.assert_close(own.sum(1), torch.ones(len(own)))
        probable = inputs.softmax_TE.topk(2).indices
        moved += int((probable.sort(1).values != inputs.own_TK.sort(1).values).any(1).sum())
    assert moved > 0


def test_toggles_are_of_the_model_s_own_choice(calibrated):
    toggles = calibrated.toggles
    for layer in range(toggles.num_layers):
        inputs = toggles.inputs(layer)
        here = (toggles.layer_P == layer) & (toggles.rank_P < 2)
        for token, expert in zip(
            toggles.token_P[here].tolist(), toggles.expert_P[here].tolist(), strict=True
        ):
            assert expert in inputs.own_TK[token].tolist()
    assert (toggles.noise_L < 1e-6).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calibrated_strategies_run(model, calibrated, strategy):
    ids = torch.arange(3, 63).view(4, 15)
    with torch.inference_mode():
        stock = model(ids).logits
        with routed(model, strategy, calibration=calibrated):
            logits = model(ids).logits
    assert logits.isfinite().all()
    assert (logits - stock).abs().max() > 1e-3
