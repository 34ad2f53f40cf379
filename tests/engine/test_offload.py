"""A model whose weights accelerate has offloaded computes what it does in memory, routed or not."""

from __future__ import annotations

import accelerate
import numpy as np
import pytest
import torch

from moe_routing.analysis.capture import capture_texts
from moe_routing.engine.adapters import find_routers, model_fingerprint, router_fingerprint
from moe_routing.engine.head import logits_of
from moe_routing.engine.offload import input_device, is_offloaded, weight_of
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.requests import Request
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.evaluation.calibrate import calibrate, sample_router_logits
from moe_routing.evaluation.outputs import fit_expert_outputs
from moe_routing.evaluation.toggles import toggle_experts
from moe_routing.routing.calibration import Calibration

HOST = torch.device("cpu")
PLACES = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def dispatched(model, folder):
    return accelerate.dispatch_model(model, PLACES, main_device="cpu", offload_dir=folder)


def in_memory(model, _):
    """Hooked, as a model is that is spread over devices, and not offloaded."""
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


WAYS = {
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=HOST),
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device=HOST),
    "some on the disk": dispatched,
    "none": in_memory,
}


@pytest.fixture(scope="module")
def make(make_model, nano):
    """Return a maker of tiny models that know the embedded model's tokens."""

    def make_one():
        return make_model("Olmoe", vocab_size=len(nano.tokenizer), norm_topk_prob=False)

    return make_one


@pytest.fixture(scope="module")
def whole(make):
    return make()


@pytest.fixture(params=WAYS)
def elsewhere(request, make, tmp_path):
    model = WAYS[request.param](make(), tmp_path)
    assert is_offloaded(model) is (request.param != "none")
    return model


@pytest.fixture
def ids(tokenizer):
    return tokenizer("The river rises in the hills.", return_tensors="pt")["input_ids"]


@torch.inference_mode()
def logits_under(model, strategy, ids, **options):
    with routed(model, strategy, **options):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("experts", ["dropless", "eager", None])
def test_routed_logits(whole, elsewhere, ids, experts):
    options = {"experts_implementation": experts}
    expected = logits_under(whole, "regular_k1", ids, **options)
    stock = elsewhere(ids).logits
    found = logits_under(elsewhere, "regular_k1", ids, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - stock).abs().max() > 0.1
    assert torch.equal(elsewhere(ids).logits, stock)


