"""Every model scores what its own forward pass gives, packed or not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_routing.engine import attention
from moe_routing.engine import packable as packable_module
from moe_routing.engine.head import logits_of, plain_head
from moe_routing.engine.packable import Packable, configured_window, packable, rope_span
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.requests import TokenRequest, max_length
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError

LENGTHS = [(5, 2), (20, 3), (20, 1), (40, 4), (40, 7), (64, 10), (90, 2), (90, 90)]
"""Inputs and targets of requests."""
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
ROPES = {
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 45, **FACTORS},
    "dynamic": {"factor": 4.0},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 45},
}
POSITIONS = {"longrope": 180, "dynamic": 45, "linear": 90, "yarn": 90}


def rope(kind):
    parameters = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    return {"max_position_embeddings": POSITIONS[kind], "rope_parameters": parameters}


CASES = {
    # family, settings, longest request that is packed, a word of the reason
    "olmoe": ("Olmoe", {}, math.inf, ""),
    "mixtral": ("Mixtral", {}, math.inf, ""),
    "mixtral, sliding": ("Mixtral", {"sliding_window": 32}, math.inf, ""),
    "qwen2": ("Qwen2Moe", {"sliding_window": 16}, math.inf, ""),
    "qwen2, some layers slide": (
        "Qwen2Moe",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        math.inf,
        "",
    ),
    "qwen3, sliding": (
        "Qwen3Moe",
        {"use_sliding_window": True, "sliding_window": 16},
        math.inf,
        "",
    ),
    "linear": ("Olmoe", rope("linear"), math.inf, ""),
    "yarn": ("Olmoe", rope("yarn"), math.inf, ""),
    "longrope": ("Olmoe", rope("longrope"), 45, "longest sequence from 45 tokens on"),
    "dynamic": ("Mixtral", rope("dynamic"), 45, "longest sequence from 45 tokens on"),
    "granite": (
        "GraniteMoe",
        {"logits_scaling": 8.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0},
        math.inf,
        "",
    ),
    "gpt-oss": ("GptOss", {"sliding_window": 16}, 0, "does not know what to do with s_aux"),
    "conv": (
        "Lfm2Moe",
        {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        0,
        "layers of the kind conv",
    ),
}


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    rows = [(rng.integers(3, 64, size + 1).tolist(), targets) for size, targets in LENGTHS]
    # Two that share a context.
    rows.append((rows[4][0][:30] + rows[3][0][:8], 8))
    return [TokenRequest(ids[:-1], ids[1:][-targets:]) for ids, targets in rows]


GROUPS = [[0], [1], [2], [3], [4, 8], [5], [6], [7]]


@torch.inference_mode()
def plain_scores(model, requests):
    """Likelihoods and greedy flags by one plain forward pass a request."""
    found = []
    for request in requests:
        model(torch.tensor([[1]]), use_cache=False)  # dynamic rope grows with what it has seen
        logits = model(torch.tensor([request.input_ids]), use_cache=False).logits[0]
        logits = logits[-len(request.target_ids) :].double()
        target = torch.tensor(request.target_ids)[:, None]
        likelihood = logits.log_softmax(-1).gather(1, target).sum()
        found.append((float(likelihood), bool((logits.argmax(-1, keepdim=True) == target).all())))
    return found


def check(model, tokenizer, requests, **options):
    scores = Scorer(model, tokenizer, **options).score_tokens(requests, GROUPS)
    expected = plain_scores(model, requests)
    found = [score.log_likelihood for score in scores]
    np.testing.assert_allclose(found, [value for value, _ in expected], rtol=0, atol=2e-4)
    assert [score.greedy for score in scores] == [greedy for _, greedy in expected]
    return scores


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [100, 4096])
def test_scores_are_those_of_plain_forward_passes(
    make_model, tokenizer, requests, capsys, case, budget
):
    family, settings, longest, reason = CASES[case]
    model = make_model(family, **settings)
    assert packable(model).longest == longest
    check(model, tokenizer, requests, token_budget=budget)
    lines = capsys.readouterr().err.splitlines()
    if longest == math.inf:
        assert not lines
    else:
        count = sum(len(request.input_ids) > longest for request in requests)
        (line,) = lines
        assert line.startswith(
            f"{count} of {len(requests)} requests fall back to plain forward passes"
        )
        assert reason in line


def test_the_packed_engine_would_be_wrong_there(make_model, tokenizer, requests, monkeypatch):
    """What is kept from it does make a difference."""
    family, settings, _, _ = CASES["longrope"]
    model = make_model(family, **settings)
    expected = [value for value, _ in plain_scores(model, requests)]
    monkeypatch.setattr("moe_routing.engine.packable.rope_span", lambda _: math.inf)
    scores = Scorer(model, tokenizer).score_tokens(requests, GROUPS)
    found = [score.log_likelihood for score in scores]
    assert np.abs(np.subtract(found, expected)).max() > 0.1


def without_windows(monkeypatch):
    attend = attention.SlicedLayout.attend

    def blind(self, query, key, value, scaling, window=None):
        return attend(self, query, key, value, scaling)

    monkeypatch.setattr(attention.SlicedLayout, "attend", blind)


def without_window_argument(monkeypatch):
    """Attention that masks outside of the function that transformers dispatches."""
    forward = attention.packed_attention_forward

    def deaf(module, *args, sliding_window=None, **kwargs):
        return forward(torch.nn.Identity(), *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "packed", deaf)


def without_factor(monkeypatch):
    """Attention that takes no notice of the model's own scale of the scores."""
    attend = attention.SlicedLayout.attend

    def plain(self, query, key, value, scaling, window=None):
        return attend(self, query, key, value, None, window)

    monkeypatch.setattr(attention.SlicedLayout, "attend", plain)


