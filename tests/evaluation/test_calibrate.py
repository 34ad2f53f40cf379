"""Calibrations hold what the routers saw; those with the defaults route a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_routing.engine.adapters import find_routers
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.calibrate import calibrate, sample_router_logits
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.ranking import prefix_selector
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.scores import null_sample
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.strategies.testing import MultipleTesting

TEXT = Path(__file__).resolve().parents[1] / "data_files" / "calibration.txt"


def test_norms_are_those_of_the_pass_that_the_logits_are_from(nano, tmp_path):
    seen = {}

    def hook(_, inputs, output):
        hidden_TH = inputs[0].reshape(-1, inputs[0].shape[-1])
        seen.setdefault("logits", []).append(output[0].float())
        seen.setdefault("norm", []).append(hidden_TH.float().norm(dim=1))

    router = find_routers(nano.model)[3]
    handle = router.module.register_forward_hook(hook)
    sample = sample_router_logits(
        nano.model,
        nano.tokenizer,
        TEXT.read_text(encoding="utf-8").split("\n\n"),
        tokens=256,
        window=64,
        rng=np.random.default_rng(1),
    )
    handle.remove()
    sample.save(tmp_path / "sample.safetensors")
    sample = CalibrationSample.load(tmp_path / "sample.safetensors")
    for place, (logits_LTE, norm_LT) in enumerate(
        [(sample.logits_LTE, sample.input_norm_LT), (sample.permuted_LTE, sample.permuted_norm_LT)]
    ):
        assert torch.equal(logits_LTE[3], seen["logits"][place])
        assert torch.equal(norm_LT[3], seen["norm"][place])
    assert not torch.equal(sample.input_norm_LT, sample.permuted_norm_LT)


FAMILIES = {"Qwen3Moe": ModelRule(2, "renormalised"), "Olmoe": ModelRule(2, "softmax")}


@pytest.fixture(scope="module", params=FAMILIES)
def calibrated(request, nano, make_model):
    """A tiny model that knows the embedded model's tokens, calibrated with the defaults."""
    rule = FAMILIES[request.param]
    model = make_model(
        request.param,
        vocab_size=len(nano.tokenizer),
        max_position_embeddings=64,
        norm_topk_prob=rule.weighting == "renormalised",
    )
    calibration = calibrate(model, nano.tokenizer, TEXT.read_text(encoding="utf-8").split("\n\n"))
    assert calibration.sample.rule == calibration.toggles.rule == rule
    return model, calibration


def test_a_calibration_with_the_defaults_routes_and_generates(calibrated, tokenizer):
    model, calibration = calibrated
    assert list(calibration.nulls) == ["needed"]
    assert calibration.null("needed").num_draws == 400 * 8
    ids_1S = torch.tensor([tokenizer("The river rises in the hills.")["input_ids"]])
    recorder = Recorder()
    with routed(model, "bh_k8_a005", calibration=calibration, recorder=recorder):
        with torch.inference_mode():
            assert model(ids_1S).logits.isfinite().all()
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert model.generate(ids_1S, **options).shape[1] == ids_1S.shape[1] + 4
    seen = recorder.statistics()
    assert 1 < seen.mean_experts() < 8
    assert seen.sd_experts() > 0


@pytest.mark.parametrize("alpha", ["001", "005"])
def test_on_a_model_s_own_logits_critical_values_select_as_p_values_do(calibrated, alpha):
    _, calibration = calibrated
    sample, strategy = calibration.sample, parse_strategy(f"bh_k8_a{alpha}")
    for layer in range(sample.num_layers):
        inputs = null_sample(calibration.null("needed"), calibration, layer)
        probability_TE = inputs.logits_TE.softmax(-1)
        fast = strategy.selector(calibration, 8)(inputs, probability_TE)
        ranker = MultipleTesting.ranker(strategy, calibration, 8)
        slow = prefix_selector(ranker, 8)(inputs, probability_TE)
        assert torch.equal(fast.rejected_T, slow.rejected_T)
        assert torch.equal(fast.index_TK, slow.index_TK)
        assert len(fast.rejected_T.unique()) > 1


def test_a_margin_certifies_and_the_calibration_is_saved_and_printed(nano, rows, tmp_path):
    texts = TEXT.read_text(encoding="utf-8").split("\n\n")
    passages = [row["passage"] for row in rows("wikipedia")]
    model, tokenizer = nano.model, nano.tokenizer
    calibration = calibrate(
        model, tokenizer, [*texts, *passages],
        nulls=(), tokens=1024, toggled_tokens=24, margin=0.05, documents=len(passages),
    )  # fmt: skip
    (certificate,) = calibration.certificates.values()
    assert certificate.strategy == "certified_k8_m005"
    assert certificate.documents == len(passages)
    assert 1 < certificate.mean_experts < 6
    assert str(calibration).splitlines()[0].endswith("on 1,024 tokens")
    assert str(calibration).splitlines()[-1] == str(certificate)
    calibration.save(tmp_path / "saved")
    loaded = Calibration.load(tmp_path / "saved")
    assert loaded.certificates == calibration.certificates
    assert str(loaded) == str(calibration)
    ids_1S = torch.tensor([tokenizer("The river rises in the hills.")["input_ids"]])
    logits = []
    with torch.inference_mode():
        for given in (calibration, loaded, tmp_path / "saved"):
            with routed(model, "certified_k8_m005", calibration=given):
                logits.append(model(ids_1S).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_at_most_half_of_the_texts_are_certified_on(nano, rows):
    texts = [row["passage"] for row in rows("wikipedia")]
    with pytest.raises(InputError, match="6 calibration documents; allowed: at least 10"):
        calibrate(
            nano.model, nano.tokenizer, texts,
            nulls=(), tokens=512, toggled_tokens=8, margin=0.01,
        )  # fmt: skip


def test_budgets_are_fitted_and_route(nano, rows, tmp_path):
    texts = [row["passage"] for row in rows("wikipedia")]
    with pytest.raises(InputError, match="budgets has 'topp_k8_b3_scaled'; allowed: ids with a"):
        calibrate(nano.model, nano.tokenizer, texts, budgets=["topp_k8_b3_scaled"])
    calibration = calibrate(
        nano.model, nano.tokenizer, texts, nulls=(), tokens=512, budgets=["topp_k8_b3"]
    )
    assert calibration.toggles is None
    calibration.save(tmp_path)
    recorder = Recorder()
    with routed(nano.model, "topp_k8_b3", calibration=tmp_path, recorder=recorder):
        ids = nano.tokenizer(texts[0])["input_ids"]
        nano.model(torch.tensor([ids]))
    assert 2 < recorder.statistics().mean_experts() < 4
