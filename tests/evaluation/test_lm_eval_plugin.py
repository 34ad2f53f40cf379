"""The harness's model under a routing strategy; its metrics: see test_harness_parity."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

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


def test_the_entry_point_names_the_model():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = declared["entry-points"]["lm_eval.models"][MODEL_NAME].partition(":")
    assert getattr(importlib.import_module(module), name) is RoutedLM


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_the_cache_keeps_strategies_apart(plug_in, double, tokenizer, ask, tmp_path, kind):
    arguments = {
        "loglikelihood": [("The river", " flows")],
        "loglikelihood_rolling": [("The river flows through the town.",)],
        "generate_until": [("The river", {"max_gen_toks": 6, "do_sample": False, "until": []})],
    }[kind]

    def answer(lm):
        return getattr(CachingLM(lm, str(tmp_path / "cache.db")), kind)(ask(kind, arguments))

    stock, one = answer(plug_in("stock")), answer(plug_in("regular_k1"))
    assert one == getattr(plug_in("regular_k1"), kind)(ask(kind, arguments))
    assert one != stock
    again = plug_in("regular_k1")
    again._score = again.generate_until = None  # nothing is computed again
    assert answer(again) == one
    ours = answer(plug_in("stock"))
    assert ours == stock


def test_the_cache_keeps_calibrations_apart(plug_in, calibration, ask, tmp_path):
    sample = calibration.sample
    other = replace(calibration, sample=replace(sample, logits_LTE=-sample.logits_LTE))
    keys = []
    for used in (calibration, other, calibration):
        lm = plug_in("adaptive_k8", calibration=used)
        CachingLM(lm, str(tmp_path / "cache.db"))
        keys.append(lm.cache_hook.dbdict.encode_key("request"))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("strategy", ["stock", "regular_k3"])
def test_mixed_precision_is_that_of_the_harness(model, tokenizer, ask, choice_requests, strategy):
    """Scores differ from float32, and from the harness's, which rounds them, by rounding alone."""
    asked = ask("loglikelihood", [(r.context, r.continuation) for r in choice_requests[:4]])
    model = copy.deepcopy(model)
    options = {"pretrained": model, "tokenizer": tokenizer}
    mixed = {**options, "mixed_precision_dtype": "bfloat16"}
    with routed(model, strategy):
        expected = HFLM(**mixed).loglikelihood(asked, True)
    ours = RoutedLM(**mixed, strategy=strategy).loglikelihood(asked, True)
    full = RoutedLM(**options, strategy=strategy).loglikelihood(asked, True)
    expected, ours, full = (np.array([v for v, _ in found]) for found in (expected, ours, full))
    assert np.abs(ours - full).max() > 1e-3
    np.testing.assert_allclose(ours, expected, rtol=1e-2)


def test_a_continuation_without_a_token_is_an_error(plug_in):
    with pytest.raises(InputError, match="continuation '' has no token to score"):
        plug_in("stock")._loglikelihood_tokens([(("The river", ""), [5, 6], [])])


def test_a_continuation_longer_than_the_window_is_an_error(plug_in):
    lm = plug_in("stock", max_length=8)
    with pytest.raises(InputError, match="has 9 tokens; allowed: at most the window of 8"):
        lm._loglikelihood_tokens([(("The river", " flows on"), [5, 6], [7] * 9)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "no/such/folder"}, "model_args: OSError: .*no/such/folder"),
        ({"parallelize": True}, "model_args: AssertionError: `parallelize=True` is not compatible"),
        (
            {"calibration": "nowhere", "strategy": "adaptive_k8"},
            "nowhere/router_logits.safetensors",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_line(double, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        RoutedLM(**{"pretrained": double, "tokenizer": tokenizer, "strategy": "stock"} | options)


def test_a_tokenizer_that_ends_every_text_is_refused(double, tokenizer):
    ending = copy.deepcopy(tokenizer)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    options = {"pretrained": double, "strategy": "stock"}
    with pytest.raises(InputError, match="puts a token at the end of every text"):
        RoutedLM(**options, tokenizer=ending)
    lm, usual = (
        RoutedLM(**options, tokenizer=ending, add_bos_token=False),
        RoutedLM(**options, tokenizer=tokenizer),
    )
    assert lm.tok_encode("The river") == usual.tok_encode("The river")


def test_a_model_that_accelerate_places(ask, choice_requests):
    arguments = [(r.context, r.continuation) for r in choice_requests[:4]]
    folder = str(ROOT / "resources" / "olmoe-nano")
    options = {"strategy": "regular_k4", "device": "cpu", "dtype": "float32"}
    usual, placed = (
        RoutedLM(pretrained=folder, parallelize=parallelize, **options)
        for parallelize in (False, True)
    )
    first, second = (
        lm.loglikelihood(ask("loglikelihood", arguments), True) for lm in (usual, placed)
    )
    np.testing.assert_allclose([v for v, _ in first], [v for v, _ in second], rtol=0, atol=1e-4)


def test_generation_without_room_for_a_prompt_is_one_line(plug_in, ask):
    options = {"max_gen_toks": 64, "do_sample": False, "until": []}
    lm = plug_in("stock", max_length=32)
    with pytest.raises(InputError, match="generation: AssertionError: Invalid configuration"):
        lm.generate_until(ask("generate_until", [("The river", options)]), True)


class Adapted(torch.nn.Module):
    """A stand-in for peft's wrapper: it forwards to the base model, whose layers are adapted."""

    def __init__(self, base, *, is_prompt_learning=False):
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": base})  # peft's tuner, not a decoder
        self.active_peft_config = SimpleNamespace(
            is_prompt_learning=is_prompt_learning, peft_type="PREFIX_TUNING"
        )
        self.config, self.device = base.config, base.device

    def get_base_model(self):
        return self.base_model["model"]

    def tie_weights(self):
        pass


def test_an_adapter_is_scored(double, tokenizer, ask, choice_requests):
    arguments = [(r.context, r.continuation) for r in choice_requests[:4]]
    adapted, plain = (
        RoutedLM(pretrained=model, tokenizer=tokenizer, strategy="regular_k4", backend="causal")
        for model in (Adapted(double), double)
    )
    answers = [lm.loglikelihood(ask("loglikelihood", arguments), True) for lm in (adapted, plain)]
    assert answers[0] == answers[1]


def test_an_adapter_of_the_prompt_is_refused(double, tokenizer):
    model = Adapted(double, is_prompt_learning=True)
    with pytest.raises(InputError, match="type PREFIX_TUNING; allowed: adapters of layers"):
        RoutedLM(pretrained=model, tokenizer=tokenizer, backend="causal")


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
