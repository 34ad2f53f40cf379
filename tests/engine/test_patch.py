"""`routed` is stock where it should be, restores exactly, and refuses in one line."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig

from moe_routing.engine.adapters import find_experts, find_routers
from moe_routing.engine.context import ForwardContext, current_context, forward_context
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", "dropless"]
PADDED = ["adaptive_k8", "bh_k16_a005", "bh_k16_a005_within-token"]


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
    modules = [*(router.module for router in routers), *find_experts(model)]
    attributes = [dict(vars(module)) for module in modules]
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
    assert [dict(vars(module)) for module in modules] == attributes
    assert all("forward" not in vars(router.module) for router in routers)
    assert model.get_experts_implementation() == implementation
    assert torch.equal(logits_of(model, ids), before)


def compiled(model):
    return torch.compile(model, backend="eager")


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.model, compiled])
@pytest.mark.parametrize("run", [lambda f: f(), in_another_thread])
def test_a_second_strategy_is_refused(make_model, of, run):
    model = make_model("Olmoe")
    ids = torch.arange(20)[None]
    stock = logits_of(model, ids)

    def second():
        with routed(of(model), "regular_k2"):
            pass

    with routed(model, "regular_k1"):
        inside = logits_of(model, ids)
        with pytest.raises(InputError, match="the model is routed by 'regular_k1' already; leave"):
            run(second)
        assert torch.equal(logits_of(model, ids), inside)
    assert torch.equal(logits_of(model, ids), stock)
    second()
    assert torch.equal(logits_of(model, ids), stock)


def test_of_many_threads_one_routes_and_none_leaves_a_trace(make_model):
    model = make_model("Mixtral")
    ids = torch.arange(20)[None]
    state = [dict(vars(module)) for module in model.modules()]
    expected = {}
    for k in (1, 2, 3):
        with routed(model, f"regular_k{k}"):
            expected[k] = logits_of(model, ids)

    def attempt(number):
        k = 1 + number % 3
        try:
            with routed(model, f"regular_k{k}"):
                return torch.equal(logits_of(model, ids), expected[k])
        except InputError:
            return None

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(attempt, range(60)))
    assert True in outcomes
    assert False not in outcomes
    assert [dict(vars(module)) for module in model.modules()] == state


def test_models_of_one_config_are_routed_apart(make_model):
    first = make_model("Olmoe")
    second = type(first)(first.config).eval()
    ids = torch.arange(20)[None]
    stock = [logits_of(m, ids) for m in (first, second)]
    implementation = first.get_experts_implementation()
    one, two = (routed(m, s) for m, s in ((first, "regular_k1"), (second, "regular_k3")))
    one.__enter__()
    alone = logits_of(first, ids)
    assert torch.equal(logits_of(second, ids), stock[1])
    two.__enter__()
    both = logits_of(second, ids)
    one.__exit__(None, None, None)
    assert torch.equal(logits_of(first, ids), stock[0])
    assert torch.equal(logits_of(second, ids), both)
    two.__exit__(None, None, None)
    assert torch.equal(logits_of(second, ids), stock[1])
    assert not torch.equal(alone, stock[0])
    assert not torch.equal(both, stock[1])
    assert first.get_experts_implementation() == implementation


def test_a_copy_made_inside_is_a_stock_model_of_its_own(make_model):
    model = make_model("Qwen3Moe")
    ids = torch.arange(20)[None]
    stock = logits_of(model, ids)
    with routed(model, "regular_k1"):
        twin = copy.deepcopy(model)
        inside = logits_of(model, ids)
        assert torch.equal(logits_of(twin, ids), stock)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(logits_of(twin, ids), stock)
    with routed(twin, "regular_k1"):
        assert torch.equal(logits_of(twin, ids), inside)
    assert not torch.equal(inside, stock)
    twin.set_experts_implementation("eager")
    configs = {id(m.config) for m in twin.modules() if hasattr(m, "config")}
    assert configs == {id(twin.config)}


def test_padding_gets_no_experts_without_a_recorder(make_model):
    model, ids = make_model("Olmoe"), torch.arange(20)[None]
    seen = []

    def see(_, inputs):
        seen.append(inputs[1])

    mask_T = torch.arange(20) < 12
    with (
        routed(model, "regular_k3"),
        forward_context(ForwardContext(mask_T=mask_T)),
        model.model.layers[0].mlp.experts.register_forward_pre_hook(see),
    ):
        logits_of(model, ids)
    (index_TK,) = seen
    assert ((index_TK < 8).all(1) == mask_T).all()
    assert (index_TK[12:] == 8).all()


def test_each_thread_has_its_own_context():
    with forward_context(ForwardContext(concurrent=True)) as context, ThreadPoolExecutor(1) as pool:
        assert current_context() is context
        assert pool.submit(current_context).result() == ForwardContext()
    assert current_context() == ForwardContext()


def test_several_threads_are_recorded(make_model):
    model, recorder = make_model("Olmoe"), Recorder()
    ids = torch.arange(20)[None]
    with routed(model, "regular_k3", recorder=recorder), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: logits_of(model, ids), range(40)))
    seen = recorder.statistics()
    assert (seen.forwards, seen.tokens) == (40, 800)
    assert seen.count_histogram_LC[:, 3].tolist() == [800, 800]
    assert seen.load_LE.sum() == 2 * 800 * 3


class QuantisedExperts(nn.Module):
    """Experts of a class that transformers does not dispatch; ids beyond the last are an error."""

    def __init__(self, experts):
        super().__init__()
        self.num_experts = experts.num_experts
        self.inner = experts
        self.seen = []

    def forward(self, hidden_TH, index_TK, weight_TK):
        self.seen.append((index_TK, weight_TK))
        assert int(index_TK.max()) < self.num_experts
        return type(self.inner).forward.__wrapped__(self.inner, hidden_TH, index_TK, weight_TK)


@pytest.mark.parametrize("strategy", ["stock", "topp_k4_p06", "absolute_k2_t03"])
def test_experts_of_quantised_checkpoints_run_themselves(make_model, strategy):
    model, ids = make_model("Mixtral"), torch.arange(20)[None]
    with routed(model, strategy):
        expected = logits_of(model, ids)
    for layer in model.model.layers:
        layer.mlp.experts = QuantisedExperts(layer.mlp.experts)
    with routed(model, strategy):
        torch.testing.assert_close(logits_of(model, ids), expected)
    index_TK, weight_TK = model.model.layers[0].mlp.experts.seen[0]
    padded_TK = weight_TK == 0
    assert bool(padded_TK.any()) == (strategy != "stock")
    first_TK = index_TK[:, :1].expand_as(index_TK)
    some_T1 = ~padded_TK.all(1, keepdim=True)
    assert (index_TK == first_TK)[padded_TK & some_T1].all()
    with pytest.raises(InputError, match="QuantisedExperts, which cannot be computed one by one"):
        routed(model, "stock_k2_exact-norm").__enter__()
    with pytest.raises(InputError, match="no experts whose implementation can be chosen"):
        routed(model, "stock", experts_implementation="eager").__enter__()


def test_an_unknown_experts_implementation(model):
    context = routed(model, "regular_k4", experts_implementation="fast")
    with pytest.raises(InputError, match='experts_implementation="fast"'):
        context.__enter__()
    assert all("forward" not in vars(router.module) for router in find_routers(model))


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
    context = ForwardContext(mask_T=mask.reshape(-1))
    with routed(model, "regular_k4", recorder=with_padding), forward_context(context):
        output = logits_of(model, padded)[:, : ids.shape[1]]
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)
    first, second = alone.statistics(), with_padding.statistics()
    assert second.tokens == ids.numel()
    assert (first.load_LE == second.load_LE).all()
    assert (first.count_histogram_LC == second.count_histogram_LC).all()
    assert context.counts_T.tolist() == [4.0 * 16] * ids.shape[1] + [0.0] * 7


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


def test_toggles_of_a_model_with_another_weight_outside_the_routers(model, calibration):
    weight = find_experts(model)[1].down_proj
    before = weight[2, 3, 4].item()
    with torch.no_grad():
        weight[2, 3, 4] += 1
    try:
        context = routed(model, "bh_k8_a005", calibration=calibration)
        with pytest.raises(InputError, match=r"'bh_k8_a005': .* other weights") as error:
            context.__enter__()
        assert "\n" not in str(error.value)
        with routed(model, "bh_k8_a005_within-token", calibration=calibration):
            pass  # the other nulls know the routers only
    finally:
        with torch.no_grad():
            weight[2, 3, 4] = before
    with routed(model, "bh_k8_a005", calibration=calibration):
        pass


def test_model_without_a_router():
    from transformers import GPT2Config, GPT2LMHeadModel

    dense = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    with pytest.raises(InputError, match=r"GPT2LMHeadModel has no supported router .*'gpt2'"):
        find_routers(dense)


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