def with_kinds_hidden(monkeypatch):
    """Recurrent layers that the config does not tell."""
    monkeypatch.setattr(packable_module, "_obstacle", lambda _: "")


OTHER = "other hidden states than its own forward pass"
FAULTS = {
    "window": ("Mixtral", {"sliding_window": 16}, without_windows, 0, OTHER),
    "long window": (
        "Mixtral", {"sliding_window": 60}, without_window_argument, 60, "may slide over 60 tokens",
    ),
    "scale": (
        "GraniteMoe", {"attention_multiplier": 3.0}, without_factor, 0, OTHER,
    ),
    "linear attention": (
        "Qwen3Next",
        {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        with_kinds_hidden, 0, OTHER,
    ),
    "convolution": (
        "Lfm2Moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
        with_kinds_hidden, 0, OTHER,
    ),
    "state space": (
        "Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
        with_kinds_hidden, 0, OTHER,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_comparison_keeps_the_engine_from_what_it_would_get_wrong(
    make_model, monkeypatch, fault, dtype
):
    family, settings, spoil, longest, reason = FAULTS[fault]
    model = make_model(family, **settings).to(dtype)
    spoil(monkeypatch)
    found = packable(model)
    assert found.longest == longest
    assert reason in found.reason


def test_the_comparison_routes_as_the_model_does(make_model, monkeypatch):
    """Random draws of a control, and a recorder, see nothing of it."""
    model, recorder = make_model("Mixtral"), Recorder()
    with routed(model, "shuffle.minp_k4_t03", recorder=recorder):
        assert packable(model).longest == math.inf
        assert recorder._sums == {}
        with torch.inference_mode():
            first = model(torch.arange(3, 40)[None]).logits
    with routed(model, "shuffle.minp_k4_t03"), torch.inference_mode():
        assert torch.equal(model(torch.arange(3, 40)[None]).logits, first)


@pytest.mark.parametrize("case", ["longrope", "dynamic"])
def test_a_strategy_is_scored_and_recorded_in_plain_passes(make_model, tokenizer, requests, case):
    family, settings, _, _ = CASES[case]
    model = make_model(family, **settings)
    recorder = Recorder()
    with routed(model, "regular_k3", recorder=recorder):
        scores = Scorer(model, tokenizer, recorder=recorder).score_tokens(requests, GROUPS)
    assert {score.mean_experts for score in scores} == {3.0}
    with routed(model, "regular_k3"):
        expected = [value for value, _ in plain_scores(model, requests)]
    found = [score.log_likelihood for score in scores]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_a_dynamic_rope_forgets_what_was_longer(make_model, tokenizer, requests):
    family, settings, longest, _ = CASES["dynamic"]
    model = make_model(family, **settings)
    first = requests[6]
    assert len(first.input_ids) > longest
    alone = Scorer(model, tokenizer).score_tokens([first], [[0]])
    with torch.inference_mode():
        model(torch.arange(3, 60).repeat(3)[None], use_cache=False)
    assert Scorer(model, tokenizer).score_tokens([first], [[0]]) == alone


def test_final_states_give_the_logits_of_plain_passes(make_model, tokenizer, requests):
    for case in ("olmoe", "mixtral, sliding", "longrope", "granite", "gpt-oss"):
        family, settings, _, _ = CASES[case]
        model = make_model(family, **settings)
        states = Scorer(model, tokenizer).final_states(requests)
        for request, hidden in zip(requests, states, strict=True):
            with torch.inference_mode():
                whole = model(torch.tensor([request.input_ids]), use_cache=False).logits[0]
                ours = logits_of(model, hidden)
            torch.testing.assert_close(ours, whole[-len(request.target_ids) :], rtol=0, atol=1e-4)


class Scaled(nn.Linear):
    """An output layer that does more."""

    def forward(self, rows):
        """Return half of the logits."""
        return super().forward(rows) / 2


def with_scaled_head(model):
    head = Scaled(32, 64, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def with_hook(module):
    return module.register_forward_hook(lambda _, __, output: output / 2)


def with_logits_hook(model):
    def halve(_, __, output):
        output.logits = output.logits / 2
        return output

    model.register_forward_hook(halve)


def with_attention(model):
    model.set_attn_implementation("mine")


def mine(module, query, key, value, attention_mask, **kwargs):
    out = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.1, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("mine", mine)

CHANGED = {
    "output layer": (with_scaled_head, ""),
    "hook on the output layer": (lambda m: with_hook(m.lm_head), ""),
    "hook on the model": (with_logits_hook, "forward hooks"),
    "attention": (with_attention, "attention implementation is 'mine'"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_model_is_scored_as_it_is(make_model, tokenizer, requests, change, capsys):
    alter, reason = CHANGED[change]
    model = make_model("Olmoe")
    before = plain_scores(model, requests)
    alter(model)
    check(model, tokenizer, requests)
    line = capsys.readouterr().err
    assert reason in line
    assert (line == "") == (reason == "")
    after = plain_scores(model, requests)
    assert max(abs(a - b) for (a, _), (b, _) in zip(after, before, strict=True)) > 0.1


def test_a_subclass_with_a_forward_of_its_own_takes_plain_passes(make_model, tokenizer, requests):
    from transformers import OlmoeForCausalLM

    class Warm(OlmoeForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 2
            return output

    model = make_model("Olmoe")
    warm = Warm(model.config).eval()
    warm.load_state_dict(model.state_dict())
    assert packable(model).longest == math.inf
    check(warm, tokenizer, requests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_heads_that_are_all_there_is(make_model, dtype, bias):
    model = make_model("Olmoe").to(dtype)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(64).to(dtype))
    assert plain_head(model) is model.lm_head
    model.lm_head.weight.data[-1] = torch.nan  # is told where it does harm
    assert plain_head(model) is model.lm_head


@pytest.mark.parametrize("scaling", [1.0, 1.001, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_logits_shows(make_model, scaling, dtype):
    model = make_model("GraniteMoe", logits_scaling=scaling).to(dtype)
    same = scaling == 1.0 or (scaling == 1.001 and dtype == torch.bfloat16)  # rounds to nothing
    assert (plain_head(model) is None) is not same


def test_a_cap_on_logits_shows(make_model):
    model = make_model("Gemma2", final_logit_softcapping=30.0, sliding_window=16)
    assert plain_head(model) is None
    model.config.final_logit_softcapping = None
    assert plain_head(model) is model.lm_head


def test_windows_of_configs(make_model):
    assert configured_window(make_model("Olmoe").config) is None
    config = make_model("Mixtral", sliding_window=32).config
    assert configured_window(config) == 32
    config.layer_types = ["full_attention", "full_attention"]
    assert configured_window(config) is None
    config.layer_types = ["full_attention", "sliding_attention"]
    assert configured_window(config) == 32


def test_ropes_of_other_configs(make_model):
    config = make_model("Olmoe").config
    config.rope_parameters = {"full_attention": {"rope_type": "default"}}
    assert rope_span(config) == 0
    config.rope_parameters = {"rope_type": "new"}
    assert rope_span(config) == 0


def test_a_sliding_window_does_not_shorten_requests(make_model):
    config = make_model("Mixtral", sliding_window=32, max_position_embeddings=128).config
    assert max_length(config, None) == 128
    assert max_length(config, 64) == 64
    with pytest.raises(
        InputError, match=r"evaluation\.window is 129; allowed: at most the model's"
    ):
        max_length(config, 129)


def test_a_model_in_training_mode_is_refused(make_model, tokenizer, requests):
    model = make_model("Mixtral").train()
    with pytest.raises(InputError, match=r"in training mode; call model\.eval\(\)"):
        Scorer(model, tokenizer).score_tokens(requests, GROUPS)


def test_a_model_is_compared_once_however_many_scorers_it_has(nano, monkeypatch):
    """A study has a scorer for each cell, and a comparison takes as long as a small batch."""
    compared = []
    difference = packable_module._difference
    monkeypatch.setattr(
        packable_module,
        "_difference",
        lambda *given: compared.append(given) or difference(*given),
    )
    requests = [TokenRequest([3, 4, 5], [6])]
    first = Scorer(nano.model, nano.tokenizer)
    alone = first.score_tokens(requests, [[0]])
    second = Scorer(nano.model, nano.tokenizer, exact=first.packable)
    assert second.score_tokens(requests, [[0]]) == alone
    assert len(compared) == 1


def test_a_scorer_that_is_told_of_a_difference_takes_plain_passes(nano, capsys):
    told = Scorer(nano.model, nano.tokenizer, exact=Packable(0, "so it is told"))
    told.score_tokens([TokenRequest([3, 4, 5], [6])], [[0]])
    assert "1 of 1 requests fall back to plain forward passes" in capsys.readouterr().err
