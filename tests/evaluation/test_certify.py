"""Certificates: what is promised, what was tried, and what a certificate is bound to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.certify import BUDGETS_PER_EXPERT, CLIP, certify
from moe_routing.evaluation.damage import Documents
from moe_routing.routing.certificate import Certificate
from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.risk_control import risk

WINDOW = 48
STRATEGY = parse_strategy("certified_k8_m005")


@pytest.fixture(scope="module")
def texts(rows):
    return [row["passage"] for row in rows("wikipedia")]


@pytest.fixture(scope="module")
def certificate(nano, calibration, texts):
    return certify(nano.model, nano.tokenizer, texts, STRATEGY, calibration, window=WINDOW)


@torch.inference_mode()
def slow_damage(model, tokenizer, text, strategy, calibration):
    """Mean KL over the tokens of one document, by two whole forward passes."""
    ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids = torch.tensor([ids[:WINDOW]])
    stock = model(ids).logits[0].double().log_softmax(-1)
    with routed(model, strategy, calibration=calibration):
        moved = model(ids).logits[0].double().log_softmax(-1)
    return float((stock.exp() * (stock - moved)).sum(-1).mean())


def test_damage_is_that_of_whole_forward_passes(model, tokenizer, calibration, texts):
    strategy = parse_strategy("absolute_k8_t00002_consequence_compensated")
    documents = Documents(model, tokenizer, texts[:3], window=WINDOW)
    slow = [slow_damage(model, tokenizer, text, strategy, calibration) for text in texts[:3]]
    np.testing.assert_allclose(documents.damage(strategy, calibration).kl_n, slow, rtol=1e-3)
    assert documents.damage(parse_strategy("stock"), None).kl_n.tolist() == [0, 0, 0]


def test_certificate_keeps_its_promise_with_the_fewest_experts(
    model, tokenizer, calibration, texts, certificate
):
    documents = Documents(model, tokenizer, texts, window=WINDOW)
    certified = replace(calibration, certificates={STRATEGY.id: certificate})
    found = documents.damage(STRATEGY, certified)
    clipped = np.minimum(found.kl_n, CLIP * STRATEGY.margin)
    assert certificate.documents == len(texts)
    assert certificate.damage == pytest.approx(clipped.mean(), rel=1e-6)
    plain = risk(clipped, CLIP * STRATEGY.margin)  # of damages that are not made monotone
    assert plain * (1 - 1e-6) <= certificate.risk <= min(STRATEGY.margin, 1.02 * plain)
    assert certificate.mean_experts == pytest.approx(found.statistics.mean_experts())
    assert certificate.mean_experts < 4
    below = f"{certificate.budget - 1 / BUDGETS_PER_EXPERT:g}"
    assert below in certificate.tried  # the next smaller budget was tried
    bound = CLIP * STRATEGY.margin
    fewer = certificate.tried[below]
    assert (len(texts) * fewer + bound) / (len(texts) + 1) > STRATEGY.margin * 0.999


def test_a_larger_margin_needs_fewer_experts(model, tokenizer, calibration, texts, certificate):
    larger = parse_strategy("certified_k8_m020")
    found = certify(model, tokenizer, texts, larger, calibration, window=WINDOW)
    assert found.mean_experts < certificate.mean_experts


def test_certificate_is_saved_loaded_and_printed(tmp_path, certificate):
    certificate.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == certificate
    text = str(certificate)
    assert text.startswith(f"certified_k8_m005: {certificate.mean_experts:.2f} experts per token (")
    assert text.endswith("certified: at most 0.05 on new ones")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad.json: not a certificate: .*mean_experts_L"):
        Certificate.load(tmp_path / "bad.json")


def test_two_certificates_are_equal(model, tokenizer, calibration, texts, certificate):
    again = certify(model, tokenizer, texts, STRATEGY, calibration, window=WINDOW)
    assert again == certificate


def test_too_few_documents(model, tokenizer, calibration, texts):
    with pytest.raises(InputError, match="8 calibration documents; allowed: at least 10"):
        certify(model, tokenizer, texts[:8], STRATEGY, calibration, window=WINDOW)


def test_a_routed_model_is_refused(model, tokenizer, calibration, texts):
    with routed(model, "stock_k4"), pytest.raises(InputError, match="allowed: the stock model"):
        certify(model, tokenizer, texts, STRATEGY, calibration, window=WINDOW)


def test_without_a_certificate_the_strategy_says_what_to_do(model, calibration):
    expected = pytest.raises(InputError, match="has no certificate in this calibration")
    with expected, routed(model, STRATEGY, calibration=calibration):
        pass


def test_a_certificate_of_another_model_is_refused(model, calibration, certificate):
    other = replace(certificate, fingerprint="0" * 64)
    certified = replace(calibration, certificates={STRATEGY.id: other})
    expected = pytest.raises(InputError, match="certified a strategy of a model with other weights")
    with expected, routed(model, STRATEGY, calibration=certified):
        pass
