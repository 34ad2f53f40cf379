"""The harness's model under a routing strategy; its metrics: see test_harness_parity."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model

from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.lm_eval_plugin import MODEL_NAME, RoutedLM, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plug_in(double, tokenizer):
    def make(strategy, **options):
        return RoutedLM(pretrained=double, tokenizer=tokenizer, strategy=strategy, **options)

    return make


def test_the_harness_knows_it_by_name():
    assert get_model(MODEL_NAME) is RoutedLM


def test_requests_are_scored_under_the_strategy(
    plug_in, double, tokenizer, ask, choice_requests, documents
):
    lm = plug_in("normalized_k3", token_budget=500)
    arguments = [(request.context, request.continuation) for request in choice_requests]
    answers = lm.loglikelihood(ask("loglikelihood", arguments), disable_tqdm=True)
    rolling = lm.loglikelihood_rolling(
        ask("loglikelihood_rolling", [(d,) for d in documents]), disable_tqdm=True
    )
    with routed(double, "normalized_k3"):
        scores = Scorer(double, tokenizer).score(choice_requests)
        pages = Scorer(double, tokenizer).score_rolling(documents)
    ours = [score.log_likelihood for score in scores]
    np.testing.assert_allclose([value for value, _ in answers], ours, rtol=0, atol=1e-9)
    assert [greedy for _, greedy in answers] == [score.greedy for score in scores]
    np.testing.assert_allclose(rolling, [s.log_likelihood for s in pages], rtol=0, atol=1e-9)
    stock = Scorer(double, tokenizer).score(choice_requests)
    assert np.abs(np.subtract(ours, [s.log_likelihood for s in stock])).min() > 1e-6


def test_text_is_generated_under_the_strategy(plug_in, double, tokenizer, ask):
    options = {"max_gen_toks": 8, "do_sample": False, "until": []}
    requests = ask("generate_until", [("The river flows through", options)])
    text = plug_in("regular_k1").generate_until(requests, disable_tqdm=True)[0]
    ids = tokenizer("The river flows through", return_tensors="pt")
    with routed(double, "regular_k1"):
        out = double.generate(**ids, max_new_tokens=8, do_sample=False)
    assert text == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_model_is_as_before(plug_in, double, tokenizer, ask):
    ids = tokenizer("The river flows through", return_tensors="pt")["input_ids"]
    experts = double.get_experts_implementation()
    with torch.inference_mode():
        before = double(ids).logits
    lm = plug_in("uniform_k2")
    lm.loglikelihood(ask("loglikelihood", [("The river", " flows")]), disable_tqdm=True)
    with torch.inference_mode():
        assert torch.equal(double(ids).logits, before)
    assert double.get_experts_implementation() == experts


def test_a_strategy_with_calibration(plug_in, calibration, ask):
    lm = plug_in("adaptive_k8", calibration=calibration)
    answer = lm.loglikelihood(ask("loglikelihood", [("The river", " flows")]), disable_tqdm=True)
    assert np.isfinite(answer[0][0])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("regular_k0", "regular_k0"),
        ("regular_k65", "at most the model's 64"),
        ("adaptive_k8", "needs a calibration"),
    ],
)
def test_what_cannot_work_is_told_at_once(plug_in, strategy, message):
    with pytest.raises(InputError, match=message):
        plug_in(strategy)


def test_a_likelihood_that_is_not_a_number_is_an_error(double, tokenizer, ask):
    broken = copy.deepcopy(double)
    with torch.no_grad():
        broken.lm_head.weight[-1] = torch.nan
    lm = RoutedLM(pretrained=broken, tokenizer=tokenizer, strategy="regular_k8")
    with pytest.raises(InputError, match=r"regular_k8: .* \(continuation ' flows'\) is nan"):
        lm.loglikelihood(ask("loglikelihood", [("The river", " flows")]), disable_tqdm=True)
    with pytest.raises(InputError, match="regular_k8: the log-likelihood of request 1"):
        lm.loglikelihood_rolling(ask("loglikelihood_rolling", [("A river.",)]), disable_tqdm=True)


def test_results_name_the_strategy(plug_in):
    assert plug_in("regular_k4").get_model_info()["routing_strategy"] == "regular_k4"


def test_bad_input_is_one_line_on_the_command_line(monkeypatch, capsys):
    arguments = f"pretrained={ROOT / 'resources' / 'olmoe-nano'},strategy=regular_k99"
    command = ["run", "--model", MODEL_NAME, "--tasks", "lambada_openai", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["moe-routing-lm-eval", *command, "--model_args", arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: strategy 'regular_k99' may select 99 experts; allowed: at most the model's 64"
    )


def test_the_command_line_knows_the_model():
    result = subprocess.run(
        [sys.executable, "-m", "moe_routing.lm_eval_plugin", "run", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--model_args" in result.stdout
