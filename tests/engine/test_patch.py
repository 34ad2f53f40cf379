"""`routed` is stock where it should be, restores exactly, and refuses in one line."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from moe_routing.engine.adapters import find_routers
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", "dropless"]
PADDED = ["adaptive_k8", "bh_k16_a005"]


@pytest.fixture
def ids(tokenizer):
    text = "The river rises in the hills north of the town and flows into the sea. " * 3
    return torch.tensor([tokenizer(text)["input_ids"], tokenizer(text[::-1])["input_ids"][:48]][:1])


@torch.inference_mode()
def logits_of(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_regular_k8_is_the_stock_model_bit_for_bit(model, ids, implementation):
    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        stock = logits_of(model, ids)
        with routed(model, "regular_k8", experts_implementation=None):
            ours = logits_of(model, ids)
    finally:
        model.set_experts_implementation(before)
    assert torch.equal(stock, ours)


def test_ragged_experts_agree_with_stock_eager(model, ids):
    with routed(model, "regular_k8", experts_implementation="eager"):
        eager = logits_of(model, ids)
    with routed(model, "regular_k8"):
        ours = logits_of(model, ids)
    torch.testing.assert_close(ours, eager, rtol=0, atol=1e-5)
    assert (eager - ours).abs().max() > 0  # two implementations, not one


def test_greedy_generation_is_unchanged(model, ids):
    options = {"max_new_tokens": 12, "do_sample": False}
    stock = model.generate(ids, **options)
    with routed(model, "regular_k8"):
        ours = model.generate(ids, **options)
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_restored_exactly(model, ids, fails):
    routers = find_routers(model)
    attributes = [dict(vars(router.module)) for router in routers]
    implementation = copy.deepcopy(model.get_experts_implementation())
    before = logits_of(model, ids)
    try:
        with routed(model, "uniform_k2"):
            inside = logits_of(model, ids)
            if fails:
                raise KeyError("a user's error")
    except KeyError:
        assert fails
    assert not torch.equal(before, inside)
    assert [dict(vars(router.module)) for router in routers] == attributes
    assert all("forward" not in vars(router.module) for router in routers)
    assert model.get_experts_implementation() == implementation
    assert torch.equal(logits_of(model, ids), before)


def test_contexts_nest(model, ids):
    with routed(model, "regular_k4"):
        alone = logits_of(model, ids)
        with routed(model, "regular_k2"):
            inner = logits_of(model, ids)
        after = logits_of(model, ids)
    assert torch.equal(alone, after)
    assert not torch.equal(alone, inner)


@pytest.mark.parametrize("strategy", PADDED)
def test_variable_counts_agree_under_every_experts_implementation(
    model, ids, calibration, strategy
):
    outputs = {}
    for implementation in IMPLEMENTATIONS:
        recorder = Recorder()
        with routed(
            model,
            strategy,
            calibration=calibration,
            recorder=recorder,
            experts_implementation=implementation,
        ):
            outputs[implementation] = logits_of(model, ids)
    assert recorder.statistics().sd_experts() > 0  # the counts do vary
    for implementation, output in outputs.items():
        assert torch.isfinite(output).all(), implementation
        torch.testing.assert_close(output, outputs["eager"], rtol=0, atol=2e-5)


def test_padding_gets_no_experts_and_no_statistics(model, ids):
    padded = torch.nn.functional.pad(ids, (0, 7), value=1)
    mask = torch.arange(padded.shape[1])[None] < ids.shape[1]
    alone, with_padding = Recorder(), Recorder()
    with routed(model, "regular_k4", recorder=alone):
        plain = logits_of(model, ids)
    with routed(model, "regular_k4", recorder=with_padding), with_padding.tokens(mask):
        output = logits_of(model, padded)[:, : ids.shape[1]]
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)
    first, second = alone.statistics(), with_padding.statistics()
    assert second.tokens == ids.numel()
    assert (first.load_LE == second.load_LE).all()
    assert (first.count_histogram_LC == second.count_histogram_LC).all()
    assert with_padding.counts_T.tolist() == [4.0 * 16] * ids.shape[1] + [0.0] * 7


def test_statistics_equal_a_loop_over_stock_logits(model, ids):
    recorder = Recorder()
    with routed(model, "regular_k8", recorder=recorder):
        logits_of(model, ids)
    seen = recorder.statistics()
    router = find_routers(model)[3].module
    captured = []
    handle = router.register_forward_hook(lambda *call: captured.append(call[2]))
    logits_of(model, ids)
    handle.remove()
    probabilities = captured[0][0].double().softmax(-1)
    load = [0] * 64
    entropy = largest = mass = 0.0
    for row in probabilities:
        top = sorted(range(64), key=lambda e: -row[e])[:8]
        for expert in top:
            load[expert] += 1
        entropy += float(-(row * row.log()).sum()) / len(probabilities)
        largest += float(row.max()) / len(probabilities)
        mass += float(row[top].sum()) / len(probabilities)
    assert seen.load_LE[3].tolist() == load
    assert seen.entropy_L[3] == pytest.approx(entropy, abs=1e-5)
    assert seen.max_probability_L[3] == pytest.approx(largest, abs=1e-5)
    assert seen.selected_mass_L[3] == pytest.approx(mass, abs=1e-5)
    assert seen.unique_experts_L[3] == sum(n > 0 for n in load)
    assert seen.mean_experts() == 8
    assert seen.sd_experts() == 0


def test_more_experts_than_the_model_has(model):
    context = routed(model, "regular_k65")
    with pytest.raises(InputError, match=r"'regular_k65'.*65.*at most the model's 64"):
        context.__enter__()


def test_missing_calibration(model):
    context = routed(model, "bh_k8_a005")
    with pytest.raises(InputError, match=r"'bh_k8_a005' needs a calibration"):
        context.__enter__()


def test_calibration_of_another_model(model, calibration):
    weight = find_routers(model)[0].module.weight
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        context = routed(model, "bh_k8_a005", calibration=calibration)
        with pytest.raises(InputError, match="other router weights"):
            context.__enter__()
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1


def test_model_without_a_router():
    from transformers import GPT2Config, GPT2LMHeadModel

    dense = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    with pytest.raises(InputError, match="GPT2LMHeadModel has no supported router"):
        find_routers(dense)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_other_families_route(family):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    other = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    tokens = torch.arange(20)[None]
    native = "normalized_k2" if getattr(config, "norm_topk_prob", True) else "regular_k2"
    stock = logits_of(other, tokens)
    with routed(other, native):
        torch.testing.assert_close(logits_of(other, tokens), stock, rtol=0, atol=1e-5)
    with routed(other, "regular_k1"):
        assert not torch.allclose(logits_of(other, tokens), stock, atol=1e-5)


def test_a_compiled_model_is_routed_and_restored():
    config = OlmoeConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_experts=8, num_experts_per_tok=4, vocab_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    small = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    compiled = torch.compile(small, backend="eager")
    ids = torch.arange(20)[None]
    stock = logits_of(small, ids)
    torch.testing.assert_close(logits_of(compiled, ids), stock)
    with routed(small, "regular_k1", recorder=(recorder := Recorder())):
        expected = logits_of(small, ids)
        torch.testing.assert_close(logits_of(compiled, ids), expected)
    assert (expected - stock).abs().max() > 1e-4
    assert recorder.statistics().forwards == 2
    torch.testing.assert_close(logits_of(compiled, ids), stock)
