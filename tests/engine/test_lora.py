"""Models with an adapter of peft are routed and scored as they compute, or refused in one line."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import make

from moe_routing import Recorder, routed
from moe_routing.engine.adapters import find_experts, find_routers
from moe_routing.engine.requests import TokenRequest
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.lm_eval_plugin import RoutedLM

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, on what it changes
NANO = Path(__file__).resolve().parents[2] / "resources" / "olmoe-nano"
FAMILIES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(3, 63).view(4, 15)
ADAPTERS = {
    "attention": {"target_modules": ["o_proj"]},
    "lm_head": {"target_modules": ["lm_head"]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "down projections": {"target_modules": [], "target_parameters": EXPERTS[1:]},
}


def adapted(family, **targets):
    """Return a tiny model with a random adapter, and the logits without it."""
    model = make(family)
    before = logits_of(model)
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**options, **targets)).eval(), before


@torch.inference_mode()
def logits_of(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapted_model_is_routed_as_it_computes(family, kind):
    model, before = adapted(family, **ADAPTERS[kind])
    expected = logits_of(model)
    assert (expected - before).abs().max() > 0.1
    for one in (model, model.get_base_model()):
        with routed(one, "stock", recorder=(recorder := Recorder())):
            torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=5e-5)
        assert recorder.statistics().tokens == IDS.numel()
        assert torch.equal(logits_of(model), expected)
    adapts_experts = "target_parameters" in ADAPTERS[kind]
    assert bool(find_experts(model)) is not adapts_experts
    found = []
    for merged in (False, True):
        model = model.merge_and_unload() if merged else model
        with routed(model, "topp_k4_p06"):
            found.append(logits_of(model))
    torch.testing.assert_close(*found, rtol=1e-3, atol=5e-4)
    assert (found[0] - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapted_model_is_scored_as_by_its_own_pass(family, kind, tokenizer):
    model, _ = adapted(family, **ADAPTERS[kind])
    rows = [list(range(3, 43)), [*range(3, 23), 60, 61], [9, 8, 7]]
    requests = [TokenRequest(row[:-1], row[-2:]) for row in rows]
    scorer = Scorer(model.get_base_model(), tokenizer)
    for row, score in zip(rows, scorer.score_tokens(requests, [[0, 1], [2]]), strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row[:-1]]), use_cache=False).logits[0, -2:]
        likelihood = logits.double().log_softmax(-1).gather(1, torch.tensor(row[-2:])[:, None])
        assert score.log_likelihood == pytest.approx(float(likelihood.sum()), abs=2e-4)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
    ],
    ids=["parameter", "all linear", "a copy"],
)
def test_an_adapter_of_a_router_is_refused_until_it_is_merged(targets):
    model, _ = adapted("olmoe", **targets)
    expected = logits_of(model)
    with pytest.raises(InputError, match="an adapter changes it; merge that") as caught:
        find_routers(model)
    assert "\n" not in str(caught.value)
    merged = model.merge_and_unload()
    with routed(merged, "stock"):
        torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=5e-5)


def test_adapted_experts_are_not_computed_one_by_one():
    model, _ = adapted("olmoe", **ADAPTERS["experts"])
    with pytest.raises(InputError, match="are ParamWrapper, which cannot be computed one by one"):
        routed(model, "stock_k2_exact-norm").__enter__()


def test_the_harness_scores_an_adapter_that_it_loads(
    nano, tokenizer, ask, choice_requests, tmp_path
):
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False}
    config = peft.LoraConfig(**options, target_modules=["o_proj", "lm_head"])
    model = peft.get_peft_model(copy.deepcopy(nano.model), config).eval()
    model.save_pretrained(tmp_path)
    arguments = [(r.context, r.continuation) for r in choice_requests[:4]]
    lm = RoutedLM(
        pretrained=str(NANO), peft=str(tmp_path), device="cpu", dtype="float32", strategy="stock_k4"
    )
    answers = lm.loglikelihood(ask("loglikelihood", arguments), True)
    with routed(model, "stock_k4"):
        scores = Scorer(model.get_base_model(), tokenizer).score(choice_requests[:4])
    for (likelihood, _), score in zip(answers, scores, strict=True):
        assert likelihood == pytest.approx(score.log_likelihood, abs=1e-3)