@pytest.mark.parametrize("part", ["exact-norm", "norm_compensated"])
def test_scores_that_need_the_outputs_of_experts(whole, elsewhere, ids, tokenizer, texts, part):
    rng, strategy = np.random.default_rng(0), f"regular_k1_{part}"
    sample = sample_router_logits(whole, tokenizer, texts, tokens=64, window=16, rng=rng)
    outputs = fit_expert_outputs(whole, tokenizer, texts, tokens=64, window=16)
    options = {"calibration": Calibration(sample, outputs=outputs)}
    expected = logits_under(whole, strategy, ids, **options)
    found = logits_under(elsewhere, strategy, ids, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    by_probability = logits_under(whole, "regular_k1", ids)
    assert (expected - by_probability).abs().max() > 0.01


def test_generation(whole, elsewhere, ids):
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    texts = []
    for model in (whole, elsewhere):
        with routed(model, "regular_k1"):
            texts.append(model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist())
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def texts():
    return ["The river rises in the hills north of the town and flows into the sea. " * 3] * 2


def test_calibration_and_fingerprint(whole, elsewhere, ids, tokenizer, texts):
    assert router_fingerprint(elsewhere) == router_fingerprint(whole)
    assert model_fingerprint(elsewhere) == model_fingerprint(whole)
    samples = [
        sample_router_logits(
            model, tokenizer, texts, tokens=64, window=16, rng=np.random.default_rng(0)
        )
        for model in (whole, elsewhere)
    ]
    torch.testing.assert_close(samples[1].logits_LTE, samples[0].logits_LTE)
    torch.testing.assert_close(samples[1].centred_norm_LE, samples[0].centred_norm_LE)
    for router, other in zip(find_routers(whole), find_routers(elsewhere), strict=True):
        assert torch.equal(weight_of(other.module), router.module.weight)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_toggles(make, way, tmp_path, tokenizer, texts, dtype):
    found, means = [], []
    for model in (make().to(dtype), WAYS[way](make().to(dtype), tmp_path)):
        rng = np.random.default_rng(0)
        outputs = fit_expert_outputs(model, tokenizer, texts, tokens=64, window=16)
        found.append(toggle_experts(model, tokenizer, texts, outputs, tokens=3, rng=rng))
        means.append(outputs.mean_LEH)
    torch.testing.assert_close(means[1], means[0])
    assert torch.equal(found[0].expert_P, found[1].expert_P)
    assert torch.allclose(found[0].kl_P, found[1].kl_P, rtol=1e-3, atol=1e-10)
    assert found[0].fingerprint == found[1].fingerprint


def test_scores(whole, elsewhere, tokenizer, capsys):
    requests = [Request("The river rises", f" in the {word}") for word in ("hills", "sea", "wood.")]
    requests.append(Request("", "One. Two"))
    results = []
    for model in (whole, elsewhere):
        recorder = Recorder()
        with routed(model, "regular_k3", recorder=recorder):
            scorer = Scorer(model, tokenizer, recorder=recorder)
            results.append([*scorer.score(requests), *scorer.score_rolling([requests[0].context])])
    for ours, theirs in zip(*results, strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-4)
        assert (ours.greedy, ours.tokens) == (theirs.greedy, theirs.tokens)
        assert ours.mean_experts == theirs.mean_experts == 3.0
    told = "4 of 4 requests fall back to plain forward passes, slower than packed ones: some of"
    assert (told in capsys.readouterr().err) is is_offloaded(elsewhere)


def test_final_states_and_their_logits(whole, elsewhere, tokenizer):
    requests = Scorer(whole, tokenizer).encoder.requests([Request("The river", " rises in the")])
    found = [
        logits_of(model, Scorer(model, tokenizer).final_states(requests)[0])
        for model in (whole, elsewhere)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_a_capture(whole, elsewhere, tokenizer, texts):
    seen = [
        capture_texts(model, tokenizer, texts, tokens=20, window=16, label="test")
        for model in (whole, elsewhere)
    ]
    torch.testing.assert_close(seen[1].logits_LTE, seen[0].logits_LTE)
    torch.testing.assert_close(seen[1].loss_T, seen[0].loss_T)


def test_inputs_go_where_they_are_taken(elsewhere, whole):
    assert input_device(elsewhere) == input_device(whole) == HOST


def test_weights_that_are_nowhere_are_refused_in_one_line(make, tokenizer, texts):
    from transformers import OlmoeForCausalLM

    with torch.device("meta"):
        empty = OlmoeForCausalLM(make().config).eval()
    message = "OlmoeTopKRouter: its weight is on the meta device, without values"
    with pytest.raises(InputError, match=message):
        routed(empty, "regular_k1").__enter__()
    with pytest.raises(InputError, match=message):
        router_fingerprint(empty)


def test_weights_divided_among_processes_are_refused(make):
    model = make()
    router = find_routers(model)[0].module
    router.weight = torch.nn.Parameter(router.weight.flatten()[:0], requires_grad=False)
    with pytest.raises(InputError, match=r"0 weight matrices; allowed: one, .*, not divided"):
        router_fingerprint(model)


def test_a_routed_model_is_not_calibrated(whole, tokenizer, texts):
    with (
        routed(whole, "regular_k1"),
        pytest.raises(InputError, match="calibration: the model is routed by 'regular_k1'"),
    ):
        calibrate(whole, tokenizer, texts, tokens=16)
